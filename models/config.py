"""Reading a released config.json strictly: nothing unknown, mistyped or unimplemented gets by."""

import contextlib
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from reprlib import repr  # short, however long a file's value is
from typing import Any, ClassVar, TypeVar

Config = TypeVar("Config")
Value = TypeVar("Value")
SomeConfig = TypeVar("SomeConfig", bound="ModelConfig")
_NAMED = 5  # unknown keys that an error spells out

# Keys that libraries and trainers write into the config.json of any model and that change nothing
# its layers compute: notes on its files, on training, and on generating text.
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
        # diffusers' EMAModel saves these with the weights that it averaged.
        *("decay", "min_decay", "inv_gamma", "power", "use_ema_warmup"),
        *("optimization_step", "update_after_step"),
    }
)
# The same, if they have this value; any other would change what a model computes.
_NOTES_WITH_VALUE: Mapping[str, Any] = types.MappingProxyType(
    {
        "add_cross_attention": False,
        "cross_attention_hidden_size": None,
        "pruned_heads": {},
        "quantization_config": None,
    }
)


def implemented(*values: Value) -> Value:
    """Declare a field of a config of which only these values are implemented.

    Args:
        values: Values that are implemented; the first one is the default.
    """
    # Typed as its default, as `dataclasses.field` is.
    return typing.cast(
        Value, dataclasses.field(default=values[0], metadata={"implemented": values})
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of every model's config: fields named as in a released config.json, checked when made.

    Attributes:
        other_keys: Keys of the file that are not fields and change nothing that the model computes.
        fixed_keys: Keys of the file that are not fields, with the only value allowed for each: they
            tell other models.
    """

    other_keys: ClassVar[Collection[str]] = ()
    fixed_keys: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})

    def __post_init__(self) -> None:
        """Raise ValueError for a value that is not implemented, or a size below one."""
        name = type(self).__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if values := field.metadata.get("implemented"):
                if value not in values:
                    raise ValueError(
                        f"{name}: {field.name}={repr(value)} is not implemented, only "
                        f"{' and '.join(sorted(f'{each!r}' for each in values))}."
                    )
            elif any(type(size) is int and size < 1 for size in _sizes(value)):
                raise ValueError(f"{name}: {field.name} must be at least 1, not {repr(value)}.")

    @classmethod
    def from_dict(cls: type[SomeConfig], values: Mapping[str, Any]) -> SomeConfig:
        """Read a parsed config.json; ValueError on anything unknown or not implemented."""
        return read_config(cls, values, ignored=cls.other_keys, only=cls.fixed_keys)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a config.json has them, without the library's own "_" keys."""
        return dataclasses.asdict(self)


def check_blocks(config: Any, **block_types: str) -> None:
    """Check what the configs of diffusers' VAEs have in common.

    Args:
        config: Config of a VAE.
        **block_types: Only kind of block for each field that lists them.

    Raises:
        ValueError: On a list of other blocks, or numbers that do not fit.
    """
    widths, groups = config.block_out_channels, config.norm_num_groups
    for name, only in block_types.items():
        if getattr(config, name) != (only,) * len(widths):
            raise ValueError(
                f"{name} must be {only!r} for each of the {len(widths)} block_out_channels, not "
                f"{getattr(config, name)}."
            )
    if any(features % groups for features in widths):
        raise ValueError(
            f"block_out_channels={widths} must be multiples of norm_num_groups={groups}."
        )
    if config.scaling_factor == 0:
        raise ValueError("scaling_factor must not be 0: latents are divided by it.")


def read_config(
    config: type[Config],
    values: Mapping[str, Any],
    *,
    ignored: Collection[str] = (),
    only: Mapping[str, Any] = types.MappingProxyType({}),
) -> Config:
    """Make a config dataclass from a parsed config.json.

    Args:
        config: Dataclass whose field names are the file's keys.
        values: Parsed file. Keys that begin with "_" are the writing library's own notes.
        ignored: Keys that, like those of `NOTES`, say nothing about what the model computes.
        only: Keys that are not fields, with the only value allowed for each.

    Raises:
        ValueError: On unknown keys, or values of another type than the field's.
    """
    hints = typing.get_type_hints(config)
    kinds = {
        field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, config))
    }
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
    """Convert a JSON value to its field's type; TypeError if it has another."""
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


def _sizes(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)
