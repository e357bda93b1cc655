"""What it is worth: distances, image grids, verdicts on samples, the logs of a run.  numpy only, for both trainers."""
