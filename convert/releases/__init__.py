"""Releases under their authors' names: recognised by their tensors, renamed to diffusers'."""
