"""Flax NNX ports of video diffusion transformers, text encoders and VAEs; nothing of SVG here."""

if __name__ != "svg_jax.models":
    raise ImportError(
        f"import svg_jax.models, not {__name__}: install the project with `pip install -e .`"
    )

from svg_jax.models.attention import Attend, dense_attention
from svg_jax.models.clip import CLIPTextEncoder, CLIPVisionEncoder
from svg_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from svg_jax.models.cogvideox import CogVideoXTransformer
from svg_jax.models.cogvideox_config import CogVideoXConfig
from svg_jax.models.cogvideox_vae import CogVideoXVAE
from svg_jax.models.cogvideox_vae_config import CogVideoXVAEConfig
from svg_jax.models.hunyuan_video import HunyuanVideoTransformer
from svg_jax.models.hunyuan_video_config import HunyuanVideoConfig
from svg_jax.models.hunyuan_video_vae import HunyuanVideoVAE
from svg_jax.models.hunyuan_video_vae_config import HunyuanVideoVAEConfig
from svg_jax.models.layout import VideoLayout
from svg_jax.models.llama import LlamaConfig, LlamaEncoder
from svg_jax.models.llava import LlavaConfig, LlavaEncoder
from svg_jax.models.t5 import T5Config, T5Encoder
from svg_jax.models.vae import Posterior
from svg_jax.models.vae_tiling import FrameTiling, Tiling
from svg_jax.models.wan import WanTransformer
from svg_jax.models.wan_config import WanConfig
from svg_jax.models.wan_vae import WanVAE
from svg_jax.models.wan_vae_config import WanVAEConfig

__all__ = [
    "Attend",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "CLIPVisionConfig",
    "CLIPVisionEncoder",
    "CogVideoXConfig",
    "CogVideoXTransformer",
    "CogVideoXVAE",
    "CogVideoXVAEConfig",
    "FrameTiling",
    "HunyuanVideoConfig",
    "HunyuanVideoTransformer",
    "HunyuanVideoVAE",
    "HunyuanVideoVAEConfig",
    "LlamaConfig",
    "LlamaEncoder",
    "LlavaConfig",
    "LlavaEncoder",
    "Posterior",
    "T5Config",
    "T5Encoder",
    "Tiling",
    "VideoLayout",
    "WanConfig",
    "WanTransformer",
    "WanVAE",
    "WanVAEConfig",
    "dense_attention",
]
