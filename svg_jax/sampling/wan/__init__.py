"""Wan 2.1 from a prompt to a video."""
