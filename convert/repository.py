"""The folder of an original release, as the pipeline that diffusers made of it.

Wan-AI's layout (Wan-Video/Wan2.1, wan/configs): the transformer's safetensors and the authors'
config.json at the top, a file of torch.save for each other part, the tokenizer in a folder. What
diffusers' release has beside that (model_index.json, the scheduler's and the image processor's
settings) is written here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax.convert.components import PipelineIndex
from svg_jax.convert.reader import read_weights

# Of each part but the transformer: its class in model_index.json, and where it is.
_PARTS = {
    "vae": ("AutoencoderKLWan", "Wan2.1_VAE.pth"),
    "text_encoder": ("UMT5EncoderModel", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("T5TokenizerFast", "google/umt5-xxl"),
    "image_encoder": (
        "CLIPVisionModel",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ),
}
_TRANSFORMER, _SCHEDULER = "WanTransformer3DModel", "UniPCMultistepScheduler"
_OF_IMAGES, _OF_TWO_IMAGES = "img_emb.proj.1.weight", "img_emb.emb_pos"  # tensors
# As diffusers has it; the authors resize images to a square, whatever their proportions.
_IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclass(frozen=True)
class Repository:
    """A release's folder, read as a pipeline.

    Attributes:
        index: What its model_index.json would say.
        places: The folder or file that each component is in, be it there or not.
        texts: What diffusers' release has and this one has not, by its path there.
    """

    index: PipelineIndex
    places: Mapping[str, Path]
    texts: Mapping[str, str]


def read_repository(folder: Path, allowed: Iterable[Path] = ()) -> Repository | None:
    """Recognises a release of Wan 2.1 by its files' names; its transformer tells which it is.

    Args:
        folder: The folder.
        allowed: See `reader.read_weights`.

    Returns:
        The pipeline; None if less than two of its parts are there: one is a component alone.

    Raises:
        ConversionError: If the transformer is missing or damaged.
    """
    places = {name: folder / where for name, (_, where) in _PARTS.items()}
    there = [place.exists() for place in places.values()]
    if sum([*there, any(folder.glob("diffusion_pytorch_model*.safetensors*"))]) < 2:
        return None
    tensors = read_weights(folder, allowed)
    classes = {name: class_name for name, (class_name, _) in _PARTS.items()}
    classes |= {"transformer": _TRANSFORMER, "scheduler": _SCHEDULER}
    scheduler = {
        "_class_name": _SCHEDULER,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": _flow_shift(tensors, folder),
    }
    settings = {"scheduler/scheduler_config.json": scheduler}
    if _OF_IMAGES in tensors:
        pipeline = "WanImageToVideoPipeline"
        classes["image_processor"] = _IMAGE_PROCESSOR["image_processor_type"]
        settings["image_processor/preprocessor_config.json"] = _IMAGE_PROCESSOR
    else:
        pipeline = "WanPipeline"
        del places["image_encoder"], classes["image_encoder"]
    index = PipelineIndex(pipeline, dict(sorted(classes.items())))
    texts = {name: json.dumps(values, indent=2) + "\n" for name, values in settings.items()}
    places["transformer"] = folder
    return Repository(index, places, {"model_index.json": index.text, **texts})


def _flow_shift(tensors: Iterable[str], folder: Path) -> float:
    """The schedule's shift, of which no file of a release says anything.

    It is as in diffusers' scripts/convert_wan_to_diffusers.py: 3, and 16 for first and last frame.
    But image to video of 720p has 5, as by its authors; only the repository's name tells it from
    that of 480p.
    """
    if _OF_TWO_IMAGES in tensors:
        return 16.0
    folder = folder.resolve()
    name = folder.parents[1].name if folder.parent.name == "snapshots" else folder.name
    return 5.0 if _OF_IMAGES in tensors and "720p" in name.lower() else 3.0
