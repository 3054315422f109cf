"""Sparse VideoGen in JAX: training-free sparse attention for video diffusion transformers."""
