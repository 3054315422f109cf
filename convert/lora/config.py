"""The strength of a LoRA: alpha and rank, from the config that PEFT or diffusers wrote with it."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.json_file import parse_json, read_json

PEFT_CONFIG = "adapter_config.json"
_PEFT_STEM = "adapter_model"
_METADATA = "lora_adapter_metadata"  # diffusers' name for a config within the file
_LARGEST = sys.float_info.max
_DEFAULT = 8  # PEFT's, of both r and lora_alpha
# Keys of what PEFT merges in another way, or together with a change of the base weights.
_VARIANTS = (
    *("use_dora", "fan_in_fan_out", "layer_replication", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_qalora", "arrow_config", "velora_config"),
    *("alora_invocation_tokens", "monteclora_config", "kasa_config"),
)
# Values of init_lora_weights that do not change the base weights.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Patterns of modules that are quick to match: no group repeats, and few characters do.
_QUICK = re.compile(r"(?!.*\)[*+?])(?!(?:.*[*+?]){4})[\w.^$\\|()\[\]*+?-]+")


@dataclass(frozen=True)
class LoraConfig:
    """The config of a LoRA.

    Attributes:
        where: File that holds it, for errors.
        values: Entries of the config. In diffusers' config of a pipeline, the keys have the
            component's name as a prefix.
    """

    where: Path
    values: Mapping[str, Any]

    def of(self, *components: str) -> "LoraConfig":
        """Take the entries of the first component that has any; all entries if none has.

        Raises:
            ConversionError: If they describe anything but a plain LoRA.
        """
        values = self.values
        for prefix in (f"{component}." for component in reversed(components)):
            own = {key: of for key, of in self.values.items() if key.startswith(prefix)}
            values = {key.removeprefix(prefix): of for key, of in own.items()} or values
        kind = str(values.get("peft_type") or "LORA").removeprefix("PeftType.")
        start = values.get("init_lora_weights", True)
        odd = [key for key in _VARIANTS if values.get(key)]
        odd += ["peft_type"] if kind != "LORA" else []
        odd += ["init_lora_weights"] if start not in _PLAIN_STARTS else []
        if odd:
            raise ConversionError(
                f"{self.where}: {odd[0]} is {values[odd[0]]!r:.80}, which is not merged like a "
                "LoRA: merge it in its trainer."
            )
        return LoraConfig(self.where, values)

    def scaling(self, module: str, rank: int) -> float:
        """Compute the factor of the product B A of a module.

        Args:
            module: Name of the module in the LoRA, without a prefix.
            rank: Rank of its tensors.

        Raises:
            ConversionError: If the config has another rank, or no number where one is needed.
        """
        r = self._value("r", "rank_pattern", module)
        if r != rank:
            raise ConversionError(
                f"{self.where}: gives {module} the rank {r:g} and its tensors have {rank}: they "
                "belong to two LoRAs."
            )
        alpha = self._value("lora_alpha", "alpha_pattern", module)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _value(self, name: str, patterns: str, module: str) -> float:
        """Return the value of the first pattern that fits the module's name or its end."""
        table = self.values.get(patterns) or {}
        if not isinstance(table, dict):
            raise ConversionError(f"{self.where}: {patterns} is {table!r:.80}, and no object.")
        value = self.values.get(name, _DEFAULT)
        for pattern, of in table.items():
            try:
                if not _QUICK.fullmatch(pattern):
                    raise re.error("not one that is quick to match")
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise ConversionError(
                    f"{self.where}: {pattern!r:.80} in {patterns} is no pattern of names ({error})."
                ) from error
            if found:
                value = of
                break
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise ConversionError(
                f"{self.where}: {name} of {module} is {value!r:.80}, and no number."
            )
        return float(value)


def read_lora_config(file: Path, metadata: Any, *, is_peft: bool) -> LoraConfig | None:
    """Read the config of a LoRA: PEFT's lies beside the weights, diffusers' in their header.

    Args:
        file: File of the weights.
        metadata: Metadata in its header.
        is_peft: Whether the tensors have PEFT's names.

    Returns:
        The config; None if there is none.

    Raises:
        ConversionError: If the config is damaged.
    """
    beside = file.with_name(PEFT_CONFIG)
    if (is_peft or file.stem == _PEFT_STEM) and beside.is_file():
        return LoraConfig(beside, read_json(beside))
    text = metadata.get(_METADATA) if isinstance(metadata, dict) else None
    if not text:
        return None
    if not isinstance(text, str):
        raise ConversionError(f"{file}: its {_METADATA} is no JSON object: fetch it again.")
    return LoraConfig(file, parse_json(text.encode("utf-8"), f"{file}: its {_METADATA}"))
