"""Both implementations behind one interface: numpy in, numpy out, images [b h w c], canonical names."""
