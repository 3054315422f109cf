"""Find the files and the weights of a source: a folder, a file or an id of the hub."""
