"""LLaVA (arXiv 2304.08485) as an encoder: a language model that reads an image among its tokens.

HunyuanVideo takes its text features from it where a video begins with an image. Source of the
architecture as released: transformers `LlavaForConditionalGeneration`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from svg_jax.models.clip import CLIPVisionEncoder
from svg_jax.models.clip_config import CLIPVisionConfig
from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.layers import FeedForward, Kinds, gelu
from svg_jax.models.llama import LlamaConfig, LlamaEncoder

_PARTS = MappingProxyType({"text_config": LlamaConfig, "vision_config": CLIPVisionConfig})


@dataclass(frozen=True)
class LlavaConfig(ModelConfig):
    """The encoder's part of a released config.json; transformers' names and defaults.

    Attributes:
        text_config: Config of the language model.
        vision_config: Config of the image encoder.
        image_token_index: Id of the tokens that an image's features replace.
        projector_hidden_act: "gelu".
        vision_feature_select_strategy: "default", which leaves out the token of the whole image.
        vision_feature_layer: -2, the number of the image encoder's hidden state that is used.
        multimodal_projector_bias: True.
    """

    other_keys: ClassVar = ("eos_token_id", "ignore_index", "image_seq_length", "vocab_size")
    fixed_keys: ClassVar = MappingProxyType({"model_type": "llava"})

    text_config: LlamaConfig
    vision_config: CLIPVisionConfig
    image_token_index: int = 32000
    projector_hidden_act: str = implemented("gelu")
    vision_feature_select_strategy: str = implemented("default")
    vision_feature_layer: int = implemented(-2)
    multimodal_projector_bias: bool = implemented(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_token_index >= self.text_config.vocab_size:
            raise ValueError(
                f"LlavaConfig: image_token_index={self.image_token_index} is beyond the "
                f"vocab_size={self.text_config.vocab_size} of its text_config."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlavaConfig":
        """Read a parsed config.json; ValueError on anything unknown or not implemented."""
        parts = {}
        for name, config in _PARTS.items():
            part = values.get(name)
            if not isinstance(part, Mapping):
                raise ValueError(f"LlavaConfig: {name} must be a config of its own, not {part!r}.")
            parts[name] = config.from_dict(part)
        return super().from_dict({**values, **parts})


class LlavaEncoder(nnx.Module):
    """Token ids and images to features of each token.

    Attributes:
        config: Architecture.
        vision: Image encoder.
        projector: Layers that turn its features into those of the language model's tokens.
        language_model: Text encoder.
    """

    def __init__(
        self,
        config: LlavaConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Make an encoder with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of matrix products and the result; norms and softmax are always float32.
            param_dtype: Dtype of the parameters.
            rngs: Source of random weights.
        """
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width = config.text_config.hidden_size
        self.config = config
        self.dtype = dtype
        self.vision = CLIPVisionEncoder(config.vision_config, **kinds)
        self.projector = FeedForward(
            config.vision_config.hidden_size, width, width, activation=gelu, **kinds
        )
        self.language_model = LlamaEncoder(config.text_config, **kinds)

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        pixel_values: Float[Array, "images channels height width"],
        attention_mask: Bool[Array, "batch tokens"] | Int[Array, "batch tokens"] | None = None,
        *,
        hidden_state: int = -1,
    ) -> Float[Array, "batch tokens features"]:
        """Encode.

        Args:
            input_ids: Token ids with `image_token_index` once for every patch of the text's image,
                and padding behind each text: every token has a position.
            pixel_values: Image for each text, see `CLIPVisionEncoder`.
            attention_mask: True or 1 at the tokens that can be attended to; None for all.
            hidden_state: Number of the language model's hidden state to return, see `LlamaEncoder`.

        Returns:
            That hidden state in `dtype`: NaN for a text that has more or fewer image tokens than
            its image has patches.

        Raises:
            ValueError: If there is not one image for each text, or an encoder refuses its input.
        """
        if len(pixel_values) != len(input_ids):
            raise ValueError(
                f"there are {len(pixel_values)} images and {len(input_ids)} texts: each text must "
                "have one."
            )
        patches = self.vision(pixel_values, hidden_state=self.config.vision_feature_layer)[:, 1:]
        embedded = place_features(
            self.language_model.token_embedding(input_ids),
            self.projector(patches).astype(jnp.float32),
            input_ids == self.config.image_token_index,
        )
        return self.language_model.encode(embedded, attention_mask, hidden_state=hidden_state)


def place_features(
    embedded: Float[Array, "batch tokens width"],
    features: Float[Array, "batch patches width"],
    is_place: Bool[Array, "batch tokens"],
) -> Float[Array, "batch tokens width"]:
    """Replace the embedded tokens at `is_place` by the features, in order.

    A batch entry that does not have as many places as features gets NaN in all of them.
    """
    fits = jnp.sum(is_place, axis=1) == features.shape[1]
    features = jnp.where(fits[:, None, None], features, jnp.nan)
    order = jnp.cumsum(is_place, axis=1) - 1
    placed = jnp.take_along_axis(features, order[:, :, None], axis=1, mode="clip")
    return jnp.where(is_place[:, :, None], placed, embedded)
