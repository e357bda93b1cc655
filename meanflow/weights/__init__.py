"""Files of weights, ours and other people's, as canonical arrays; nothing in a file is executed.  Imports `config`."""
