"""A tiny CogVideoX with words of its own, and options by which it runs quickly."""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 3,
    "out_channels": 3,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 12,
    "sample_frames": 4,
    "temporal_compression_ratio": 1,
    "max_text_seq_length": 8,
    "use_rotary_positional_embeddings": True,
}
T5 = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 1,
    "vocab_size": 8,
    "feed_forward_proj": "gated-gelu",
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
}
QUICK = ["--steps", "4", "--guidance-scale", "1", "--density", "0.6", "--sampled-rows", "4"]
PROMPT = ["--prompt", "a red cat"]


def write_checkpoint(folder: Path, vae: tuple[str | None, str | None] = (None, None)) -> Path:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(**TRANSFORMER)
    encoder = transformers.T5EncoderModel(transformers.T5Config(**T5))
    for module in (transformer, encoder):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    transformer.save_pretrained(folder / "transformer")
    encoder.save_pretrained(folder / "text_encoder")
    diffusers.CogVideoXDDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "cat"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(words[:3])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    index = {
        "_class_name": "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": vae,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def is_one_sentence(text: str) -> bool:
    return len(text.strip().splitlines()) == 1 and text.startswith("svg-jax: ")
