"""What a model learns from: examples, batches, augmentation and couplings.  Imports `config`, `weights`, `sampling`."""
