"""What a source is: a folder, a file or a hub id, and which tensors are its weights."""
