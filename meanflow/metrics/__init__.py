"""Distances, scores and reference statistics for samples.  Imports `config`, `weights`, `data`."""
