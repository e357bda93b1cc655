"""Latents of images: the dataset, the autoencoder's files, importers.  Imports what `meanflow.data` may."""
