"""Write the trained tiny model as a pipeline folder in diffusers' layout (float16, pixel space).

    python examples/export_tiny.py STATE svg_jax/assets/tiny_cogvideox

STATE is what examples/train_tiny.py wrote; the average of the weights is what is exported.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tiny_data import CAPTION_TOKENS, EOS, PAD, UNKNOWN, load_assets, vocabulary
from tiny_model import SCHEDULER, TEXT_ENCODER, TRANSFORMER
from tiny_training import Parameters, TinyTrainer, load_state
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from svg_jax.convert.tables import cogvideox, t5
from svg_jax.convert.tables.rules import restore_state
from svg_jax.models.cogvideox import CogVideoXConfig
from svg_jax.models.t5 import T5Config

DIFFUSERS_VERSION = "0.42.1"  # whose layout this is

COMPONENTS = {
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": [None, None],
}


def make_tokenizer() -> Tokenizer:
    """One token a word; ends with EOS."""
    words = vocabulary()
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"$A {EOS}", pair=f"$A $B {EOS}", special_tokens=[(EOS, words[EOS])]
    )
    tokenizer.add_special_tokens([AddedToken(token) for token in (PAD, EOS, UNKNOWN)])
    return tokenizer


def export_tiny(
    parameters: Parameters,
    folder: Path,
    transformer: dict[str, Any] = TRANSFORMER,
    text_encoder: dict[str, Any] = TEXT_ENCODER,
) -> None:
    """Write the whole pipeline folder; a model card that lies there stays.

    Args:
        parameters: Parameters of the transformer and the text encoder, as in `TrainState`.
        folder: Where to.
        transformer: Its config.
        text_encoder: Its config.

    Raises:
        OverflowError: If a weight does not fit into float16.
    """
    text_config = T5Config.from_dict(text_encoder)
    config = CogVideoXConfig.from_dict(transformer)
    text_rules, rules = t5.rules(text_config), cogvideox.rules(config)
    text = restore_state(parameters["text_encoder"], text_rules)
    tensors = restore_state(parameters["transformer"], rules)

    def named(name: str, **values: Any) -> dict[str, Any]:
        return {
            "_class_name": COMPONENTS[name][1],
            "_diffusers_version": DIFFUSERS_VERSION,
            **values,
        }

    index = {"_class_name": "CogVideoXPipeline", "_diffusers_version": DIFFUSERS_VERSION}
    _write_json(folder / "model_index.json", index | COMPONENTS)
    _write_json(folder / "scheduler/scheduler_config.json", named("scheduler", **SCHEDULER))
    _write_json(folder / "transformer/config.json", named("transformer", **transformer))
    _write_json(folder / "text_encoder/config.json", text_encoder | {"dtype": "float16"})
    _write_weights(folder / "transformer/diffusion_pytorch_model.safetensors", tensors)
    _write_weights(folder / "text_encoder/model.safetensors", text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CAPTION_TOKENS}
    settings |= {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
    _write_json(folder / "tokenizer/tokenizer_config.json", settings)
    make_tokenizer().save(str(folder / "tokenizer/tokenizer.json"))


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")


def _write_weights(file: Path, tensors: dict[str, np.ndarray]) -> None:
    largest = max(float(np.abs(tensor).max()) for tensor in tensors.values())
    if not largest < float(np.finfo(np.float16).max):
        raise OverflowError(f"a weight of {largest} does not fit into float16")
    halves = {name: np.ascontiguousarray(t, np.float16) for name, t in tensors.items()}
    save_file(halves, file, metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("state", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    trainer = TinyTrainer(load_assets(), TRANSFORMER, TEXT_ENCODER, dtype=jnp.float32)
    state, record = load_state(args.state, trainer.initial_state())
    export_tiny(state.average, args.folder)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: step {record['step']}, {size / 1e6:.1f} MB")
