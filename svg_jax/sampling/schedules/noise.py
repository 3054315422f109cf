"""The random numbers of a run; each kind has a stream of its own.

Noise is drawn on the host, and the rows that profiling samples from a PRNG key on the device.
"""

import jax
import jax.numpy as jnp
import numpy as np


def initial_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normal float32 noise on the host: `Generator(Philox(seed))`, in C order.

    The same seed gives the same noise on every device, and the first video of a batch does not
    depend on how many others there are.
    """
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


def step_noise(seed: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw DPM's noise of a step from its own stream, so that a run can start at any step."""
    stream = np.random.SeedSequence(seed, spawn_key=(step,))
    return np.random.Generator(np.random.Philox(stream)).standard_normal(shape, dtype=np.float32)


def image_noise_of(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the noise of an image's latents, from a stream of its own."""
    stream = np.random.SeedSequence(seed, spawn_key=(0, 0))  # the steps' keys are of one number
    return np.random.Generator(np.random.Philox(stream)).standard_normal(shape, dtype=np.float32)


def seed_key(seed: int) -> jax.Array:
    """Make the PRNG key of a run, from which the query rows of each step are sampled.

    It holds both halves of a seed of up to 64 bits, and names its algorithm: neither jax_enable_x64
    nor jax_default_prng_impl changes what a seed gives.
    """
    halves = np.array([seed >> 32, seed], dtype=object) & 0xFFFFFFFF
    return jax.random.wrap_key_data(jnp.asarray(halves.astype(np.uint32)), impl="threefry2x32")


def seed_of(key: jax.Array) -> int:
    """Read the seed that a run's key was made of."""
    high, low = np.asarray(jax.random.key_data(key)).tolist()
    return (high << 32) | low
