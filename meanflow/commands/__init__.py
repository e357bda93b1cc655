"""The framework-free half of each command, and the files and logs of a run.  Imports all of `meanflow`."""
