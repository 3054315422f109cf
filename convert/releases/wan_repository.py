"""The folder of an original release of Wan, read as diffusers' pipeline.

Wan-AI's layout (Wan-Video/Wan2.1 and Wan2.2, wan/configs): the transformer's safetensors and the
authors' config.json at the top, or in one folder each for two transformers; a file of torch.save
for each other part; the tokenizer in a folder. The other files of diffusers' release
(model_index.json, settings of scheduler and image processor) are made here, as by diffusers'
scripts/convert_wan_to_diffusers.py.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svg_jax.convert.components import PipelineIndex
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.stored_tensor import StoredTensor
from svg_jax.convert.sources.files import SourceFiles
from svg_jax.convert.sources.weights import named_files

_CLIP = "open-clip-xlm-roberta-large-vit-huge-14"
# The class in model_index.json and the place of each part but the transformer.
_PARTS = {
    "vae": ("AutoencoderKLWan", "Wan2.1_VAE.pth"),
    "text_encoder": ("UMT5EncoderModel", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("T5TokenizerFast", "google/umt5-xxl"),
    "image_encoder": ("CLIPVisionModel", f"models_clip_{_CLIP}.pth"),
}
_TIMES_BY_TOKEN_VAE = "Wan2.2_VAE.pth"  # in place of 2.1's: TI2V-5B
_EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}  # A14B
_TRANSFORMER, _SCHEDULER = "WanTransformer3DModel", "UniPCMultistepScheduler"
_OF_IMAGES, _OF_TWO_IMAGES = "img_emb.proj.1.weight", "img_emb.emb_pos"  # tensors
_INPUT, _OUTPUT = "patch_embedding.weight", "head.head.weight"
# As in diffusers; the authors resize images to a square, whatever their proportions.
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


def read_repository(
    folder: Path, files: SourceFiles, allowed: Iterable[Path] = ()
) -> tuple[PipelineIndex, dict[str, Path], dict[str, str]] | None:
    """Recognise a release of Wan by the names of its files, and its task by the transformer.

    Args:
        folder: Folder of the release.
        files: Files of the source that were read before.
        allowed: See `weights.read_weights`.

    Returns:
        Contents of diffusers' model_index.json, the folder or file of each component, whether it
        exists or not, and the contents of the files that only diffusers' release has, by their
        paths there; None if fewer than two parts are there, since one is a component alone.

    Raises:
        ConversionError: If the transformer is missing or damaged.
    """
    parts = {name: folder / where for name, (_, where) in _PARTS.items()}
    by_token = (folder / _TIMES_BY_TOKEN_VAE).exists()
    if by_token:
        parts["vae"] = folder / _TIMES_BY_TOKEN_VAE
    experts = {name: folder / where for name, where in _EXPERTS.items()}
    two = any(place.is_dir() for place in experts.values())
    one = any(folder.glob("diffusion_pytorch_model*.safetensors*"))
    if sum([one or two, *(place.exists() for place in parts.values())]) < 2:
        return None
    transformers = experts if two else {"transformer": folder}
    place = transformers["transformer"]
    if not named_files(place, None):
        raise ConversionError(
            f"{place}: holds no diffusion_pytorch_model.safetensors of the transformer, nor an "
            "index of shards: fetch it."
        )
    tensors = files.weights(place, allowed, None)

    classes = {name: class_name for name, (class_name, _) in _PARTS.items()}
    classes |= {"scheduler": _SCHEDULER, **dict.fromkeys(transformers, _TRANSFORMER)}
    scheduler = {
        "_class_name": _SCHEDULER,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 5.0 if by_token else _flow_shift(tensors, folder),
    }
    settings_files = {"scheduler/scheduler_config.json": scheduler}
    if _OF_IMAGES in tensors:
        classes["image_processor"] = _IMAGE_PROCESSOR["image_processor_type"]
        settings_files["image_processor/preprocessor_config.json"] = _IMAGE_PROCESSOR
    else:
        del parts["image_encoder"], classes["image_encoder"]
    of_image = _is_of_image(tensors)
    settings: dict[str, Any] = {"expand_timesteps": True} if by_token else {}
    if two:
        settings["boundary_ratio"] = 0.9 if of_image else 0.875
    pipeline = "WanImageToVideoPipeline" if of_image else "WanPipeline"
    index = PipelineIndex(pipeline, dict(sorted(classes.items())))
    texts = {name: json.dumps(values, indent=2) + "\n" for name, values in settings_files.items()}
    texts["model_index.json"] = index.text(**settings)
    return index, {**parts, **transformers}, texts


def _is_of_image(tensors: Mapping[str, StoredTensor]) -> bool:
    """Tell whether videos start from an image, whose latents and mask are further channels."""
    if not {_INPUT, _OUTPUT} <= tensors.keys():
        return False  # another model, which is refused when it is read
    _, channels, *patch = tensors[_INPUT].shape
    return channels * math.prod(patch) > tensors[_OUTPUT].shape[0]


def _flow_shift(tensors: Iterable[str], folder: Path) -> float:
    """Choose the schedule's shift, which no file of a release contains.

    As in diffusers' script it is 3, and 16 for first and last frame. But image to video in 720p has
    its authors' 5; only the repository's name tells it from the one in 480p.
    """
    if _OF_TWO_IMAGES in tensors:
        return 16.0
    folder = folder.resolve()
    name = folder.parents[1].name if folder.parent.name == "snapshots" else folder.name
    return 5.0 if _OF_IMAGES in tensors and "720p" in name.lower() else 3.0
