"""What a training run would need on cards that are not there: memory, collectives, FLOPs and time; see rehearse.py."""
