"""Options, their checks, and the configs of runs as files.  Imports nothing of the project but `meanflow.*` modules."""
