"""From noise to a video: schedulers, the denoising loop, one pipeline per family."""
