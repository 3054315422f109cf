"""PyTorch's attention for the benchmark: dense by cuDNN, and FlexAttention on a band mask."""

import time
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from svg_jax.kernels import BandMask

CUDA = torch.cuda.is_available()


def wait(value: Any) -> None:
    """Until the device is idle, whoever gave it the work."""
    jax.block_until_ready(value)
    if CUDA:
        torch.cuda.synchronize()


def torch_versions() -> dict[str, str]:
    """Of PyTorch and of the cuDNN that it runs."""
    return {"torch": torch.__version__, "torch's cuDNN": str(torch.backends.cudnn.version())}


def mask_rule(mask: BandMask) -> Callable[..., Any]:
    """`BandMask.keep` with all text real, without the terms that this mask has no use for."""
    band, sink = mask.band_width, mask.sink_tokens
    start, stop = mask.text_start, mask.text_stop

    def in_band(batch, head, query, key):
        return (query - key).abs() < band

    def band_or_sink(batch, head, query, key):
        return in_band(batch, head, query, key) | (key < sink)

    def band_or_text(batch, head, query, key):
        text = ((query >= start) & (query < stop)) | ((key >= start) & (key < stop))
        return in_band(batch, head, query, key) | text

    def band_text_or_sink(batch, head, query, key):
        return band_or_text(batch, head, query, key) | (key < sink)

    if mask.text_tokens:
        return band_text_or_sink if sink else band_or_text
    return band_or_sink if sink else in_band


def torch_functions(mask: BandMask, heads: int, head_dim: int) -> dict[str, Callable[[], Any]]:
    """Dense and masked attention of random bfloat16 arrays."""
    device = "cuda" if CUDA else "cpu"
    shape = (1, heads, mask.num_tokens, head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    backend = SDPBackend.CUDNN_ATTENTION if CUDA else SDPBackend.MATH
    torch.compiler.reset()  # else another shape would make dynamic, slower code of it
    flex: Any = torch.compile(flex_attention, dynamic=False)
    made: list[Any] = []

    def dense():
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value)

    def sparse():
        if not made:
            started = time.perf_counter()
            tokens = mask.num_tokens
            # Compiled, it never holds the S×S mask.
            make: Any = torch.compile(create_block_mask, dynamic=False)
            made.append(make(mask_rule(mask), None, None, tokens, tokens, device=device))
            print(f"  block mask: {time.perf_counter() - started:.1f} s", flush=True)
        return flex(query, key, value, block_mask=made[0])

    return {"torch SDPA, cuDNN": dense, "torch FlexAttention": sparse}
