"""Components in an original release's layout compute what diffusers' do, on random weights.

A tiny module of diffusers is put under the release's names by what the authors' conversion, or
diffusers' own, says of the tensors of the release; and read from a file as the release's.
"""

from dataclasses import dataclass, field
from typing import Any

import cogvideox_family
import diffusers
import hunyuan_video_family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import wan_family
from originals import as_released, converted, load, origins
from parity import TOLERANCE, randomised, relative_error
from safetensors.torch import save_file
from sizes import slow_but
from transformer_family import Family, our_velocity

from svg_jax.models import CogVideoXVAE, HunyuanVideoVAE, WanVAE


@dataclass(frozen=True)
class Case:
    """A release of a component, made tiny.

    Attributes:
        reference: diffusers' class.
        values: Its config.
        ours: The class here.
        places: What `originals.origins` gives for it; empty if the release has its names.
        given: What the release's tensors do not tell of a config that is not the release's.
        file: The file's name, and the tree that the tensors lie in, if they do.
        prefix: Prefix of the names in the file.
        others: Tensors that the release has and no model.
        family: Family of a transformer; None for an autoencoder.
        sizes: What the family makes inputs of, or a video's frames, height and width.
    """

    reference: Any
    values: dict[str, Any]
    ours: Any
    places: dict[str, list]
    sizes: tuple
    given: dict[str, Any] = field(default_factory=dict)
    file: tuple[str, ...] = ("model.safetensors",)
    prefix: str = ""
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)
    family: Family | None = None


def cogvideox_places(name, **more):
    """What the authors' conversion does to one layer, of two; and `more` modules of a name each."""
    places = load("original", "cogvideox_renames")["targets"][name]
    first = "transformer_blocks.0."
    for new, (old, *runs) in list(places.items()):
        if new.startswith(first):
            place = [old.replace(".0.", ".1.", 1), *runs]
            places[new.replace(first, "transformer_blocks.1.")] = place
    for new, old in more.items():
        places |= {f"{new}.{kind}": [f"{old}.{kind}"] for kind in ("weight", "bias")}
    return places


def cogvideox_case(places, size, others=(), **values):
    values = cogvideox_family.V5B | {"in_channels": 16, "out_channels": 16, **values}
    told = ("sample_width", "sample_height", "sample_frames", "max_text_seq_length")
    return Case(
        cogvideox_family.FAMILY.reference,
        values,
        cogvideox_family.FAMILY.model,
        places,
        (size,),
        {name: values[name] for name in told},
        ("mp_rank_00_model_states.pt", "module"),
        "model.diffusion_model.",
        dict(others),
        cogvideox_family.FAMILY,
    )


def hunyuan_video_case(name, variant):
    given = {
        "rope_axes_dim": variant["rope_axes_dim"],
        "image_condition_type": variant.get("image_condition_type"),
    }
    return Case(
        hunyuan_video_family.FAMILY.reference,
        variant,
        hunyuan_video_family.FAMILY.model,
        origins(name, layers=3),
        ((3, 6, 10), 7, (3, 7)),
        given,
        ("mp_rank_00_model_states.pt", "module"),
        family=hunyuan_video_family.FAMILY,
    )


def wan_case(name, size, places=None, **values):
    heads = {"num_attention_heads": 2, "attention_head_dim": 128}  # that the release has
    del (variant := wan_family.T2V | heads | values)["rope_max_seq_len"]
    return Case(
        wan_family.FAMILY.reference,
        variant,
        wan_family.FAMILY.model,
        origins(name) | (places or {}),
        (size, "entry"),
        family=wan_family.FAMILY,
    )


I2V = {"in_channels": 9, "image_dim": 8, "added_kv_proj_dim": 256}
PATCH_T = {"patch_size_t": 2, "patch_bias": False}
OFS = {f"ofs_embedding.linear_{1 + layer // 2}": f"ofs_embed.{layer}" for layer in (0, 2)}
HUNYUAN_VIDEO_VAE = {
    "latent_channels": 3,
    "block_out_channels": (8, 8, 12, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
COGVIDEOX_VAE = {
    "block_out_channels": (8, 12, 12, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.7,
}
RELEASED = load("inventory", "wan2.2-ti2v-5b-vae")["config"]
WAN_22_VAE = RELEASED | {"base_dim": 4, "decoder_base_dim": 6}
CASES = {
    # The width tells it from 5B.
    "CogVideoX 2B": lambda: cogvideox_case(
        cogvideox_places("cogvideox-5b-i2v-transformer"),
        (3, 8, 12),
        {"mixins.pos_embed.pos_embedding": (1, 80, 1920)},
        num_attention_heads=30,
        attention_head_dim=64,
        num_layers=1,
        use_rotary_positional_embeddings=False,
    ),
    "CogVideoX 5B": lambda: cogvideox_case(
        cogvideox_places("cogvideox-5b-i2v-transformer"),
        (2, 6, 20),
        {f"mixins.pos_embed.freqs_{name}": (72, 16) for name in ("sin", "cos")},
    ),
    "CogVideoX 5B I2V": lambda: cogvideox_case(
        cogvideox_places("cogvideox-5b-i2v-transformer"),
        (3, 8, 12),
        in_channels=32,
        use_learned_positional_embeddings=True,
    ),
    "CogVideoX 1.5": lambda: cogvideox_case(
        cogvideox_places("cogvideox-1.5-5b-transformer"), (4, 6, 10), **PATCH_T
    ),
    "CogVideoX 1.5 I2V": lambda: cogvideox_case(
        cogvideox_places("cogvideox-1.5-5b-transformer", **OFS),
        (6, 2, 10),
        in_channels=32,
        ofs_embed_dim=16,
        **PATCH_T,
    ),
    "HunyuanVideo": lambda: hunyuan_video_case(
        "hunyuanvideo-t2v-transformer", hunyuan_video_family.T2V
    ),
    "HunyuanVideo I2V": lambda: hunyuan_video_case(
        "hunyuanvideo-t2v-transformer", hunyuan_video_family.REPLACE
    ),
    "HunyuanVideo I2V, 33 channels": lambda: hunyuan_video_case(
        "hunyuanvideo-i2v-33ch-transformer", hunyuan_video_family.CONCAT
    ),
    "Wan T2V": lambda: wan_case("wan2.1-t2v-1.3b-transformer", (3, 6, 10)),
    "Wan I2V": lambda: wan_case("wan2.1-i2v-14b-transformer", (3, 6, 10), **I2V),
    "Wan FLF2V": lambda: wan_case(
        "wan2.1-i2v-14b-transformer",
        (5, 2, 6),
        {"condition_embedder.image_embedder.pos_embed": ["img_emb.emb_pos"]},
        pos_embed_seq_len=10,
        **I2V,
    ),
    "CogVideoX's VAE": lambda: Case(
        diffusers.AutoencoderKLCogVideoX,
        COGVIDEOX_VAE
        | {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")},
        CogVideoXVAE,
        load("original", "cogvideox_renames")["targets"]["cogvideox-5b-vae"],
        (5, 16, 24),
        {"scaling_factor": 0.7, "norm_num_groups": 4},
        ("3d-vae.pt", "state_dict"),
        others={"loss.logvar": ()},
    ),
    "HunyuanVideo's VAE": lambda: Case(
        diffusers.AutoencoderKLHunyuanVideo,
        HUNYUAN_VIDEO_VAE,
        HunyuanVideoVAE,
        {},
        (5, 16, 24),
        {"norm_num_groups": 2},
        ("pytorch_model.pt", "state_dict"),
        "vae.",
    ),
    "Wan 2.1's VAE": lambda: Case(
        diffusers.AutoencoderKLWan,
        {"base_dim": 8},
        WanVAE,
        origins("wan2.1-vae"),
        (5, 16, 24),
        file=("Wan2.1_VAE.pth",),
    ),
    "Wan 2.2's VAE": lambda: Case(
        diffusers.AutoencoderKLWan,
        WAN_22_VAE,
        WanVAE,
        load("original", "wan22_vae_renames")["targets"],
        (5, 32, 48),
        file=("Wan2.2_VAE.pth",),
    ),
}


def write_original(folder, case, reference):
    """The reference's weights in a file of the release's layout."""
    # diffusers makes a table in float64.
    state = {name: tensor.float() for name, tensor in reference.state_dict().items()}
    tensors = as_released(state, case.places or {name: [name] for name in state})
    assert sum(map(torch.numel, tensors.values())) == sum(map(torch.numel, state.values()))
    tensors |= {name: torch.ones(shape) for name, shape in case.others.items()}
    tensors = {f"{case.prefix}{name}": tensor for name, tensor in tensors.items()}
    name, *tree = case.file
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save({tree[0]: tensors} if tree else tensors, folder / name)
    return folder / name


# One of each family's layouts and every VAE; the transformers' others repeat them.
QUICK = ["CogVideoX 2B", "CogVideoX 1.5 I2V", "HunyuanVideo I2V, 33 channels", "Wan FLF2V"]
QUICK += [name for name in CASES if name.endswith("VAE")]


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_it_computes_what_diffusers_does(tmp_path, name):
    case = CASES[name]()
    reference = randomised(case.reference(**case.values), seed=0)
    with jax.default_matmul_precision("highest"):
        model = converted(write_original(tmp_path, case, reference), case.ours, case.given)
        if case.family is None:
            pairs = vae_pairs(model, reference, case.sizes)
        else:
            pairs = [transformer_pair(case.family, case, model, reference)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        error = relative_error(ours, theirs)
        print(f"{name}: {error:.2e}")
        assert error < TOLERANCE


def transformer_pair(family, case, model, reference):
    """What ours and the reference predict."""
    inputs = family.make_inputs(case.values, *case.sizes, seed=1)
    return our_velocity(model, inputs), family.reference_velocity(reference, inputs)


def vae_pairs(model, reference, size):
    """Ours and the reference's moments of a video, and videos of latents."""
    video = np.random.default_rng(1).standard_normal((1, 3, *size)).astype(np.float32)
    with torch.no_grad():
        theirs = reference.encode(torch.tensor(video)).latent_dist
        decoded = reference.decode(theirs.mean).sample
    ours = model.encode(jnp.asarray(video))
    return [
        (ours.mean, theirs.mean.numpy()),
        (ours.log_variance, theirs.logvar.numpy()),
        (model.decode(jnp.asarray(theirs.mean.numpy())), decoded.numpy()),
    ]
