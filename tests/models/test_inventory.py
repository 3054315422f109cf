"""The ports at full size: exactly the parameters of the released checkpoints, and no allocation."""

import itertools
import json
import math
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from sizes import slow_but

from svg_jax.convert.components import match_component, split_unused
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.convert.tables.rules import Rule, match_rules
from svg_jax.models import HunyuanVideoVAE

INVENTORIES = Path(__file__).parents[2] / "inventories"
COGVIDEOX = [
    "cogvideox-2b-transformer",
    "cogvideox-5b-transformer",
    "cogvideox-5b-i2v-transformer",
    "cogvideox-1.5-5b-transformer",
    "cogvideox-1.5-5b-i2v-transformer",
]
# With as many text tokens as the pipelines give them.
HUNYUAN_VIDEO = {
    "hunyuanvideo-t2v-transformer": 256,
    "hunyuanvideo-i2v-16ch-transformer": 396,
    "hunyuanvideo-i2v-33ch-transformer": 540,
}
WAN = [
    "wan2.1-t2v-1.3b-transformer",
    "wan2.1-t2v-14b-transformer",
    "wan2.1-i2v-14b-transformer",
    "wan2.1-flf2v-14b-transformer",
    "wan2.2-i2v-a14b-transformer",
    "wan2.2-ti2v-5b-transformer",
]
HUNYUAN_VIDEO_VAE = "hunyuanvideo-vae"
T5 = ["t5-v1_1-xxl-encoder", "umt5-xxl-encoder"]
ENCODERS = [*T5, "clip-l-text", "clip-vit-h-vision", "llama3-8b-encoder", "llava-llama3-8b"]
COGVIDEOX_VAE = ["cogvideox-2b-vae", "cogvideox-5b-vae", "cogvideox1.5-5b-vae"]
WAN_VAE = ["wan2.1-vae", "wan2.2-ti2v-5b-vae"]
VAES = [*COGVIDEOX_VAE, HUNYUAN_VIDEO_VAE, *WAN_VAE]
# What transformers of several versions writes before the names of an encoder's parts.
PREFIXES = {
    "clip-l-text": [{"text_model.": ""}],
    "clip-vit-h-vision": [{"vision_model.": ""}],
    "llama3-8b-encoder": [{"": "model."}],
    "llava-llama3-8b": [
        {"": "", "vision_tower.vision_model.": "vision_tower."},
        {
            "vision_tower.vision_model.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
            "language_model.model.": "model.language_model.",
        },
    ],
}


@cache
def read(name):
    """Class, config, and shape by name of every tensor that is used."""
    inventory = json.loads((INVENTORIES / f"{name}.json").read_text())
    shapes = {}
    for pattern, shape in inventory["tensors"].items():
        ranges = [range(int(a), int(b) + 1) for a, b in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
        for numbers in itertools.product(*ranges):
            filled = iter(numbers)
            full_name = re.sub(r"\{.*?\}", lambda _, filled=filled: str(next(filled)), pattern)
            shapes[full_name] = tuple(shape)
    assert len(shapes) == inventory["num_tensors"]
    assert sum(map(math.prod, shapes.values())) == inventory["num_params"]
    model_class = MODEL_CLASSES[inventory["class"]]
    rules = model_class.rules(model_class.read_config(inventory["config"]))
    used, _ = split_unused(shapes, rules, model_class.unused, Path(name))
    return inventory["class"], inventory["config"], used


@cache
def port(name) -> tuple[Any, tuple[Rule, ...]]:
    """Abstract module and rules of an inventory's config."""
    class_name, config, _ = read(name)
    model_class = MODEL_CLASSES[class_name]
    config = model_class.read_config(config)
    module = nnx.eval_shape(lambda: model_class.module(config, rngs=nnx.Rngs(0)))
    return module, model_class.rules(config)


def leaf_shapes(module):
    flat, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {".".join(str(key.key) for key in path): leaf.shape for path, leaf in flat}


ONE_OF_EACH_VAE = [COGVIDEOX_VAE[0], HUNYUAN_VIDEO_VAE, WAN_VAE[0]]
OTHER_VAES = [name for name in VAES if name not in ONE_OF_EACH_VAE]
ALL_BUT_THEM = [*COGVIDEOX, *HUNYUAN_VIDEO, *WAN, *ONE_OF_EACH_VAE, *ENCODERS]


@pytest.mark.parametrize("name", slow_but(ALL_BUT_THEM, [*ALL_BUT_THEM, *OTHER_VAES]))
def test_every_released_tensor_has_its_place_and_every_parameter_its_tensor(name):
    module, rules = port(name)
    *_, shapes = read(name)
    placed = {leaf.rule.target: leaf.shape for leaf in match_rules(shapes, rules)}
    assert placed == leaf_shapes(module)
    assert sum(map(math.prod, placed.values())) == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("name", ALL_BUT_THEM)
def test_a_dropped_renamed_or_misshapen_tensor_does_not_fit(name):
    _, rules = port(name)
    *_, shapes = read(name)
    some = rules[:: len(rules) // 50 or 1]  # of a table that is as long as its layers are many
    for victim in (rule.names_of((rule.layers or 1) - 1)[0] for rule in some):
        dropped = {k: v for k, v in shapes.items() if k != victim}
        for wrong in (dropped, {**dropped, f"{victim}_": shapes[victim]}, {**shapes, victim: (7,)}):
            with pytest.raises(ConversionError, match=re.escape(victim)):
                match_rules(wrong, rules)


@pytest.mark.parametrize("name", T5)
def test_tied_token_embeddings_may_be_stored_under_either_name_or_both(name):
    _, rules = port(name)
    *_, shapes = read(name)
    other = {**shapes, "encoder.embed_tokens.weight": shapes["shared.weight"]}
    for stored in (other, {k: v for k, v in other.items() if k != "shared.weight"}):
        assert len(match_rules(stored, rules)) == len(rules)


@pytest.mark.parametrize("name", PREFIXES)
def test_an_encoders_tensors_may_be_stored_under_any_of_its_prefixes(name):
    _, rules = port(name)
    *_, shapes = read(name)
    expected = {leaf.rule.target: leaf.shape for leaf in match_rules(shapes, rules)}
    for changes in PREFIXES[name]:
        stored = {}
        for tensor, shape in shapes.items():
            old = max((p for p in changes if tensor.startswith(p)), key=len)
            stored[changes[old] + tensor.removeprefix(old)] = shape
        assert stored.keys() != shapes.keys()
        assert {leaf.rule.target: leaf.shape for leaf in match_rules(stored, rules)} == expected


def test_tensors_that_the_released_class_ignores_are_in_no_leaf(tmp_path):
    class_name, values, shapes = read("wan2.1-i2v-14b-transformer")
    config = MODEL_CLASSES[class_name].read_config(values)
    leaves = match_component(tmp_path, class_name, config, shapes)
    ignored = {f"blocks.{layer}.attn2.norm_added_q.weight": (5120,) for layer in range(40)}
    assert match_component(tmp_path, class_name, config, shapes | ignored) == leaves
    other = {"blocks.0.attn1.norm_added_q.weight": (5120,)}
    with pytest.raises(ConversionError, match="1 unexpected"):
        match_component(tmp_path, class_name, config, shapes | other)


ENCODER_INPUTS = {
    "t5-v1_1-xxl-encoder": ((2, 226), (2, 226, 4096)),
    "umt5-xxl-encoder": ((2, 512), (2, 512, 4096)),
    "clip-l-text": ((2, 77), (2, 77, 768)),
    "clip-vit-h-vision": ((2, 3, 224, 224), (2, 257, 1280)),
    "llama3-8b-encoder": ((2, 351), (2, 351, 4096)),
    "llava-llama3-8b": ((2, 934), (2, 934, 4096)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_full_size_encoder_gives_features_of_every_token(name):
    module, _ = port(name)
    shape, expected = ENCODER_INPUTS[name]
    kind = jnp.float32 if name == "clip-vit-h-vision" else jnp.int32
    inputs = [jax.ShapeDtypeStruct(shape, kind)]
    if name == "llava-llama3-8b":
        inputs.append(jax.ShapeDtypeStruct((2, 3, 336, 336), jnp.float32))
    graph, state = nnx.split(module)

    def forward(state, *inputs):
        return nnx.merge(graph, state)(*inputs)

    features = jax.eval_shape(forward, state, *inputs)
    if name == "clip-l-text":
        features, pooled = features
        assert pooled.shape == (2, 768)
    assert features.shape == expected


@pytest.mark.parametrize("name", COGVIDEOX)
def test_a_full_size_forward_pass_has_the_shapes_of_its_input(name):
    module, _ = port(name)
    config = module.config
    grid = (22, 96, 170) if config.patch_size_t else (13, 60, 90)
    latents = jax.ShapeDtypeStruct((2, grid[0], config.in_channels, *grid[1:]), jnp.float32)
    text = jax.ShapeDtypeStruct((2, 226, config.text_embed_dim), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.int32)
    ofs = jax.ShapeDtypeStruct((2,), jnp.float32) if config.ofs_embed_dim else None

    graph, state = nnx.split(module)

    def forward(state, latents, text, times, ofs):
        return nnx.merge(graph, state)(latents, text, times, ofs=ofs)

    velocity, info = jax.eval_shape(forward, state, latents, text, times, ofs)
    assert velocity.shape == (2, grid[0], config.out_channels, *grid[1:])
    assert info is None


@pytest.mark.parametrize("name", WAN)
def test_a_full_size_forward_pass_of_wan_has_the_shapes_of_its_input(name):
    module, _ = port(name)
    config = module.config
    size = (31, 44, 80) if name.startswith("wan2.2-ti2v") else (21, 90, 160)
    latents = jax.ShapeDtypeStruct((2, config.in_channels, *size), jnp.float32)
    text = jax.ShapeDtypeStruct((2, 512, config.text_dim), jnp.float32)
    image = None
    if config.image_dim is not None:
        tokens = config.pos_embed_seq_len or 257
        image = jax.ShapeDtypeStruct((2, tokens, config.image_dim), jnp.float32)
    tokens = module.layout(*size).num_tokens
    graph, state = nnx.split(module)

    def forward(state, latents, text, times, image):
        model = nnx.merge(graph, state)
        return model(latents, text, times, encoder_hidden_states_image=image)

    for shape in ((2,), (2, size[0]), (2, tokens)):
        times = jax.ShapeDtypeStruct(shape, jnp.float32)
        velocity, info = jax.eval_shape(forward, state, latents, text, times, image)
        assert velocity.shape == (2, config.out_channels, *size)
        assert info is None


@pytest.mark.parametrize("name", HUNYUAN_VIDEO)
def test_a_full_size_forward_pass_of_hunyuan_video_has_the_shapes_of_its_input(name):
    module, _ = port(name)
    config, size, text_tokens = module.config, (33, 90, 160), HUNYUAN_VIDEO[name]
    assert module.layout(*size, text_tokens).num_tokens == 118_800 + text_tokens
    inputs = {
        "hidden_states": (2, config.in_channels, *size),
        "encoder_hidden_states": (2, text_tokens, config.text_embed_dim),
        "timestep": (2,),
        "pooled_projections": (2, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        inputs["guidance"] = (2,)
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in inputs.items()}
    inputs["text_length"] = jax.ShapeDtypeStruct((2,), jnp.int32)
    graph, state = nnx.split(module)

    def attend(query, key, value, *, layer, **context):
        return value, layer

    def forward(state, inputs):
        return nnx.merge(graph, state)(**inputs, attend=attend)

    velocity, info = jax.eval_shape(forward, state, inputs)
    assert velocity.shape == (2, config.out_channels, *size)
    assert info.shape == (60,)


def test_a_full_size_cogvideox_vae_has_the_shapes_of_its_input():
    module, _ = port(COGVIDEOX_VAE[0])
    graph, state = nnx.split(module)
    latents = jax.ShapeDtypeStruct((1, 16, 21, 96, 170), jnp.float32)
    video = jax.eval_shape(lambda state, x: nnx.merge(graph, state).decode(x), state, latents)
    assert video.shape == (1, 3, 81, 768, 1360)
    posterior = jax.eval_shape(lambda state, x: nnx.merge(graph, state).encode(x), state, video)
    assert posterior.mean.shape == latents.shape


@pytest.mark.parametrize("name", WAN_VAE)
def test_a_full_size_video_goes_through_the_vae_of_wan_and_back(name):
    vae, _ = port(name)
    config = vae.config
    graph, state = nnx.split(vae)
    factor = config.scale_factor_spatial
    video = jax.ShapeDtypeStruct((1, 3, 81, 720 // factor * factor, 1280), jnp.float32)
    latents = jax.eval_shape(lambda state, x: nnx.merge(graph, state).encode(x), state, video).mean
    assert latents.shape == (1, config.z_dim, 21, 720 // factor, 1280 // factor)
    decoded = jax.eval_shape(lambda state, x: nnx.merge(graph, state).decode(x), state, latents)
    assert decoded == video


def test_a_full_size_pass_of_the_vae_of_hunyuan_video_has_the_shapes_of_its_input():
    module, _ = port(HUNYUAN_VIDEO_VAE)
    graph, state = nnx.split(module)
    video = jax.ShapeDtypeStruct((1, 3, 17, 720, 1280), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 16, 5, 90, 160), jnp.float32)
    encode = partial(HunyuanVideoVAE.encode, frame_tiling=None)
    posterior = jax.eval_shape(lambda state, x: encode(nnx.merge(graph, state), x), state, video)
    assert posterior.mean.shape == posterior.log_variance.shape == latents.shape
    decode = partial(HunyuanVideoVAE.decode, frame_tiling=None)
    out = jax.eval_shape(lambda state, x: decode(nnx.merge(graph, state), x), state, latents)
    assert out.shape == video.shape
