"""Readers of untrusted files, which check all that they use: tensors, JSON, single values."""
