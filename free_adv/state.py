"""The state of a run as a dict of tensors and plain values, and the way back from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from free_adv.batch import move, rebuilt, tensors
from free_adv.checks import describe, warn
from free_adv.delta import Delta
from free_adv.group import Group
from free_adv.loop import Loop

VERSION = 2
KEYS = {"version", "settings", "rank", "delta", "places", "window", "done"}


def dump(loop: Loop) -> dict[str, Any]:
    """See `FreeAdversarial.state_dict`."""
    group = loop.settle()
    return {
        "version": VERSION,
        "settings": _settings(loop),
        "rank": _rank(),
        "delta": [buffer.clone() for buffer in loop.delta.buffers.values()],
        "places": [place for *_, place in loop.delta.buffers],
        # Copies: a view would take all the data that it is a view of into the file.
        "window": None if group is None else [[*map(_copy, batches)] for batches in group.window],
        "done": 0 if group is None else group.done,
    }


def load(loop: Loop, state: Any) -> None:
    """See `FreeAdversarial.load_state_dict`."""
    try:
        state = _current(state)
        _demand_settings(loop, state["settings"])
        delta, group = _read(loop, state)
    except (ValueError, TypeError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever else a malformed state may run into
        raise ValueError(f"state cannot be read: {error}") from error
    loop.leave()
    loop.newest = None
    loop.delta.load(delta.buffers)
    if group is not None:
        group.delta = loop.delta
    loop.group, loop.resumed = group, group is not None
    if state["rank"] != _rank():
        (theirs, of_theirs), (mine, of_mine) = state["rank"], _rank()
        warn(
            f"the state is that of rank {theirs} of {of_theirs}, but this is rank {mine} of {of_mine}, "
            "whose delta and minibatch in flight were others: save the state of each rank in a file of "
            "its own; ignore this if the number of ranks has changed on purpose"
        )


def _current(state: Any) -> dict[str, Any]:
    """`state` with the keys of this version."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    version = state.get("version", VERSION)
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(
            f"state has version {version!r}, but this release reads version {VERSION}; load it with the "
            "release that has saved it"
        )
    if missing := KEYS.difference(state):
        raise ValueError(
            f"state lacks {sorted(missing)}; it must come from FreeAdversarial.state_dict()"
        )
    if unknown := set(state).difference(KEYS):
        raise ValueError(f"state has unknown entries {sorted(map(repr, unknown))}")
    return {**state, "rank": [*state["rank"]] if _is_list(state["rank"]) else state["rank"]}


def _demand_settings(loop: Loop, theirs: Any) -> None:
    if not isinstance(theirs, Mapping):
        raise TypeError(f"state['settings'] must be a dict, got {type(theirs).__name__}")
    for name, mine in _settings(loop).items():
        if not _same(theirs.get(name), mine):
            raise ValueError(
                f"state was made with {name}={theirs.get(name)!r}, but this object has {name}={mine!r}; "
                "construct it with the same settings"
            )


def _read(loop: Loop, state: dict[str, Any]) -> tuple[Delta, Group | None]:
    """What the state holds, checked, without touching what is in flight."""
    rank, window, done = state["rank"], state["window"], state["done"]
    if not (_is_list(rank) and len(rank) == 2 and all(map(_is_count, rank)) and rank[0] < rank[1]):
        raise ValueError(f"state['rank'] must be [rank, number of ranks], got {rank!r}")
    if window is not None and not (_is_list(window) and window and all(map(_is_list, window))):
        raise ValueError(f"state['window'] must be a list of minibatches, got {window!r:.80}")
    if not _is_count(done) or done > loop.replays * len(window or ()):
        raise ValueError(f"state['done'] must be a number of updates made, got {done!r}")
    delta = _delta(loop.delta, state["delta"], state["places"])
    if window is None:
        return delta, None
    most = max(map(len, window))
    if len(window) > loop.window or not 0 < most <= loop.accumulate:
        raise ValueError(
            f"state has {len(window)} minibatches of up to {most} batches, but this object has "
            f"window={loop.window} and accumulate={loop.accumulate}; construct it with the same settings"
        )
    window = [[*map(_copy, batches)] for batches in window]
    for _, t in tensors(window):
        if t.device.type == "meta":
            raise ValueError(f"state has a minibatch without values: {describe(t)}")
    if loop.device is not None:
        window = [[move(batch, loop.device) for batch in batches] for batches in window]
    shapes = _shapes(delta)
    group = Group(delta, window, loop.paths, loop.replays, done)
    if _shapes(delta) != shapes:
        found = ", ".join(describe(x) for inputs in group.inputs or () for _, _, x, _ in inputs)
        raise ValueError(f"state has a minibatch of {found}, but its delta has shapes {shapes}")
    return delta, group


def _delta(old: Delta, buffers: Any, places: Any) -> Delta:
    """A twin of `old` that holds copies of the saved buffers."""
    threat, found = old.threat, {}
    if not _is_list(buffers):
        raise TypeError(f"state['delta'] must be a list of tensors, got {type(buffers).__name__}")
    if not (_is_list(places) and len(places) == len(buffers) and all(map(_is_count, places))):
        raise ValueError(f"state['places'] must be a place for each delta, got {places!r}")
    for buffer, place in zip(buffers, places, strict=True):
        if not isinstance(buffer, Tensor):
            raise TypeError(
                f"state['delta'] must be a list of tensors, got a {type(buffer).__name__} in it"
            )
        what = f"{describe(buffer)}, layout {buffer.layout}"
        dense = buffer.layout == torch.strided and buffer.device.type != "meta"
        if not dense or buffer.dtype not in (torch.float32, torch.float64) or not buffer.ndim:
            raise ValueError(
                f"state['delta'] must hold float32 or float64 of shape (rows, ...), got {what}"
            )
        # Written so that NaN is refused.
        if buffer.numel() and not threat.distance(buffer).max() <= threat.eps * (1 + 1e-4):
            raise ValueError(f"state['delta'] leaves the ball of radius eps={threat.eps}: {what}")
        found[tuple(buffer.shape[1:]), buffer.dtype, place] = buffer.clone()
    if len(found) < len(buffers):
        raise ValueError("state['delta'] has several tensors for one shape and place")
    new = Delta(threat, old.step_size, old.start)
    new.load(found)
    one, other = ({key[:2] for key in delta.buffers} for delta in (old, new))
    if len(one) == len(other) == 1 and one != other:
        raise ValueError(
            f"state has delta of shape {_shapes(new)[0]}, but this object has shape {_shapes(old)[0]}; "
            "construct a new FreeAdversarial to go on from this state"
        )
    return new


def _settings(loop: Loop) -> dict[str, Any]:
    return {**dataclasses.asdict(loop.delta.threat), "replays": loop.replays}


def _rank() -> list[int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [0, 1]
    return [distributed.get_rank(), distributed.get_world_size()]


def _copy(batch: Any) -> Any:
    with torch.no_grad():
        return rebuilt(batch)


def _shapes(delta: Delta) -> list[tuple[int, ...]]:
    return [tuple(buffer.shape) for buffer in delta.buffers.values()]


def _same(theirs: Any, mine: Any) -> bool:
    if isinstance(mine, tuple):  # a list where the state has been through JSON
        alike = isinstance(theirs, list | tuple) and len(theirs) == len(mine)
        return alike and all(map(_same, theirs, mine))
    return isinstance(theirs, int | float | str | None) and theirs == mine


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
