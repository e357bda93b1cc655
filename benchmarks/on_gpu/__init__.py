"""The pieces of `benchmarks/gpu.py`: programs that each try one thing on a GPU and print what they found as JSON."""
