"""Conversion rules as data: which stored tensor becomes which leaf of a module, and back.

Each model (convert/tables/cogvideox.py, t5.py) has a function `rules(config) -> tuple[Rule, ...]`.
Everything else follows from that table: which tensors a checkpoint must hold, how they are
converted, and the way back.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.show import show_some

# Increased when a table or a transform changes what the same source is converted to.
RULES_VERSION = 1
LAYER = "{layer}"
FEED_FORWARD = ("net.0.proj", "net.2")  # the layers of diffusers' `FeedForward`
_NAMED = 5  # how many names of each kind of problem an error spells out
_REPORT = 300  # characters, beyond which it spells out fewer


@dataclass(frozen=True)
class Rule:
    """One line of a model's table.

    Attributes:
        source: Name of the stored tensor; `{layer}` stands for the number of a stacked layer.
        target: Dotted path of the leaf in the module's pure dict, `blocks.attention.query.kernel`.
        transform: "none" keeps the array; "transpose" turns a linear weight [out, in] into
            [in, out]; "patch" turns a convolution's weight [out, in, *kernel] into that of a linear
            layer over patches, [in * prod(kernel), out], the input channel slowest; "conv" turns it
            into [*kernel, in, out], as `nnx.Conv` has it; "flatten" makes a vector of the array.
        source_shape: Shape of one stored tensor, from the config. Checkpoints are checked against
            it, and the inverse of "patch" takes the kernel's shape from it.
        aliases: Other names that the same tensor may be stored under (tied weights). At least one
            of the names must be there; several must hold the same bytes.
        layers: Number of layers, whose tensors are stacked along a new leading axis of the leaf;
            None for a single tensor.
    """

    source: str
    target: str
    transform: Literal["none", "transpose", "patch", "conv", "flatten"]
    source_shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    layers: int | None = None

    def __post_init__(self) -> None:
        rank = len(self.source_shape)
        convolution = self.transform in ("patch", "conv")
        if (self.transform == "transpose" and rank != 2) or (convolution and rank < 3):
            raise ValueError(
                f"{self.source}: {self.transform} of a tensor of shape {self.source_shape}"
            )
        names = (self.source, *self.aliases)
        if any((LAYER in name) != self.stacked for name in names):
            raise ValueError(
                f"{self.source}: {names} and layers={self.layers} contradict each other"
            )

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading layer axis."""
        return self.layers is not None

    def names_of(self, layer: int) -> tuple[str, ...]:
        """List the names that a layer's tensor may be stored under (any layer's if not stacked)."""
        return tuple(name.replace(LAYER, str(layer)) for name in (self.source, *self.aliases))

    @property
    def seen_shape(self) -> tuple[int, ...]:
        """Shape of the source after merging the axes that are one axis in the leaf."""
        if self.transform == "flatten":
            return (math.prod(self.source_shape),)
        if self.transform in ("transpose", "patch"):
            return (self.source_shape[0], math.prod(self.source_shape[1:]))
        return self.source_shape

    @property
    def axes(self) -> tuple[int, ...]:
        """Axis of `seen_shape` that each axis of one layer's share of the leaf is."""
        rank = len(self.seen_shape)
        if self.transform == "conv":
            return (*range(2, rank), 1, 0)
        return (1, 0) if self.transform in ("transpose", "patch") else tuple(range(rank))

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one layer's share of the leaf."""
        return tuple(self.seen_shape[axis] for axis in self.axes)

    @property
    def inverse_axes(self) -> tuple[int, ...]:
        """Axis of one layer's share of the leaf that each axis of `seen_shape` is."""
        return tuple(self.axes.index(axis) for axis in range(len(self.axes)))

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        """Lay a stored tensor out as in the leaf: a view where numpy can make one."""
        return tensor.reshape(self.seen_shape).transpose(self.axes)

    def inverse(self, part: np.ndarray) -> np.ndarray:
        """Restore the stored tensor: `inverse(forward(x))` is x, bit for bit."""
        return part.transpose(self.inverse_axes).reshape(self.source_shape)


def matrix_rule(source: str, target: str, features: int, out_features: int) -> Rule:
    """Map the weight of a linear layer without a bias."""
    return Rule(f"{source}.weight", f"{target}.kernel", "transpose", (out_features, features))


def _with_bias(weight: Rule) -> list[Rule]:
    """Add the rule of the bias to that of a layer's weight, whose first axis are the outputs."""
    source, target = weight.source.removesuffix("weight"), weight.target.removesuffix("kernel")
    return [weight, Rule(f"{source}bias", f"{target}bias", "none", weight.source_shape[:1])]


def linear_rules(source: str, target: str, features: int, out_features: int) -> list[Rule]:
    """Map the weight and bias of a linear layer."""
    return _with_bias(matrix_rule(source, target, features, out_features))


def conv_rules(
    source: str, target: str, features: int, out_features: int, kernel: Sequence[int]
) -> list[Rule]:
    """Map the weight and bias of a convolution."""
    shape = (out_features, features, *kernel)
    return _with_bias(Rule(f"{source}.weight", f"{target}.kernel", "conv", shape))


def patch_rules(
    source: str, target: str, features: int, out_features: int, kernel: Sequence[int]
) -> list[Rule]:
    """Map the weight and bias of a convolution over patches, or points, to a linear layer."""
    shape = (out_features, features, *kernel)
    return _with_bias(Rule(f"{source}.weight", f"{target}.kernel", "patch", shape))


def heads_rules(source: str, target: str, width: int) -> list[Rule]:
    """Map the linear layers of queries, keys and values; `{}` stands for q, k and v."""
    return [
        rule
        for theirs, ours in zip("qkv", ("query", "key", "value"), strict=True)
        for rule in linear_rules(source.format(theirs), f"{target}.{ours}", width, width)
    ]


def mlp_rules(
    source: str,
    target: str,
    widths: tuple[int, int, int],
    layers: tuple[str, str] = ("linear_1", "linear_2"),
) -> list[Rule]:
    """Map two linear layers, one after the other.

    Args:
        source: Name of the module that holds both.
        target: Path of the module that holds both.
        widths: Features of the input, between the layers, and of the output.
        layers: Names of the layers in their module.
    """
    first, second = layers
    return [
        *linear_rules(f"{source}.{first}", f"{target}.input", *widths[:2]),
        *linear_rules(f"{source}.{second}", f"{target}.output", *widths[1:]),
    ]


def gain_rule(source: str, target: str, features: int) -> Rule:
    """Map the gain of a norm without a bias."""
    return Rule(f"{source}.weight", f"{target}.scale", "none", (features,))


def norm_rules(source: str, target: str, features: int) -> list[Rule]:
    """Map the gain and bias of a layer norm."""
    return [
        gain_rule(source, target, features),
        Rule(f"{source}.bias", f"{target}.bias", "none", (features,)),
    ]


def stack_rules(source: str, target: str, layers: int, rules: Sequence[Rule]) -> list[Rule]:
    """Turn the rules of one layer into those of all, `source.0` to `source.{layers - 1}`."""
    return [
        replace(
            rule,
            source=f"{source}.{LAYER}.{rule.source}",
            target=f"{target}.{rule.target}",
            layers=layers,
        )
        for rule in rules
    ]


def nest_rules(prefixes: Sequence[str], target: str, rules: Sequence[Rule]) -> list[Rule]:
    """Turn the rules of a model into those of a part of another, or add names with a prefix.

    Args:
        prefixes: Alternative prefixes of the tensors' names, dots included.
        target: Prefix of the leaves' paths, dot included.
        rules: Rules of the model on its own.
    """
    nested = []
    for rule in rules:
        names = (rule.source, *rule.aliases)
        source, *aliases = (prefix + name for prefix in prefixes for name in names)
        path = target + rule.target
        nested.append(replace(rule, source=source, aliases=tuple(aliases), target=path))
    return nested


@dataclass(frozen=True)
class Leaf:
    """One leaf of a converted tree and the stored tensors that it is made of.

    Attributes:
        rule: Rule of the leaf.
        names: Names that the tensor of each layer is stored under (one entry where the rule does
            not stack): one name, or several where tied weights are stored more than once.
        shape: Shape of the leaf, the layer axis included.
    """

    rule: Rule
    names: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]

    @property
    def path(self) -> tuple[str, ...]:
        """Keys from the root of the tree."""
        return tuple(self.rule.target.split("."))


def match_rules(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], *, where: str = "checkpoint"
) -> tuple[Leaf, ...]:
    """Assign every stored tensor to a leaf and every leaf to stored tensors.

    Args:
        shapes: Shape of each stored tensor.
        rules: The model's table.
        where: File or folder that the tensors are from, for errors.

    Raises:
        ConversionError: If the two sides do not fit exactly. The error lists all missing,
            unexpected and misshapen tensors, and what two rules claim.
    """
    leaves = []
    missing, misshapen, used = [], [], set()
    for rule in rules:
        names = []
        for layer in range(rule.layers or 1):
            candidates = rule.names_of(layer)
            stored = tuple(name for name in candidates if name in shapes)
            if not stored:
                missing.append(candidates[0])
            misshapen += [
                f"{name} is {list(shapes[name])} and must be {list(rule.source_shape)}"
                for name in stored
                if shapes[name] != rule.source_shape
            ]
            used.update(stored)
            names.append(stored)
        stack = () if rule.layers is None else (rule.layers,)
        leaves.append(Leaf(rule, tuple(names), (*stack, *rule.target_shape)))

    claims = Counter(name for leaf in leaves for stored in leaf.names for name in stored)
    targets = Counter(rule.target for rule in rules)
    problems = {
        "missing": missing,
        "unexpected": sorted(set(shapes) - used),
        "misshapen": misshapen,
        "claimed by two rules": sorted(name for name, count in claims.items() if count > 1),
        "made by two rules": sorted(path for path, count in targets.items() if count > 1),
    }
    if any(problems.values()):
        # Released names have up to 90 characters, and a shape behind them says what to look for.
        for count, limit in ((_NAMED, 160), (2, 160), (1, 160), (1, 60)):
            report = "; ".join(
                f"{len(found)} {kind} ({show_some(found, count, limit)})"
                for kind, found in problems.items()
                if found
            )
            if len(report) <= _REPORT:
                break
        raise ConversionError(
            f"{where}: the tensors do not fit the config: {report}. "
            "Check that config.json belongs to these weights."
        )
    return tuple(leaves)


def convert_state(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, Any]:
    """Convert a whole state dict, in memory, to a module's nested pure dict.

    This is for tests and small models; `convert_pipeline` does the same one tensor at a time.

    Raises:
        ConversionError: If tensors and rules do not fit, or tied weights differ.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tree: dict[str, Any] = {}
    for leaf in match_rules(shapes, rules):
        parts = []
        for first, *ties in leaf.names:
            for tie in ties:
                if tensors[tie].tobytes() != tensors[first].tobytes():
                    raise ConversionError(f"{first} and {tie} must be the same tensor and differ.")
            parts.append(leaf.rule.forward(tensors[first]))
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = (
            np.stack(parts) if leaf.rule.stacked else np.ascontiguousarray(parts[0])
        )
    return tree


def restore_state(tree: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Undo `convert_state`; tied weights come out once, under the rule's own name."""
    tensors = {}
    for rule in rules:
        leaf: Any = tree
        for key in rule.target.split("."):
            leaf = leaf[key]
        for layer in range(rule.layers or 1):
            name, *_ = rule.names_of(layer)
            tensors[name] = rule.inverse(np.asarray(leaf[layer] if rule.stacked else leaf))
    return tensors
