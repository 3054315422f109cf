"""What is ported: the pipelines, and one row for each model class with all that is known of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from flax import nnx

from svg_jax import models
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

Family = Literal["cogvideox", "hunyuan_video", "wan"]
# The pipelines of diffusers and their families.
PIPELINES: Mapping[str, Family] = {
    "CogVideoXPipeline": "cogvideox",
    "CogVideoXImageToVideoPipeline": "cogvideox",
    "HunyuanVideoPipeline": "hunyuan_video",
    "HunyuanVideoImageToVideoPipeline": "hunyuan_video",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
}
# The name that each library gives a file of weights.
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
# Names of tensors that no model needs: tables and counters that its class computes itself, the
# vocabulary that ComfyUI stores with an encoder's weights, and what only float8 products use.
BUFFERS = re.compile(
    r"(?:.*\.)?(?:position_ids|(?:rotary_emb\.)?inv_freq|num_batches_tracked|logit_scale"
    r"|spiece_model|tokenizer_json|scaled_fp8|scale_input|input_scale|comfy_quant|_extra_state)"
)


@dataclass(frozen=True)
class ModelClass:
    """A class of diffusers or transformers, and its port.

    Attributes:
        library: Library of the class, "diffusers" or "transformers".
        role: Component that the class is in its pipelines.
        module: Port of the class, which takes a config.
        read_config: Reader of a parsed config.json, which refuses what it does not know.
        rules: Function from a config to the conversion table.
        unused: Pattern of names of tensors that released files hold and the port does not need.
    """

    library: str
    role: str
    module: Callable[..., nnx.Module]
    read_config: Callable[[Mapping[str, Any]], Any]
    rules: Callable[[Any], tuple[Rule, ...]]
    unused: re.Pattern[str] | None = None

    @property
    def stem(self) -> str:
        """Name, without suffix, that its library gives the file of weights."""
        return STEMS[self.library]


_diffusers = partial(ModelClass, "diffusers")
_transformers = partial(ModelClass, "transformers")
_CLIP_VISION = _transformers(
    "image_encoder",
    models.CLIPVisionEncoder,
    models.CLIPVisionConfig.from_dict,
    clip.vision_rules,
    clip.VISION_UNUSED,
)

MODEL_CLASSES: Mapping[str, ModelClass] = {
    "AutoencoderKLCogVideoX": _diffusers(
        "vae", models.CogVideoXVAE, models.CogVideoXVAEConfig.from_dict, cogvideox_vae.rules
    ),
    "AutoencoderKLHunyuanVideo": _diffusers(
        "vae",
        models.HunyuanVideoVAE,
        models.HunyuanVideoVAEConfig.from_dict,
        hunyuan_video_vae.rules,
    ),
    "AutoencoderKLWan": _diffusers(
        "vae", models.WanVAE, models.WanVAEConfig.from_dict, wan_vae.rules
    ),
    "CLIPTextModel": _transformers(
        "text_encoder_2",
        models.CLIPTextEncoder,
        models.CLIPTextConfig.from_dict,
        clip.text_rules,
        clip.TEXT_UNUSED,
    ),
    "CLIPVisionModel": _CLIP_VISION,
    "CLIPVisionModelWithProjection": _CLIP_VISION,
    "CogVideoXTransformer3DModel": _diffusers(
        "transformer",
        models.CogVideoXTransformer,
        models.CogVideoXConfig.from_dict,
        cogvideox.rules,
        cogvideox.UNUSED,
    ),
    "HunyuanVideoTransformer3DModel": _diffusers(
        "transformer",
        models.HunyuanVideoTransformer,
        models.HunyuanVideoConfig.from_dict,
        hunyuan_video.rules,
    ),
    "LlamaModel": _transformers(
        "text_encoder", models.LlamaEncoder, models.LlamaConfig.from_dict, llama.rules, llama.UNUSED
    ),
    "LlavaForConditionalGeneration": _transformers(
        "text_encoder", models.LlavaEncoder, models.LlavaConfig.from_dict, llava.rules, llama.UNUSED
    ),
    "T5EncoderModel": _transformers(
        "text_encoder",
        models.T5Encoder,
        partial(models.T5Config.from_dict, model_type="t5"),
        t5.rules,
        t5.UNUSED,
    ),
    "UMT5EncoderModel": _transformers(
        "text_encoder",
        models.T5Encoder,
        partial(models.T5Config.from_dict, model_type="umt5"),
        t5.rules,
        t5.UNUSED,
    ),
    "WanTransformer3DModel": _diffusers(
        "transformer", models.WanTransformer, models.WanConfig.from_dict, wan.rules, wan.UNUSED
    ),
}


def classes_of(role: str) -> tuple[str, ...]:
    """Name the classes that have a role in pipelines."""
    return tuple(name for name, of in MODEL_CLASSES.items() if of.role == role)
