"""CogVideoX from a prompt to a video."""
