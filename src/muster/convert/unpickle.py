"""Reads a pickle without running it: an interpreter of the opcodes that plain data and tensors need.

No opcode imports anything. A name in the pickle is looked up in a table of functions of ours; the classes of other
trainers, which checkpoints carry beside the tensors, become inert records of their name and arguments. Any other
name is refused. Work and memory are bounded by the pickle's size.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_MAX_COPIED = 2_000_000
"""Entries that may be copied while rebuilding containers: a pickle can ask for the same long list again and again."""
_ATOMS = (str, int, float, bytes, type(None))

# Classes that checkpoints of DeepSpeed and Megatron-LM hold beside their tensors: settings, random states, enums.
_INERT_PACKAGES = ("apex.", "deepspeed.", "megatron.", "transformer_engine.", "transformers.")
_INERT = {
    "_io.BytesIO",
    "datetime.timedelta",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    "signal.Signals",
}


class Refused(Exception):
    """What a pickle holds that is not plain data; the text says what."""


class Namespace(dict[str, Any]):
    """The attributes of an `argparse.Namespace`."""


@dataclass(slots=True)
class Inert:
    """An object of somebody's class, never made: the class's name and what it would have been made from."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name in a pickle, and what stands for calling it here."""

    name: str
    build: Callable[..., Any] = field(compare=False)


Builders = Mapping[str, Callable[..., Any]]


def unpickle(pickled: bytes, builders: Builders, persistent: Callable[[Any], Any]) -> Any:
    """The plain data in `pickled`.

    `builders` are further functions by name, `persistent` resolves persistent ids. Raises Refused for names and
    opcodes beyond plain data, and ValueError where the pickle is damaged.
    """
    try:
        return _Machine(builders, persistent).run(pickled)
    except (
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        AssertionError,
        struct.error,
    ) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


class _Machine:
    def __init__(self, builders: Builders, persistent: Callable[[Any], Any]) -> None:
        self._builders: dict[str, Callable[..., Any]] = {
            "argparse.Namespace": Namespace,
            "types.SimpleNamespace": Namespace,
            "collections.OrderedDict": self._dict,
            "collections.defaultdict": lambda factory=None, pairs=(): self._dict(pairs),
            **{f"{module}.set": self._set for module in ("builtins", "__builtin__")},
            **{
                f"{module}.{name}": Inert  # as the factory of a defaultdict
                for module in ("builtins", "__builtin__")
                for name in ("bool", "dict", "float", "int", "list", "str", "tuple")
            },
            "_codecs.encode": _encoded,  # how protocol 2 writes bytes
            **builders,
        }
        self._persistent = persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def run(self, pickled: bytes) -> Any:
        for name, argument in _opcodes(pickled):
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self._stack.append(argument)
            elif name == "STOP":
                return self._stack.pop()
            elif name not in _IGNORED:
                getattr(self, f"_op_{name.lower()}")(argument)
        raise ValueError("it has no end")

    # Containers

    def _op_mark(self, _: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _op_pop(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _op_pop_mark(self, _: None) -> None:
        self._since_mark()

    def _op_dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _op_empty_list(self, _: None) -> None:
        self._stack.append([])

    def _op_empty_dict(self, _: None) -> None:
        self._stack.append({})

    def _op_empty_set(self, _: None) -> None:
        self._stack.append(set())

    def _op_list(self, _: None) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _op_tuple(self, _: None) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _op_tuple1(self, _: None) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _op_tuple2(self, _: None) -> None:
        self._last(2)

    def _op_tuple3(self, _: None) -> None:
        self._last(3)

    def _last(self, count: int) -> None:
        if len(self._stack) < count:
            raise ValueError("its stack is too short")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _op_append(self, _: None) -> None:
        item = self._stack.pop()
        _as(list, self._stack[-1]).append(item)

    def _op_appends(self, _: None) -> None:
        items = self._since_mark()
        _as(list, self._stack[-1]).extend(items)

    def _op_additems(self, _: None) -> None:
        items = self._since_mark()
        _as(set, self._stack[-1]).update(map(_key, items))

    def _op_frozenset(self, _: None) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(map(_key, items)))

    def _op_dict(self, _: None) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set_items(items)

    def _op_setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _op_setitems(self, _: None) -> None:
        self._set_items(self._since_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = _as(dict, self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    # References

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _op_put = _op_binput = _op_long_binput = _put
    _op_get = _op_binget = _op_long_binget = _get

    def _op_memoize(self, _: None) -> None:
        self._put(len(self._memo))

    def _op_binpersid(self, _: None) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    # Names and calls

    def _op_global(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self._stack.append(self._symbol(module, name))

    def _op_stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._symbol(_as(str, module), _as(str, name)))

    def _symbol(self, module: str, name: str) -> Symbol:
        whole = f"{module}.{name}"
        if whole in self._builders:
            return Symbol(whole, self._builders[whole])
        if whole in _INERT or whole.startswith(_INERT_PACKAGES):
            return Symbol(whole, Inert)
        raise Refused(f"the name {whole[:200]}")

    def _op_reduce(self, _: None) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Symbol) or not isinstance(arguments, tuple):
            raise Refused("a call of something that is not a name")
        if called.build is Inert:
            self._stack.append(Inert(called.name, arguments))
        else:
            self._stack.append(called.build(*arguments))

    _op_newobj = _op_reduce

    def _op_build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, Namespace) and state:
            self._spend(_as(dict, state))
            target.update(state)
        # Attributes of anything else, such as an OrderedDict's _metadata, are left out.

    def _dict(self, pairs: Any = ()) -> dict[Any, Any]:
        self._spend(pairs)
        entries = pairs.items() if isinstance(pairs, dict) else pairs
        return {_key(key): value for key, value in entries}

    def _set(self, items: Any = ()) -> set[Any]:
        self._spend(items)
        return set(map(_key, items))

    def _spend(self, entries: Iterable[Any]) -> None:
        if not isinstance(entries, list | tuple | dict | set):
            raise ValueError("a container is made from something else")
        self._copied += len(entries)
        if self._copied > _MAX_COPIED:
            raise Refused(f"more than {_MAX_COPIED} copied entries")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"),
}
_IGNORED = {"PROTO", "FRAME"}
_WORKED = {name.removeprefix("_op_").upper() for name in vars(_Machine) if name.startswith("_op_")}
_TABLE = {opcode.code: opcode for opcode in pickletools.opcodes}
_KNOWN = {"STOP"} | _CONSTANTS.keys() | _LITERALS | _IGNORED | _WORKED


def _opcodes(pickled: bytes) -> Iterator[tuple[str, Any]]:
    """Names and arguments; an unknown one is refused before its argument is read."""
    stream = io.BytesIO(pickled)
    while code := stream.read(1):
        opcode = _TABLE.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"it has the byte {code!r} for an opcode")
        if opcode.name not in _KNOWN:
            raise Refused(f"the opcode {opcode.name}")
        yield opcode.name, None if opcode.arg is None else opcode.arg.reader(stream)


def _key(key: Any) -> Any:
    """A key of a dictionary; deeper ones could overflow the stack where they are hashed."""
    if isinstance(key, _ATOMS) or (isinstance(key, tuple) and all(isinstance(part, _ATOMS) for part in key)):
        return key
    raise Refused(f"a key of type {type(key).__name__}")


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {kind.__name__} is expected where it has a {type(value).__name__}")
    return value


def _encoded(text: str, codec: str) -> bytes:
    if codec not in ("latin1", "latin-1"):
        raise Refused(f"bytes in the codec {codec[:40]!r}")
    return text.encode("latin1")
