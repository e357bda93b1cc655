"""The MeanFlow family in JAX and Flax NNX.  `torch_impl` is its twin, file by file."""
