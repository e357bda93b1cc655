"""What to run: every option in `base.py`, one file per system, checks in `resolve.py`."""
