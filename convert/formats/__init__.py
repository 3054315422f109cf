"""Bytes from outside, believed as far as they were checked: tensors, JSON, single values."""
