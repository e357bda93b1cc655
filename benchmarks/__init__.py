"""What steps and samples cost, in time, FLOPs and memory."""
