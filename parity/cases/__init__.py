"""The checks that need no fixtures: the two implementations against each other and against `parity/oracle.py`."""
