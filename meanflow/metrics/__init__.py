"""What samples are worth: distances, scores and reference statistics.  Imports `config`, `weights`, `data`."""
