"""The state of a run as a dict of tensors and plain values, and the way back from it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from free_adv.batches import move, tree_map
from free_adv.checks import describe
from free_adv.minibatch import Flight, Minibatch
from free_adv.perturbation import Perturbation

VERSION = 2
KEYS = {"version", "settings", "rank", "delta", "minibatch", "done"}


def dump(flight: Flight) -> dict[str, Any]:
    """See `FreeAdversarial.state_dict`."""
    minibatch = flight.settle()
    return {
        "version": VERSION,
        "settings": _settings(flight),
        "rank": _rank(),
        "delta": [buffer.clone() for buffer in flight.perturbation.buffers.values()],
        # Copies: a view would take all the data that it is a view of into the file.
        "minibatch": None if minibatch is None else [_copy(batch) for batch in minibatch.batches],
        "done": 0 if minibatch is None else minibatch.done,
    }


def load(flight: Flight, state: Any) -> None:
    """See `FreeAdversarial.load_state_dict`."""
    try:
        state = _current(state)
        _demand_settings(flight, state["settings"])
        perturbation, minibatch = _read(flight, state)
    except (ValueError, TypeError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever else a malformed state may run into
        raise ValueError(f"state cannot be read: {error}") from error
    flight.newest = flight.latest = None
    flight.perturbation.buffers = perturbation.buffers
    flight.minibatch, flight.resumed = minibatch, minibatch is not None
    if state["rank"] not in (None, _rank()):
        (theirs, of_theirs), (mine, of_mine) = state["rank"], _rank()
        warnings.warn(
            f"the state is that of rank {theirs} of {of_theirs}, but this is rank {mine} of {of_mine}, "
            "whose delta and minibatch in flight were others: save the state of each rank in a file of "
            "its own; ignore this if the number of ranks has changed on purpose",
            stacklevel=3,
        )


def _current(state: Any) -> dict[str, Any]:
    """`state` with the keys of this version."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    version = state.get("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"state has version {version!r}, but this release reads versions 1 to {VERSION}; load it "
            "with the release that has saved it"
        )
    current: dict[str, Any] = {"rank": None, **state} if version == 1 else {**state}
    if missing := KEYS.difference(current):
        raise ValueError(
            f"state lacks {sorted(missing)}; it must come from FreeAdversarial.state_dict()"
        )
    if unknown := set(current).difference(KEYS):
        raise ValueError(f"state has unknown entries {sorted(map(repr, unknown))}")
    return current


def _demand_settings(flight: Flight, theirs: Any) -> None:
    if not isinstance(theirs, Mapping):
        raise TypeError(f"state['settings'] must be a dict, got {type(theirs).__name__}")
    for name, mine in _settings(flight).items():
        if not _same(theirs.get(name), mine):
            raise ValueError(
                f"state was made with {name}={theirs.get(name)!r}, but this object has {name}={mine!r}; "
                "construct it with the same settings"
            )


def _read(flight: Flight, state: dict[str, Any]) -> tuple[Perturbation, Minibatch | None]:
    """What the state holds, checked, without touching what is in flight."""
    rank, batches, done = state["rank"], state["minibatch"], state["done"]
    if rank is not None and not (
        _is_list(rank) and len(rank) == 2 and all(map(_is_count, rank)) and rank[0] < rank[1]
    ):
        raise ValueError(f"state['rank'] must be [rank, number of ranks], got {rank!r}")
    if batches is not None and not (_is_list(batches) and batches):
        raise ValueError(f"state['minibatch'] must be a list of batches, got {batches!r:.80}")
    if not _is_count(done) or done > (flight.replays if batches else 0):
        raise ValueError(f"state['done'] must be a number of replays made, got {done!r}")
    twin = dataclasses.replace(flight, perturbation=_perturbation(flight, state["delta"]))
    if batches is None:
        return twin.perturbation, None
    if len(batches) > flight.accumulate:
        raise ValueError(
            f"state has a minibatch of {len(batches)} batches, but this object has "
            f"accumulate={flight.accumulate}; construct it with the same settings"
        )
    batches = [_copy(batch) for batch in batches]
    tree_map(_demand_values, batches)
    if flight.device is not None:
        batches = [move(batch, flight.device) for batch in batches]
    shapes = _shapes(twin.perturbation)
    minibatch = Minibatch(twin, batches, done)
    if _shapes(twin.perturbation) != shapes:
        found = ", ".join(map(describe, minibatch.inputs))
        raise ValueError(f"state has a minibatch of {found}, but its delta has shapes {shapes}")
    minibatch.flight = flight
    return twin.perturbation, minibatch


def _perturbation(flight: Flight, buffers: Any) -> Perturbation:
    threat = flight.perturbation.threat
    if not _is_list(buffers):
        raise TypeError(f"state['delta'] must be a list of tensors, got {type(buffers).__name__}")
    for buffer in buffers:
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
    old = flight.perturbation
    new = Perturbation(threat, old.step_size, old.start)
    new.load(buffers)
    if len(new.buffers) < len(buffers):
        raise ValueError("state['delta'] has several tensors for samples of the same shape")
    if len(old.buffers) == len(new.buffers) == 1 and old.buffers.keys() != new.buffers.keys():
        raise ValueError(
            f"state has delta of shape {_shapes(new)[0]}, but this object has shape {_shapes(old)[0]}; "
            "construct a new FreeAdversarial to go on from this state"
        )
    return new


def _settings(flight: Flight) -> dict[str, Any]:
    return {**dataclasses.asdict(flight.perturbation.threat), "replays": flight.replays}


def _rank() -> list[int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [0, 1]
    return [distributed.get_rank(), distributed.get_world_size()]


def _copy(batch: Any) -> Any:
    return tree_map(lambda t: t.detach().clone(), batch)


def _demand_values(t: Tensor) -> Tensor:
    if t.device.type == "meta":
        raise ValueError(f"state has a minibatch without values: {describe(t)}")
    return t


def _shapes(perturbation: Perturbation) -> list[tuple[int, ...]]:
    return [tuple(buffer.shape) for buffer in perturbation.buffers.values()]


def _same(theirs: Any, mine: Any) -> bool:
    if isinstance(mine, tuple):  # a list where the state has been through JSON
        alike = isinstance(theirs, list | tuple) and len(theirs) == len(mine)
        return alike and all(map(_same, theirs, mine))
    return isinstance(theirs, int | float | str | None) and theirs == mine


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
