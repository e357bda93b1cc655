"""Images with labels: TFDS datasets, folders and .zip files.  Imports what `meanflow.data` may."""
