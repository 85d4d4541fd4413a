"""Finding and replacing the input inside whatever a loader yields."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

Path = tuple[int | str, ...]


def as_path(key: Any) -> Path:
    """The argument `key` as a path: an index or a name, or several of them."""
    path = key if isinstance(key, tuple) else (key,)
    if not path or not all(isinstance(k, int | str) for k in path):
        raise TypeError(f"key must be an index, a name or a tuple of them, got {key!r}")
    return path


def find(batch: Any, path: Path) -> Tensor:
    """The tensor at `path`; a bare tensor is its own element 0.

    Raises:
        ValueError: There is nothing at that path.
        TypeError: What is there is not a tensor.
    """
    value = batch
    for key in _steps(batch, path):
        value = _child(batch, path, value, key)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the input at {_name(path)} must be a tensor, got {type(value).__name__}; "
            f"{_hint(batch)}"
        )
    return value


def put(batch: Any, path: Path, x: Tensor) -> Any:
    """`batch` with `x` at `path`; lists and dicts are changed in place, other containers rebuilt."""
    return _replaced(batch, path, batch, _steps(batch, path), x)


def _replaced(batch: Any, path: Path, value: Any, steps: Path, x: Tensor) -> Any:
    # No closure that calls itself: such a cycle would keep x and its gradient until a garbage collection.
    if not steps:
        return x
    key = steps[0]
    child = _replaced(batch, path, _child(batch, path, value, key), steps[1:], x)
    if isinstance(value, tuple):
        if isinstance(key, str):
            key = value._fields.index(key)  # type: ignore[attr-defined]
        items = list(value)
        items[key] = child
        return _like(value, items)
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)({**value, key: child})  # type: ignore[call-arg]
    if not isinstance(value, list | MutableMapping):
        value = copy.copy(value)  # tree_map leaves an object of the user's own as it was
    if isinstance(key, str) and not isinstance(value, Mapping) and hasattr(value, key):
        assign = object.__setattr__ if dataclasses.is_dataclass(value) else setattr  # if frozen
        assign(value, key, child)
    else:
        value[key] = child
    return value


def tree_map(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`fn` of every tensor, in fresh tuples, lists, mappings and dataclasses of the same types."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, MutableMapping):
        fresh = copy.copy(value)
        for key in value:
            fresh[key] = tree_map(fn, value[key])
        return fresh
    if isinstance(value, Mapping):
        return type(value)({key: tree_map(fn, v) for key, v in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        return _like(value, [tree_map(fn, v) for v in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin: Any = copy.copy(value)
        for field in dataclasses.fields(value):  # also of a frozen one
            object.__setattr__(twin, field.name, tree_map(fn, getattr(value, field.name)))
        return twin
    return value


def length(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor, 1 if there is none."""
    lengths: list[int] = []

    def note(t: Tensor) -> Tensor:
        lengths.append(len(t) if t.ndim else 1)
        return t

    tree_map(note, batch)
    return lengths[0] if lengths else 1


def move(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`; pinned memory is copied beside the work that is queued there."""
    if str(device) == "cuda":  # the stream is kept for a device, and the current one may change
        device = torch.device("cuda", torch.cuda.current_device())
    stream = _stream(device)
    asynchronous = device.type != "cpu"  # a copy to the host must have arrived when it is read
    with torch.cuda.stream(stream):
        batch = tree_map(lambda t: t.to(device, non_blocking=asynchronous), batch)
    if stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)

        def keep(t: Tensor) -> Tensor:
            t.record_stream(current)  # its memory is not given away before the replays have used it
            return t

        tree_map(keep, batch)
    return batch


@functools.lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _like(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _steps(batch: Any, path: Path) -> Path:
    return () if isinstance(batch, Tensor) and path == (0,) else path


def _child(batch: Any, path: Path, value: Any, key: int | str) -> Any:
    if isinstance(key, str) and not isinstance(value, Mapping) and hasattr(value, key):
        return getattr(value, key)
    try:
        if isinstance(value, Tensor | str):
            raise TypeError
        return value[key]
    except (LookupError, TypeError, AttributeError):
        raise ValueError(
            f"there is no {_name(path)} in the batch that the loader gave; {_hint(batch)}"
        ) from None


def _name(path: Path) -> str:
    return f"key={path[0]!r}" if len(path) == 1 else f"key={path!r}"


def _hint(batch: Any) -> str:
    """What the batch looks like, and which key its input probably has."""
    if isinstance(batch, Mapping):
        entries: list[tuple[Any, Any]] = list(batch.items())
    elif isinstance(batch, list | tuple):
        entries = list(enumerate(batch))
    else:
        return f"it is a {type(batch).__name__}"
    shown = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in entries[:8])
    place = _floats(batch)
    cure = f"; perhaps {_name(place)}" if place else "; name its place with key="
    return f"it is a {type(batch).__name__} with {{{shown}}}{cure}"


def _floats(value: Any) -> Path | None:
    """Where the first floating-point tensor is."""
    if isinstance(value, Tensor):
        return () if value.is_floating_point() else None
    if not isinstance(value, Mapping | list | tuple):
        return None
    for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
        if (path := _floats(child)) is not None:
            return key, *path
    return None
