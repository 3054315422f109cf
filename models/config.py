"""Reading a released config.json strictly: nothing unknown, mistyped or unimplemented gets by."""

import contextlib
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from reprlib import repr  # short, whatever stands in a file
from typing import Any, TypeVar

Config = TypeVar("Config")
_NAMED = 5  # unknown keys that an error spells out

# What libraries and trainers note in the config.json of any model, of no consequence for what its
# layers compute: notes on its files, on training, and on writing texts.
NOTES = frozenset(
    {
        *("architectures", "auto_map", "dtype", "torch_dtype", "tokenizer_class"),
        *("transformers_version", "use_cache", "use_bfloat16", "torchscript", "tf_legacy_loss"),
        *("gradient_checkpointing", "use_gradient_checkpointing", "initializer_factor"),
        *("initializer_range", "tie_word_embeddings", "tie_encoder_decoder", "finetuning_task"),
        *("attention_dropout", "attention_probs_dropout_prob", "dropout", "hidden_dropout"),
        *("hidden_dropout_prob", "activation_dropout", "classifier_dropout"),
        *("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "prefix"),
        *("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "max_length", "min_length", "max_new_tokens", "do_sample"),
        *("early_stopping", "num_beams", "num_beam_groups", "num_return_sequences"),
        *("diversity_penalty", "repetition_penalty", "length_penalty", "temperature", "top_k"),
        *("top_p", "typical_p", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("output_scores", "return_dict_in_generate", "remove_invalid_values"),
        "exponential_decay_length_penalty",
        # Of a moving average, which diffusers' EMAModel saves with the weights.
        *("decay", "min_decay", "inv_gamma", "power", "use_ema_warmup"),
        *("optimization_step", "update_after_step"),
    }
)
# The same where they have this value; any other changes what a model computes.
_NOTES_WITH_VALUE: Mapping[str, Any] = types.MappingProxyType(
    {
        "add_cross_attention": False,
        "cross_attention_hidden_size": None,
        "pruned_heads": {},
        "quantization_config": None,
    }
)


def read_config(
    config: type[Config],
    values: Mapping[str, Any],
    *,
    ignored: Collection[str] = (),
    only: Mapping[str, Any] = types.MappingProxyType({}),
) -> Config:
    """Makes a config dataclass from a parsed config.json.

    Args:
        config: The dataclass; its field names are the file's keys.
        values: The parsed file. Keys that begin with "_" are the writing library's notes to itself.
        ignored: Keys that, as those of `NOTES`, say nothing about what the model computes.
        only: Keys that are no fields, with the value that they must have where they stand: they
            tell other models.

    Raises:
        ValueError: On unknown keys or values of another type than the field's.
    """
    kinds = typing.get_type_hints(config)
    only = {**_NOTES_WITH_VALUE, **only}
    for name in only.keys() & values.keys():
        if values[name] != only[name]:
            raise ValueError(
                f"{config.__name__}: {name}={repr(values[name])} is not implemented, only "
                f"{only[name]!r}."
            )
    passed_over = {*ignored, *only, *(NOTES - kinds.keys())}
    values = {k: v for k, v in values.items() if not k.startswith("_") and k not in passed_over}
    if unknown := sorted(values.keys() - kinds.keys()):
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise ValueError(
            f"{config.__name__}: unknown keys {unknown[:_NAMED]!r:.200}{more}; this is the config "
            "of another model or of a newer version than the one implemented."
        )
    for name, value in values.items():
        try:
            values[name] = _typed(value, kinds[name])
        except TypeError:
            raise ValueError(f"{config.__name__}: {name} cannot be {repr(value)}.") from None
    return config(**values)


def _typed(value: Any, kind: Any) -> Any:
    """The value as one of its field's type; TypeError where JSON's is another."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and type(value) in (list, tuple):
        endless = parts[-1] is Ellipsis
        kinds = [parts[0]] * len(value) if endless else parts
        if len(kinds) != len(value):
            raise TypeError
        return tuple(_typed(part, kind) for part, kind in zip(value, kinds, strict=True))
    if isinstance(kind, types.UnionType):
        for part in parts:
            with contextlib.suppress(TypeError):
                return _typed(value, part)
        raise TypeError
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def check_config(config: Any, only: Mapping[str, Any]) -> None:
    """Refuses what no model has and what is not implemented.

    Args:
        config: A config dataclass.
        only: Fields of which a single value is implemented, with that value.

    Raises:
        ValueError: On another value than that, or sizes below one.
    """
    name = type(config).__name__
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in only:
            if value != only[field.name]:
                raise ValueError(
                    f"{name}: {field.name}={repr(value)} is not implemented, only "
                    f"{only[field.name]!r}."
                )
        elif any(type(size) is int and size < 1 for size in _sizes(value)):
            raise ValueError(f"{name}: {field.name} must be at least 1, not {repr(value)}.")


def _sizes(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)
