"""The MeanFlow family in PyTorch.  `jax_impl` is its twin, file by file."""
