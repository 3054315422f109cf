"""HunyuanVideo from a prompt to a video."""
