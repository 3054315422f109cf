"""Arguments that do not exist here, diffusers' above all, and what stands in their place."""

from collections.abc import Mapping
from types import MappingProxyType

_NOISE_LEVELS = "pass num_inference_steps, scheduler or flow_shift, which decide the noise levels"
_ATTENTION = "pass sparsity and warmup, or attend, a callable of your own"
_ONE_PROMPT = "all text encoders read {}, as in diffusers"
_LOADED_ONCE = "each part is loaded onto JAX's default device where it is used"

INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "generator": "pass seed, a whole number, or latents, the noise itself",
        "return_dict": "a call returns a VideoOutput with frames, latents and info",
        "prompt_2": _ONE_PROMPT.format("prompt"),
        "negative_prompt_2": _ONE_PROMPT.format("negative_prompt"),
        "sigmas": _NOISE_LEVELS,
        "timesteps": _NOISE_LEVELS,
        "eta": "ddim adds no noise, as in diffusers' CogVideoX",
        "guidance_scale_2": "Wan 2.2, whose second transformer it is for, has no pipeline yet",
        "prompt_template": "the released template is used",
        "image_embed_interleave": "the released value is used",
        "attention_kwargs": _ATTENTION,
        "joint_attention_kwargs": _ATTENTION,
        "cross_attention_kwargs": _ATTENTION,
        "callback_on_step_end_tensor_inputs": "callback_on_step_end takes a step's record alone",
        "torch_dtype": "pass dtype to from_pretrained",
        "device_map": _LOADED_ONCE,
        "low_cpu_mem_usage": _LOADED_ONCE,
        "use_safetensors": "files are recognised by what they hold",
        "subfolder": "svg_jax.convert.load_component loads one component of a converted folder",
        "local_files_only": "set HF_HUB_OFFLINE=1",
    }
)

# What a value of its own holds, by today's names and by those of versions before.
INSIDE_A_VALUE: Mapping[str, str] = MappingProxyType(
    {
        "density": "pass sparsity=SparsityConfig(density=…)",
        "sampled_rows": "pass sparsity=SparsityConfig(sampled_rows=…)",
        "dense_steps": "pass warmup=Warmup(steps=…)",
        "dense_layers": "pass warmup=Warmup(layers=…)",
    }
)

_IMAGES = "; pass 'uint8', and make images with PIL.Image.fromarray(frame) or an array with NumPy"
INSTEAD_OF_VALUES: Mapping[tuple[str, str], str] = MappingProxyType(
    {("output_type", "pil"): _IMAGES, ("output_type", "pt"): _IMAGES}
)
