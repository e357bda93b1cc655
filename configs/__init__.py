"""What to run: one file of recipes per published family.  Imports `meanflow.config`, which has the options."""
