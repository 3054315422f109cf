"""The configs of CLIP's two towers."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from svg_jax.models.config import ModelConfig, implemented


@dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """The text tower's part of a released config.json; transformers' names and defaults.

    Attributes:
        vocab_size: Rows of the token embedding.
        hidden_size: Features of a token.
        intermediate_size: Features inside the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of a layer.
        max_position_embeddings: Most tokens of a text.
        hidden_act: "quick_gelu" or "gelu".
        layer_norm_eps: Epsilon of the norms.
        eos_token_id: Id of the token that ends a text, whose features stand for the whole text. The
            2 of OpenAI's configs is not an id: it means the largest id of each text.
    """

    other_keys: ClassVar = ("projection_dim",)
    fixed_keys: ClassVar = MappingProxyType({"model_type": "clip_text_model"})

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = implemented("quick_gelu", "gelu")
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heads(self)


@dataclass(frozen=True)
class CLIPVisionConfig(ModelConfig):
    """The vision tower's part of a released config.json; transformers' names and defaults.

    Attributes:
        hidden_size: Features of a token.
        intermediate_size: Features inside the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of a layer.
        num_channels: Channels of an image.
        image_size: Rows and columns of an image.
        patch_size: Rows and columns of a token.
        hidden_act: "quick_gelu" or "gelu".
        layer_norm_eps: Epsilon of the norms.
    """

    other_keys: ClassVar = ("projection_dim", "vocab_size")
    fixed_keys: ClassVar = MappingProxyType({"model_type": "clip_vision_model"})

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = implemented("quick_gelu", "gelu")
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heads(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPVisionConfig: image_size={self.image_size} must be a multiple of "
                f"patch_size={self.patch_size}."
            )

    @property
    def num_patches(self) -> int:
        """Tokens of an image, without the class token."""
        return (self.image_size // self.patch_size) ** 2


def _check_heads(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{type(config).__name__}: hidden_size={config.hidden_size} must be a multiple of "
            f"num_attention_heads={config.num_attention_heads}."
        )
