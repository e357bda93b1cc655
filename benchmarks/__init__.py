"""Cost of training steps and sampling in time, FLOPs and memory.  Not installed; may import everything but tests."""
