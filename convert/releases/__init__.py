"""Releases in their authors' own names: recognised by their tensors, renamed to diffusers'."""
