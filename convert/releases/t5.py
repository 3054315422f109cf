"""T5's and UMT5's encoders as single files, which other programs store without a config.json.

The names are transformers' own. The shapes give the config, and the rest is as in `T5Config`: these
are the encoders of CogVideoX (T5 v1.1 XXL) and Wan (UMT5 XXL), as ComfyUI repacks them.
"""

from functools import partial
from typing import Any

from svg_jax.convert.releases.renaming import Layout, Shapes, count_layers
from svg_jax.convert.tables.t5 import UNUSED

_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


def _config(model_type: str, shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of an encoder off its shapes; `model_type` is "t5" or "umt5"."""
    layer = "encoder.block.0.layer"
    buckets, heads = shapes[_BIAS.format(0)]
    vocabulary, width = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{layer}.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{layer}.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_layers(shapes, "encoder.block.{}.layer.0.layer_norm.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


T5 = Layout(_BIAS.format(0), partial(_config, "t5"), unused=UNUSED)
# Only UMT5 has a bias in each layer.
UMT5 = Layout(_BIAS.format(1), partial(_config, "umt5"), unused=UNUSED)
