"""What a loader yields, as a tree of containers with tensors for leaves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
from collections import Counter, OrderedDict, UserList, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from free_adv.checks import describe

Path = tuple[int | str | EllipsisType, ...]
PLAIN = (list, tuple, dict, OrderedDict, defaultdict, deque)


def as_paths(key: Any) -> list[Path]:
    """The argument `key` as paths: a list is several of them, anything else is one."""
    paths = [k if isinstance(k, tuple) else (k,) for k in (key if isinstance(key, list) else [key])]
    good = (int, str, EllipsisType)
    if not paths or not all(path and all(isinstance(k, good) for k in path) for path in paths):
        raise TypeError(
            "key must be an index, a name, `...` or a tuple of them, or a list of several such keys, "
            f"got {key!r}"
        )
    return paths


def find(batch: Any, path: Path) -> list[tuple[Path, Tensor]]:
    """The tensors at `path`, each with the keys that lead to it; a bare tensor is its own element 0.

    Raises:
        ValueError: There is nothing at that path.
        TypeError: What is there is not a tensor of floating-point numbers.
    """
    found = _reach(batch, () if isinstance(batch, Tensor) and path == (0,) else path)
    if not found:
        raise ValueError(f"there is no {_name(path)} in the loader's batch; {_hint(batch)}")
    for _, value in found:
        if _is_array(value):
            raise TypeError(
                f"the input at {_name(path)} must be a tensor, got a NumPy array; convert it before the replay, as in "
                "torch.as_tensor(x) in the dataset or in collate_fn"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the input at {_name(path)} must be a tensor, got {type(value).__name__}; {_hint(batch)}"
            )
        if not value.is_floating_point():
            raise TypeError(
                f"the input must be floating point, got {describe(value)} at {_name(path)}; {_floats(batch, value)}"
            )
    return found


def rebuilt(value: Any, new: Any = None) -> Any:
    """`value` in fresh containers of the same types, its tensors and arrays cloned.

    Args:
        value: A batch or a part of it. It is never changed.
        new: Dicts by key, nested as the containers are, down to the tensors to put in their places.
    """
    if isinstance(new, Tensor):
        return new
    if isinstance(value, Tensor):
        return value.clone()
    if _is_array(value):
        return value.copy()
    new = new or {}
    if type(value) in (tuple, list):  # nearly every batch
        return type(value)([rebuilt(child, new.get(i)) for i, child in enumerate(value)])
    children = _children(value, new)
    if children is None:
        return value
    return _like(value, {k: rebuilt(child, new.get(k)) for k, child in children.items()})


def nested(items: Iterable[tuple[Path, Tensor]]) -> Any:
    """Tensors by path as the nested dicts that `rebuilt` takes."""
    tree: Any = {}
    for path, t in items:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        if not path:
            return t
        node[path[-1]] = t
    return tree


def move(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`: by a `.to` of its own if it has one, else piece by piece."""
    if isinstance(value, Tensor):
        # A copy to the host must have arrived when it is read, and Metal reads while the host goes on.
        return value.to(device, non_blocking=device.type not in ("cpu", "mps"))
    own = not isinstance(value, Mapping | type | nn.Module)
    if own and callable(getattr(value, "to", None)):
        twin = copy.copy(value)
        moved = twin.to(device)
        return twin if moved is None else moved  # in place
    children = _children(value, {})
    pieces = {key: move(child, device) for key, child in (children or {}).items()}
    return value if children is None else _like(value, pieces)


def _leaves(value: Any) -> Iterator[Any]:
    """Every tensor and array."""
    if isinstance(value, Tensor) or _is_array(value):
        yield value
    for child in (_children(value, {}) or {}).values():
        yield from _leaves(child)


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor and the path to it."""
    if isinstance(value, Tensor):
        yield path, value
    for key, child in (_children(value, {}) or {}).items():
        yield from tensors(child, (*path, key))


def samples(batch: Any) -> int:
    """How many samples a batch has: the length that most of its tensors have, the largest on a tie; else 1."""
    lengths = Counter(len(t) for t in _leaves(batch) if t.ndim)
    return max(lengths, key=lambda n: (lengths[n], n), default=1)


def piece(part: Tensor, whole: Tensor) -> tuple[int, int]:
    """Which samples of `whole` the memory of `part` is, from and to behind: none, (0, 0), if it is no such piece."""
    try:
        memory = part.untyped_storage()
        if memory is not whole.untyped_storage() or not whole.numel() or part.dtype != whole.dtype:
            return 0, 0
        memory.data_ptr()
    except (NotImplementedError, RuntimeError):  # XLA's: offsets say nothing
        return 0, 0
    offset = int(part.storage_offset() - whole.storage_offset())
    start, rest = divmod(offset, max(1, whole.stride(0) if whole.ndim else 1))
    shape = (part.numel() // whole.shape[1:].numel(), *whole.shape[1:])
    stop = start + shape[0]
    inside = whole.ndim and not rest and start >= 0 and stop <= len(whole)
    same = inside and part.numel() == math.prod(shape)
    if not same or _extent(part.shape, part.stride()) != _extent(shape, whole.stride()):
        return 0, 0
    return start, stop


def plain(t: Tensor) -> Tensor:
    """`t` as an ordinary tensor; what computes by itself, such as DTensor, stays as it is."""
    mine = type(t) is Tensor or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return t if mine else Tensor.as_subclass(t, Tensor)


def dressed(t: Tensor, like: Tensor) -> Tensor:
    """The ordinary tensor `t` as what `like` is: its subclass and its metadata."""
    if isinstance(like, nn.Parameter) or plain(like) is like:
        return t
    t = Tensor.as_subclass(t, type(like))
    t.__dict__.update({name: copy.copy(value) for name, value in vars(like).items()})
    return t


def _is_array(value: Any) -> bool:
    """Whether it is an array of NumPy, which need not be installed."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _extent(shape: Iterable[int], strides: Iterable[int]) -> int:
    """How far from the first element the last one lies in memory."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _reach(batch: Any, path: Path) -> list[tuple[Path, Any]]:
    """What stands at `path`, each with the keys that lead to it; nothing if any of it is not there."""
    found: list[tuple[Path, Any]] = [((), batch)]
    for key in path:
        try:
            found = [((*to, k), v) for to, value in found for k, v in _at(value, key)]
        except (LookupError, TypeError, AttributeError, ValueError):
            return []
    return found


def _at(value: Any, key: Any) -> list[tuple[Any, Any]]:
    """What stands at one key of a container, with the key as `_children` takes it."""
    if isinstance(value, Tensor | str):
        raise TypeError
    if key is ...:
        if not isinstance(value, list | tuple):
            raise TypeError
        return list(enumerate(value))
    if isinstance(value, list | tuple):  # negative indices; names of a named tuple
        if isinstance(key, str):
            key = value._fields.index(key)  # type: ignore[union-attr]
        return [(range(len(value))[key], value[key])]
    if isinstance(key, str) and not isinstance(value, Mapping) and hasattr(value, key):
        return [(key, getattr(value, key))]
    return [(key, value[key])]


def _children(value: Any, on_path: Iterable[Any]) -> dict[Any, Any] | None:
    """What a container holds, by key; of an object of the user's own its tensors, if it is on the path."""
    if isinstance(value, Tensor | str):
        return None
    if isinstance(value, Mapping):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118 iteration may give others
    if isinstance(value, list | tuple | deque | UserList):
        return dict(enumerate(value))
    if _is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    held = {**_held(value), **{key: _at(value, key)[0][1] for key in on_path}}
    return held or None


def _held(value: Any) -> dict[Any, Any]:
    """What an object of the user's own holds, if that is tensors or arrays, alone or in containers."""
    if isinstance(value, type | nn.Module) or _is_array(value):
        return {}
    if hasattr(value, "__getitem__") and callable(getattr(value, "keys", None)):  # a graph of PyG
        held = {key: value[key] for key in value.keys()}  # noqa: SIM118
    else:
        slots = [s for c in type(value).__mro__ for s in getattr(c, "__slots__", ())]
        held = {s: getattr(value, s) for s in slots if s[:2] != "__" and hasattr(value, s)}
        held |= getattr(value, "__dict__", {})
    found = {}
    for key, v in held.items():
        with contextlib.suppress(RecursionError):  # what holds itself is passed on
            if _is_data(v):
                found[key] = v
    return found


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_data(value: Any, above: tuple[int, ...] = ()) -> bool:
    """Whether it is a tensor or an array, or a container of Python's own that holds some and not itself."""
    if isinstance(value, Tensor) or _is_array(value):
        return True
    if type(value) in PLAIN or (isinstance(value, tuple) and hasattr(value, "_make")):
        inner = value.values() if isinstance(value, dict) else value
    elif _is_dataclass(value):
        inner = (_children(value, ()) or {}).values()
    else:
        return False
    if id(value) in above:
        raise RecursionError
    held = [_is_data(v, (*above, id(value))) for v in inner]  # all of it, for what holds itself
    return any(held)


def _like(value: Any, children: dict[Any, Any]) -> Any:
    """A container like `value` that holds `children` instead."""
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", type(value))  # a named tuple's
        return make(children.values())
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)(children)  # type: ignore[call-arg]
    twin = copy.copy(value)
    if isinstance(value, list | deque | UserList):
        for i, child in children.items():
            twin[i] = child
        return twin
    # Where a container of the user's own keeps what it holds.
    for name, inner in getattr(twin, "__dict__", {}).items():
        if isinstance(inner, dict | list):
            twin.__dict__[name] = copy.copy(inner)
    for key, child in children.items():
        attribute = isinstance(key, str) and not isinstance(value, Mapping) and hasattr(value, key)
        if not attribute:
            twin[key] = child
        else:
            try:
                setattr(twin, key, child)
            except Exception:  # a frozen one
                object.__setattr__(twin, key, child)
    return twin


def named(path: Path) -> str:
    """A path as a text of its own."""
    return "".join("[...]" if k is ... else f"[{k!r}]" for k in path)


def _name(path: Path) -> str:
    shown = ", ".join("..." if k is ... else repr(k) for k in path)
    return f"key={shown}" if len(path) == 1 else f"key=({shown})"


def _hint(batch: Any) -> str:
    """What the batch looks like, and which key its input probably has."""
    what, children = f"it is a {type(batch).__name__}", _children(batch, ())
    if children is None:
        return what
    shown = ", ".join(f"{k!r}: {type(v).__name__}" for k, v in list(children.items())[:8])
    path = next((path for path, t in tensors(batch) if t.is_floating_point()), None)
    return f"{what} with {{{shown}}}; {_cure(batch, path)}"


def _floats(batch: Any, value: Tensor) -> str:
    """What to do where the input is of whole numbers."""
    images = "convert it before the replay (images: x.float() / 255, or ToDtype(torch.float32, scale=True))"
    if value.is_complex():
        return "perturb real and imaginary parts, x = torch.view_as_real(x) in the loader and torch.view_as_complex in the model"
    if value.dtype == torch.uint8 or value.ndim > 2:
        return images
    tokens = "for tokens perturb what they are embedded to: at=model.get_input_embeddings()"
    like = (path for path, t in tensors(batch) if t.is_floating_point() and t.ndim > 1)
    path = next(like, None)
    return f"{_cure(batch, path)}; {tokens}" if path else f"{tokens}; or {images}"


def _cure(batch: Any, path: Path | None) -> str:
    """The key to pass for the input at `path`: never that of one element of a list of its like."""
    if not path:
        return "name its path with key="
    every = path
    for i in range(len(path)):
        wider = (*every[:i], ..., *path[i + 1 :])
        like = _reach(batch, wider) if i or (isinstance(batch, list) and path[1:]) else []
        if like and all(isinstance(t, Tensor) and t.is_floating_point() for _, t in like):
            every = wider
    several = (
        " if each of them is one sample without a batch dimension; if each is a batch, such as one "
    )
    several += "of two views, a list of their keys"
    return f"perhaps {_name(every)}{several if ... in every else ''}"
