"""What sampling needs in both frameworks: noise, image grids and files of images.  Imports `config`."""
