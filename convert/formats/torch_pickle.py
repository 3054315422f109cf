"""The pickle inside a file of torch.save, read without executing any of it.

A pickle is a program for a stack machine, and Python's own machine runs whatever it is told to.
This one knows dicts, lists, tuples, numbers, text, and the few calls by which torch makes a tensor.
Anything else that a pickle names or calls becomes an `Inert`, which is never imported, called or
copied. Memory and time are bounded by the pickle's length: an operation makes one object, only text
is hashed, and no object is compared, printed or searched.
"""

import pickletools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

SIZE_LIMIT = 32 * 2**20  # bytes; that of a model of 1,300 tensors has 200 kB
OPERATION_LIMIT = 500_000  # a tensor takes about 35
DEPTH_LIMIT = 100  # containers that are being filled at once

# The call of a tensor with attributes, or a buffer: function, class, arguments, state.
_TYPED = "torch._tensor._rebuild_from_type_v2"
_PLAIN = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Buffer")
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
# The state is attributes, which trainers give to parameters.
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    }
)


@dataclass(frozen=True, eq=False)
class Inert:
    """An object that is neither a tensor nor a plain container; only its name is kept."""

    name: str


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A storage: a flat row of elements in a file of the archive.

    Attributes:
        kind: Name of the class, such as "torch.BFloat16Storage".
        key: Name of the file.
        size: Number of elements; of bytes for a "torch.storage.UntypedStorage".
    """

    kind: str
    key: str
    size: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor: a view of a storage.

    Attributes:
        storage: Storage of the elements.
        offset: Index of the first element in the storage.
        shape: Shape of the tensor.
        strides: Distance, in elements, of neighbours along each axis.
        dtype: Name such as "torch.bfloat16" where the storage has none, else None.
        negative: Whether the elements have the opposite sign, as in torch's view
            `tensor.conj().imag`.
    """

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None
    negative: bool = False


def unpickle(data: bytes) -> Any:
    """Read a pickle as `TensorRef`s in dicts, lists and tuples; all other objects are `Inert`.

    Args:
        data: Pickle of protocol 2 to 5, as torch.save writes it. Sets are read as lists.

    Raises:
        ValueError: If it is no pickle, is damaged, or exceeds one of the limits.
    """
    if len(data) > SIZE_LIMIT:
        raise ValueError(f"has {len(data)} bytes, of which {SIZE_LIMIT} are allowed")
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[Any, Any] = {}
    try:
        for count, (opcode, arg, position) in enumerate(_operations(data)):
            if count >= OPERATION_LIMIT:
                raise ValueError(f"has more than {OPERATION_LIMIT} operations")
            match opcode.name:
                case "MARK":
                    if len(outer) >= DEPTH_LIMIT:
                        raise ValueError(f"nests deeper than {DEPTH_LIMIT} containers")
                    outer.append(stack)
                    stack = []
                case "TUPLE" | "FROZENSET" | "APPENDS" | "ADDITEMS" | "SETITEMS" | "POP_MARK":
                    items, stack = stack, outer.pop()
                    _close(opcode.name, stack, items)
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "STOP":
                    if len(stack) != 1 or outer or position != len(data) - 1:
                        raise ValueError("ends with more than one object")
                    return stack.pop()
                case "PROTO" | "FRAME":
                    pass
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case name if name in _LITERALS:
                    stack.append(arg)
                case name if name in _OPERATIONS:
                    _OPERATIONS[name](stack, arg)
                case name:
                    raise ValueError(f"uses {name}, which torch.save does not")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is damaged ({type(error).__name__})") from error
    raise ValueError("is cut off")


def _operations(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(data)
    except ValueError as error:
        raise ValueError(f"is damaged ({error!s:.60})") from error


def _close(name: str, stack: list[Any], items: list[Any]) -> None:
    """Apply an operation to all objects above a mark."""
    match name:
        case "TUPLE" | "FROZENSET":
            stack.append(tuple(items))
        case "APPENDS" | "ADDITEMS":
            _extend(stack[-1], items)
        case "SETITEMS" if len(items) % 2:
            raise TypeError
        case "SETITEMS":
            _put(stack[-1], zip(items[::2], items[1::2], strict=True))


def _extend(container: Any, items: Iterable[Any]) -> None:
    if type(container) is list:
        container.extend(items)
    elif not isinstance(container, Inert):
        raise TypeError


def _put(container: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Fill a dict. A key that is not text becomes an Inert: hashing it could take for ever."""
    if isinstance(container, Inert):
        return
    if type(container) is not dict:
        raise TypeError
    for key, value in pairs:
        if type(key) is not str:
            container[Inert(type(key).__name__)] = value
        elif key in container:
            raise ValueError(f"has the key {key!r:.80} twice")
        else:
            container[key] = value


def _name(stack: list[Any], arg: str) -> None:
    """Push a global by its name, which the pickle holds as "module name"."""
    stack.append(Inert(".".join(arg.split(" ", 1))))


def _name_of_stack(stack: list[Any], _: Any) -> None:
    name, module = stack.pop(), stack.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError
    stack.append(Inert(f"{module}.{name}"))


def _storage(stack: list[Any], _: Any) -> None:
    """Push a storage, which torch writes as ("storage", class, key, device, size)."""
    identity = stack.pop()
    if type(identity) is not tuple or len(identity) != 5:
        raise TypeError
    what, kind, key, _, size = identity
    if what != "storage" or type(kind) is not Inert or type(key) is not str or not _is_size(size):
        raise TypeError
    stack.append(StorageRef(kind.name, key, size))


def _reduce(stack: list[Any], _: Any) -> None:
    """Push the result of a call that makes a tensor or an OrderedDict; an `Inert` of any other."""
    arguments, function = stack.pop(), stack.pop()
    name = function.name
    if type(arguments) is not tuple:
        raise TypeError
    match name:
        case "collections.OrderedDict" if not arguments:  # its items follow
            made: Any = {}
        case "torch._utils._rebuild_tensor_v2":
            made = _tensor(*arguments[:4], bits=arguments[6:])
        case "torch._utils._rebuild_tensor_v3":
            made = _tensor(*arguments[:4], dtype=arguments[6].name, bits=arguments[7:])
        case _ if name == _TYPED and _is_plain(*arguments[:2]):
            stack += arguments[0], arguments[2]
            return _reduce(stack, None)
        case _ if name in _PARAMETERS and type(arguments[0]) is TensorRef:
            made = arguments[0]
        case _:
            made = Inert(name)
    stack.append(made)


def _is_plain(function: Any, kind: Any) -> bool:
    return function.name in _TENSORS and kind.name in _PLAIN


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    *,
    dtype: str | None = None,
    bits: tuple[Any, ...] = (),
) -> Any:
    """Make a tensor; the last argument of its call, if any, names the bits that are set."""
    sizes_fit = type(shape) is tuple is type(strides) and len(shape) == len(strides) <= 64
    if type(storage) is not StorageRef or not sizes_fit:
        raise TypeError
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("holds a tensor with a shape, a stride or an offset that is no size")
    set_bits = bits[0] if bits else {}
    negative = type(set_bits) is dict and set_bits.keys() == {"neg"} and set_bits["neg"] is True
    plain = set_bits is None or (type(set_bits) is dict and not set_bits)
    if len(bits) > 1 or not (negative or plain):
        raise ValueError("holds a tensor with bits or notes that are not known")
    return TensorRef(storage, offset, shape, strides, dtype, negative)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _make(stack: list[Any], arguments: int) -> None:
    """Push an object of a class, none of which is known here."""
    del stack[-arguments:]
    stack.append(Inert(stack.pop().name))


_OPERATIONS: dict[str, Callable[[list[Any], Any], None]] = {
    "EMPTY_DICT": lambda stack, _: stack.append({}),
    "EMPTY_LIST": lambda stack, _: stack.append([]),
    "EMPTY_SET": lambda stack, _: stack.append([]),
    "EMPTY_TUPLE": lambda stack, _: stack.append(()),
    "TUPLE1": lambda stack, _: stack.append((stack.pop(),)),
    "TUPLE2": lambda stack, _: stack.append((stack.pop(-2), stack.pop())),
    "TUPLE3": lambda stack, _: stack.append((stack.pop(-3), stack.pop(-2), stack.pop())),
    "APPEND": lambda stack, _: _extend(stack[-2], [stack.pop()]),
    "SETITEM": lambda stack, _: _put(stack[-3], [(stack.pop(-2), stack.pop())]),
    "POP": lambda stack, _: stack.pop(),
    "GLOBAL": _name,
    "STACK_GLOBAL": _name_of_stack,
    "BINPERSID": _storage,
    "REDUCE": _reduce,
    "NEWOBJ": lambda stack, _: _make(stack, 1),
    "NEWOBJ_EX": lambda stack, _: _make(stack, 2),  # with keywords
    "BUILD": lambda stack, _: stack.pop(),  # attributes, such as a state dict's _metadata
}
