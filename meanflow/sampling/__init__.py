"""What both frameworks sample with: steps, noise, image grids and image files.  Imports `config`."""
