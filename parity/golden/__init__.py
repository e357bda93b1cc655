"""Outputs of the official code (.npz), and one reader for each system."""
