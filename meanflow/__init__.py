"""What both implementations share, in numpy: configs, data, sampling, metrics, weights and the halves of commands.

Imports point one way: `config` <- `weights`, `sampling` <- `data` <- `metrics` <- `commands`; the modules beside them
import nothing else of the project, and none of it imports `jax_impl` or `torch_impl`.
"""
