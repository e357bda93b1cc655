"""What to learn: datasets stored by TFDS in ArrayRecord, loaded by Grain.  numpy only, for both trainers."""
