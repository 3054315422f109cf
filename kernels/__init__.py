"""Attention kernels: arrays in, arrays out, nothing of videos."""

if __name__ != "svg_jax.kernels":
    raise ImportError(
        f"import svg_jax.kernels, not {__name__}: install the project with `pip install -e .`"
    )

from svg_jax.kernels.attention import (
    Implementation,
    block_list_attention,
    block_sparse_attention,
    pick_implementation,
    sparse_attention_pays,
)
from svg_jax.kernels.block_mask import BandMask, BlockMap, block_map, kept_pairs
from svg_jax.kernels.dense import dense_attention
from svg_jax.kernels.permute import transpose_tokens
from svg_jax.kernels.sampled_rows import sampled_attention
from svg_jax.kernels.sharding import on_each_device

__all__ = [
    "BandMask",
    "BlockMap",
    "Implementation",
    "block_list_attention",
    "block_map",
    "block_sparse_attention",
    "dense_attention",
    "kept_pairs",
    "on_each_device",
    "pick_implementation",
    "sampled_attention",
    "sparse_attention_pays",
    "transpose_tokens",
]
