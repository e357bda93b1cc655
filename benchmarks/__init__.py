"""The cost of steps and samples, in time, FLOPs and memory.  Not installed; imports everything else but tests."""
