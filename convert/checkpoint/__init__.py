"""Converted folders: write them whole or not at all, check, load, verify and export them."""
