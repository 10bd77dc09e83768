"""An unpickler that builds plain values and runs nothing.

Every name that a pickle asks for is looked up in a table; what is found there are stand-ins written here, never what
the name means to Python. State that a pickle sets goes to those stand-ins alone.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np

# Packages whose objects training programs leave in checkpoints beside the weights. They become `Inert`.
INERT_PACKAGES = (
    "argparse",
    "datetime",
    "easydict",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "ml_collections",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "typing",
    "yacs",
)
# Other names of the same modules: those of Python 2, and what `os` is called inside a pickle.
MODULE_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "posix": "os", "nt": "os"}
PLAIN_TYPE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248]|c8|c16|O8?|[SUa]\d+|\?)")


class RefusedPickle(ValueError):
    """A pickle that asks for more than plain values; the message has no file name yet."""


class Inert:
    """Stands for an object of a class that is not loaded: its arguments, items and state, and no behaviour."""

    origin = ""
    args: tuple
    items: dict[Any, Any]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.items, self.state = args, {}, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs  # `__new__` has kept them

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Keep an item, as lists do."""
        self.items[len(self.items)] = value

    add = append

    def __repr__(self) -> str:
        return f"<{self.origin}, not loaded>"


class PlainUnpickler(pickle._Unpickler):  # the one in Python: its C twin cannot be told what BUILD may touch
    """Builds plain Python values, numpy scalars and arrays.

    allowed: "module.name" -> stand-in, in addition to `PLAIN`. Raises: RefusedPickle, EOFError: `RefusedPickle` names
    what is not in the table.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, allowed: Mapping[str, Any] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self.stack: list[Any]
        self.readline: Callable[[], bytes]
        self._table = PLAIN | dict(allowed or {})
        self._inert: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of `module.name`."""
        module = MODULE_NAMES.get(module, module)
        origin = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if origin in self._table:
            return self._table[origin]
        if module.split(".")[0] not in INERT_PACKAGES:
            raise RefusedPickle(f"would run {origin}")
        return self._inert.setdefault(origin, type(name, (Inert,), {"origin": origin}))

    def persistent_load(self, pid: Any) -> Any:
        """Plain pickles have no persistent ids."""
        raise RefusedPickle(f"refers to something outside itself ({pid!r:.60})")

    def get_extension(self, code: int) -> None:
        """Extension codes mean what this process has registered, which no file can know."""
        raise RefusedPickle(f"uses the extension code {code}")

    def _build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, Inert):
            instance.state = state
        elif isinstance(instance, (_Type, _Array)):
            instance.set_state(state)
        elif not isinstance(instance, dict):  # torch's ordered dicts come with attributes, which say nothing
            raise RefusedPickle(f"would change an object of type {type(instance).__name__}")

    def _global(self) -> None:
        module, name = self.readline(), self.readline()
        if not name.endswith(b"\n"):
            raise EOFError("the pickle breaks off within a name")
        self.stack.append(self.find_class(module.decode().strip(), name.decode().strip()))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.GLOBAL[0]] = _global


class _Type:
    """numpy.dtype in the making: simple types only."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not PLAIN_TYPE.fullmatch(code):
            raise RefusedPickle(f"holds arrays of type {code!r:.60}")
        self.numpy = np.dtype(code)

    def set_state(self, state: tuple) -> None:
        """Take the byte order; parts that make a type a record are refused."""
        if any(part is not None for part in state[2:5]):
            raise RefusedPickle("holds arrays of records")
        if state[1] in ("<", ">"):
            self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """numpy.ndarray in the making."""

    def set_state(self, state: tuple) -> None:
        """Take (version, shape, type, whether columns come first, items), once they are found to agree."""
        shape, kind, by_column, items = state[-4:]
        dtype, count = _numpy_type(kind), math.prod(shape)
        items = items.encode("latin1") if isinstance(items, str) else items
        size, container = (count, list) if dtype.hasobject else (count * dtype.itemsize, bytes)
        if not isinstance(items, container) or len(items) != size:
            raise RefusedPickle(f"holds an array {list(shape)} without the right number of items")
        super().__setstate__(cast(Any, (1, tuple(shape), dtype, bool(by_column), items)))


def _numpy_type(kind: Any) -> np.dtype:
    if not isinstance(kind, _Type):
        raise RefusedPickle(f"holds an array of type {kind!r:.60}")
    return kind.numpy


def _scalar(kind: Any, data: bytes | str = b"") -> Any:
    dtype = _numpy_type(kind)
    data = data.encode("latin1") if isinstance(data, str) else data
    if dtype.hasobject or len(data) != dtype.itemsize:
        raise RefusedPickle(f"holds a numpy scalar of type {dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype)[0]


def _from_buffer(data: bytes, kind: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    dtype = _numpy_type(kind)
    if dtype.hasobject:
        raise RefusedPickle("holds an array of objects as bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickle(f"would run _codecs.encode to {encoding!r:.20}")
    return text.encode("latin1")


def _bytes(data: bytes | str | list = b"", encoding: str = "latin1") -> bytes:
    if isinstance(data, str):
        return _encode(data, encoding)
    if not isinstance(data, (bytes, bytearray, list)):  # a number would be a size to allocate
        raise RefusedPickle(f"would make bytes of {data!r:.60}")
    return bytes(data)


def _reconstructor(cls: Any, *_: Any) -> Any:
    if not (isinstance(cls, type) and issubclass(cls, Inert)):
        raise RefusedPickle(f"would make an object of {cls!r:.60}")
    return cls()


def ordered(items: Any = ()) -> dict:
    """A plain dict for every kind of mapping that keeps its order."""
    return dict(items)


PLAIN: dict[str, Any] = {
    **{f"builtins.{kind.__name__}": kind for kind in (bool, complex, dict, float, frozenset, int, list, set, tuple)},
    "builtins.str": str,
    "builtins.unicode": str,
    "builtins.long": int,
    "builtins.slice": slice,
    "builtins.object": Inert,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "collections.OrderedDict": ordered,
    "collections.Counter": ordered,
    "collections.defaultdict": lambda factory=None: {},
    "copyreg._reconstructor": _reconstructor,
    "_codecs.encode": _encode,
    "numpy.dtype": _Type,
    "numpy.ndarray": _Array,
    "numpy._core.multiarray._reconstruct": lambda *_: np.ndarray.__new__(_Array, 0),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _from_buffer,
}
