"""What is ported: pipelines, and a row a model class of what converting and loading must know."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from flax import nnx

from svg_jax.convert.tables import (
    clip,
    cogvideox,
    cogvideox_vae,
    hunyuan_video,
    hunyuan_video_vae,
    llama,
    llava,
    t5,
    wan,
    wan_vae,
)
from svg_jax.convert.tables.rules import Rule
from svg_jax.models import (
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
    CLIPVisionEncoder,
    CogVideoXConfig,
    CogVideoXTransformer,
    CogVideoXVAE,
    CogVideoXVAEConfig,
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
    HunyuanVideoVAE,
    HunyuanVideoVAEConfig,
    LlamaConfig,
    LlamaEncoder,
    LlavaConfig,
    LlavaEncoder,
    T5Config,
    T5Encoder,
    WanConfig,
    WanTransformer,
    WanVAE,
    WanVAEConfig,
)

Family = Literal["cogvideox", "hunyuan_video", "wan"]
# Pipelines of diffusers, and whose they are.
PIPELINES: Mapping[str, Family] = {
    "CogVideoXPipeline": "cogvideox",
    "CogVideoXImageToVideoPipeline": "cogvideox",
    "HunyuanVideoPipeline": "hunyuan_video",
    "HunyuanVideoImageToVideoPipeline": "hunyuan_video",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
}
# What each library calls a file of weights.
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
# Names of tensors that no model computes with: tables and counters that its class makes anew, the
# vocabulary that ComfyUI keeps with an encoder's weights, and what only products in float8 need.
BUFFERS = re.compile(
    r"(?:.*\.)?(?:position_ids|(?:rotary_emb\.)?inv_freq|num_batches_tracked|logit_scale"
    r"|spiece_model|tokenizer_json|scaled_fp8|scale_input|input_scale|comfy_quant|_extra_state)"
)


@dataclass(frozen=True)
class ModelClass:
    """A class of diffusers or transformers, and its port.

    Attributes:
        library: Where the class is from.
        role: The component that it is in the pipelines that have it.
        module: The port, which is made of a config.
        read_config: Makes the config from a parsed config.json, strictly.
        rules: The conversion table for a config.
        unused: Names of tensors that released files hold and that no output of the port needs.
    """

    library: str
    role: str
    module: Callable[..., nnx.Module]
    read_config: Callable[[Mapping[str, Any]], Any]
    rules: Callable[[Any], tuple[Rule, ...]]
    unused: re.Pattern[str] | None = None

    @property
    def stem(self) -> str:
        """What its library calls the weights' file."""
        return STEMS[self.library]


_diffusers = partial(ModelClass, "diffusers")
_transformers = partial(ModelClass, "transformers")
_CLIP_VISION = _transformers(
    "image_encoder",
    CLIPVisionEncoder,
    CLIPVisionConfig.from_dict,
    clip.vision_rules,
    clip.VISION_UNUSED,
)

MODEL_CLASSES: Mapping[str, ModelClass] = {
    "AutoencoderKLCogVideoX": _diffusers(
        "vae", CogVideoXVAE, CogVideoXVAEConfig.from_dict, cogvideox_vae.rules
    ),
    "AutoencoderKLHunyuanVideo": _diffusers(
        "vae", HunyuanVideoVAE, HunyuanVideoVAEConfig.from_dict, hunyuan_video_vae.rules
    ),
    "AutoencoderKLWan": _diffusers("vae", WanVAE, WanVAEConfig.from_dict, wan_vae.rules),
    "CLIPTextModel": _transformers(
        "text_encoder_2",
        CLIPTextEncoder,
        CLIPTextConfig.from_dict,
        clip.text_rules,
        clip.TEXT_UNUSED,
    ),
    "CLIPVisionModel": _CLIP_VISION,
    "CLIPVisionModelWithProjection": _CLIP_VISION,
    "CogVideoXTransformer3DModel": _diffusers(
        "transformer",
        CogVideoXTransformer,
        CogVideoXConfig.from_dict,
        cogvideox.rules,
        cogvideox.UNUSED,
    ),
    "HunyuanVideoTransformer3DModel": _diffusers(
        "transformer", HunyuanVideoTransformer, HunyuanVideoConfig.from_dict, hunyuan_video.rules
    ),
    "LlamaModel": _transformers(
        "text_encoder", LlamaEncoder, LlamaConfig.from_dict, llama.rules, llama.UNUSED
    ),
    "LlavaForConditionalGeneration": _transformers(
        "text_encoder", LlavaEncoder, LlavaConfig.from_dict, llava.rules, llama.UNUSED
    ),
    "T5EncoderModel": _transformers(
        "text_encoder",
        T5Encoder,
        partial(T5Config.from_dict, model_type="t5"),
        t5.rules,
        t5.UNUSED,
    ),
    "UMT5EncoderModel": _transformers(
        "text_encoder",
        T5Encoder,
        partial(T5Config.from_dict, model_type="umt5"),
        t5.rules,
        t5.UNUSED,
    ),
    "WanTransformer3DModel": _diffusers(
        "transformer", WanTransformer, WanConfig.from_dict, wan.rules, wan.UNUSED
    ),
}


def classes_of(role: str) -> tuple[str, ...]:
    """Name the classes that have a role in pipelines."""
    return tuple(name for name, of in MODEL_CLASSES.items() if of.role == role)
