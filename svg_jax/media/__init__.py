"""Pixels: frames in any form, images and videos as files, and how far apart two videos are."""
