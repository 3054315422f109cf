"""What the VAEs share: the distribution that an encoder describes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

_LOG_VARIANCES = (-30.0, 20.0)  # the least and the largest


class Posterior(NamedTuple):
    """A normal distribution over latents, whose mode is its mean.

    Attributes:
        mean: Mean of every latent.
        log_variance: Logarithm of its variance, from -30 to 20.
    """

    mean: Float[Array, "batch latent_channels frames height width"]
    log_variance: Float[Array, "batch latent_channels frames height width"]

    @classmethod
    def from_moments(
        cls, moments: Float[Array, "batch twice_latent_channels frames height width"]
    ) -> "Posterior":
        """Reads an encoder's last channels: means, then logarithms of variances."""
        mean, log_variance = jnp.split(moments, 2, axis=1)
        return cls(mean, jnp.clip(log_variance, *_LOG_VARIANCES))

    def sample(
        self, noise: Float[Array, "batch latent_channels frames height width"]
    ) -> Float[Array, "batch latent_channels frames height width"]:
        """The latents that standard normal noise stands for."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise.astype(self.mean.dtype)
