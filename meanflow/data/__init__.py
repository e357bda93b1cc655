"""Training data: datasets, batches, augmentation, latents, couplings.  Imports `config`, `weights`, `sampling`."""
