"""Readers of files that nobody vouches for, which check all they use: tensors, JSON, values."""
