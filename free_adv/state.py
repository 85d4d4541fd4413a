"""The state of a run as a dict of tensors and plain values, and the way back from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from free_adv.ascents import as_ascents
from free_adv.batch import move, rebuilt, tensors
from free_adv.checks import describe, level
from free_adv.delta import Delta, Key
from free_adv.flight import Flight
from free_adv.loop import Loop
from free_adv.threat import ThreatModel

VERSION = 3
BROUGHT = ("eps", "step_size", "ascents", "noise")  # settings that a state brings with it
FORM: dict[str, tuple[Any, str]] = {  # a list stands for any number of its element
    "version": (int, "a number"),
    "settings": (Mapping, "a dict"),
    "rank": ([int], "[rank, number of ranks]"),
    "delta": ([Tensor], "a list of tensors"),
    "places": ([[(int, str)]], "a place for each delta"),
    "begun": ([int], "numbers of rows"),
    "noise": ([Tensor], "a list of tensors"),
    "minibatches": ([[object]], "a list of minibatches"),
    "done": (int, "a number of updates made"),
}


def dump(loop: Loop) -> dict[str, Any]:
    """See `FreeAdversarial.state_dict`."""
    flight = loop.settle()
    begun, noise = flight.before or (flight.begun, flight.noise)
    return {
        "version": VERSION,
        "settings": {**settings(loop), "in flight": [flight.ascents, flight.level]}
        if flight.minibatches
        else settings(loop),
        "rank": _rank(),
        "delta": [buffer.clone() for buffer in loop.delta.buffers.values()],
        "places": [key.place for key in loop.delta.buffers],
        "begun": [begun.get(key, 0) for key in loop.delta.buffers],
        "noise": [noise.get(key, b[:0]).clone() for key, b in loop.delta.buffers.items()],
        # Copies: a view would take all the data that it is a view of into the file.
        "minibatches": [[_copy(micro.batch) for micro in m] for m in flight.minibatches] or None,
        "done": flight.done,
    }


def load(loop: Loop, state: Any) -> None:
    """See `FreeAdversarial.load_state_dict`."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    if missing := FORM.keys() - state.keys():
        raise ValueError(
            f"state lacks {sorted(missing)}; it must come from FreeAdversarial.state_dict()"
        )
    if unknown := state.keys() - FORM.keys():
        raise ValueError(f"state has unknown entries {sorted(map(repr, unknown))}")
    if repr(state["version"]) != repr(VERSION):
        raise ValueError(
            f"state has version {state['version']!r}, but this release reads version {VERSION}; load it with the "
            "release that has saved it"
        )
    for name, (form, words) in FORM.items():
        if not _fits(state[name], form) and not (name == "minibatches" and state[name] is None):
            raise ValueError(f"state[{name!r}] must be {words}, got {state[name]!r:.80}")
    if len(state["rank"]) != 2 or state["rank"][0] >= state["rank"][1]:
        raise ValueError(
            f"state['rank'] must be [rank, number of ranks], got {state['rank']!r:.80}"
        )
    theirs = {**state["settings"]}
    for name, mine in settings(loop).items():
        if name not in BROUGHT and repr(_tuples(theirs.get(name))) != repr(mine):
            raise ValueError(
                f"state was made with {name}={theirs.get(name)!r}, but this object has {name}={mine!r}; "
                "construct it with the same settings"
            )
    try:
        threat = dataclasses.replace(loop.delta.threat, eps=theirs["eps"])
        delta = Delta(threat, theirs.get("step_size"), loop.delta.start)
        delta.load(_buffers(loop.delta, threat, state["delta"], state["places"]))
        for name in ("begun", "noise"):
            if len(state[name]) != len(delta.buffers):
                raise ValueError(f"state[{name!r}] must be {FORM[name][1]}, one for each delta")
        begun = dict(zip(delta.buffers, state["begun"], strict=True))
        noise = {k: n.clone() for k, n in zip(delta.buffers, state["noise"], strict=True) if len(n)}
        ascents = as_ascents(theirs["ascents"], loop.objective)
        radius = level("noise", theirs["noise"])
        flight = _flight(loop, delta, state["minibatches"] or [], state["done"])
        _check_rows(begun, noise, delta.buffers)
        flight.begun, flight.noise = begun, noise
        # That with which it was read, if others were assigned since.
        budget = theirs.get("in flight") if flight.minibatches else None
        budget = (ascents, radius) if budget is None else budget
        if not _fits(budget, [object]) or len(budget) != 2:
            raise ValueError(
                f"state's budget in flight must be [ascents, noise], got {budget!r:.80}"
            )
        made, beside = budget
        flight.ascents, flight.level = as_ascents(made, loop.objective), level("noise", beside)
        delta.buffers = {key: b for key, b in delta.buffers.items() if loop.has(key.place)}
    except (ValueError, TypeError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever else a malformed state may run into
        raise ValueError(f"state cannot be read: {error}") from error
    loop.leave()
    loop.newest = None
    loop.ascents, loop.noise = ascents, radius
    loop.delta.threat, loop.delta.step_size = delta.threat, delta.step_size
    loop.delta.load(delta.buffers)
    flight.delta = loop.delta
    loop.flight = flight
    loop.hints.told |= delta.seen  # shapes whose gradients were looked at
    loop.hints.of_the_rank([*state["rank"]], _rank())


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list | tuple) and all(_fits(v, form[0]) for v in value)
    if form in (int, (int, str)) and isinstance(value, int):
        return not isinstance(value, bool) and value >= 0
    return isinstance(value, form)


def _tuples(value: Any) -> Any:
    """Lists as tuples: a state may have been through JSON."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _flight(loop: Loop, delta: Delta, minibatches: list[list[Any]], done: int) -> Flight:
    """The minibatches that were in flight, without touching those that are."""
    most = max(map(len, minibatches), default=0)
    if len(minibatches) > loop.window or most > loop.accumulate or (minibatches and not most):
        raise ValueError(
            f"state has {len(minibatches)} minibatches of up to {most} batches, but this object has "
            f"window={loop.window} and accumulate={loop.accumulate}; construct it with the same settings"
        )
    if done > loop.replays * len(minibatches):
        raise ValueError(f"state['done'] must be a number of updates made, got {done!r}")
    minibatches = [[*map(_copy, batches)] for batches in minibatches]
    for _, t in tensors(minibatches):
        if t.is_meta:
            raise ValueError(f"state has a minibatch without values: {describe(t)}")
    if loop.device is not None:
        minibatches = [[move(batch, loop.device) for batch in m] for m in minibatches]
    shapes = _shapes(delta)
    flight = loop.flight_of(delta, minibatches, done)
    if sorted(_shapes(delta)) != sorted(shapes):  # those in flight come last by now
        found = ", ".join(describe(i.x) for micro in flight.micros for i in micro.inputs)
        raise ValueError(f"state has a minibatch of {found}, but its delta has shapes {shapes}")
    return flight


def _buffers(
    old: Delta, threat: ThreatModel, buffers: list[Tensor], places: list[Any]
) -> dict[Key, Tensor]:
    """Copies of the saved buffers."""
    if len(places) != len(buffers) or any(len(place) != 3 for place in places):
        raise ValueError(f"state['places'] must be a place for each delta, got {places!r:.80}")
    found = {}
    for buffer, place in zip(buffers, places, strict=True):
        what = f"{describe(buffer)}, layout {buffer.layout}"
        dense = buffer.layout == torch.strided and not buffer.is_meta and buffer.ndim
        if not dense or buffer.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"state['delta'] must hold float32 or float64 of shape (rows, ...), got {what}"
            )
        # Written so that NaN is refused.
        if buffer.numel() and not threat.distance(buffer).max() <= threat.eps * (1 + 1e-4):
            raise ValueError(f"state['delta'] leaves the ball of radius eps={threat.eps}: {what}")
        found[Key((*place,), tuple(buffer.shape[1:]), buffer.dtype)] = buffer.clone()
    if len(found) < len(buffers):
        raise ValueError("state['delta'] has several tensors for one shape and place")
    seen = {key[1:] for key in found}
    if len(old.seen) == len(seen) == 1 and old.seen != seen:
        shapes = [tuple(next(iter(b.values())).shape) for b in (found, old.buffers)]
        raise ValueError(
            f"state has delta of shape {shapes[0]}, but this object has shape {shapes[1]}; "
            "construct a new FreeAdversarial to go on from this state"
        )
    return found


def _check_rows(
    begun: dict[Key, int], noise: dict[Key, Tensor], buffers: dict[Key, Tensor]
) -> None:
    for key, b in buffers.items():
        count, n = begun.get(key, 0), noise.get(key)
        if count > len(b):
            raise ValueError(f"state['begun'] counts {count} rows of a delta that has {len(b)}")
        like = n is None or (n.shape, n.dtype) == (b[:count].shape, b.dtype)
        if not like or not (n is None or n.isfinite().all()):
            raise ValueError(
                "state['noise'] must be finite, of the shape and dtype of its delta, a row for each that has begun"
            )


def settings(loop: Loop) -> dict[str, Any]:
    """What a state and the object that loads it must agree on, or what it brings."""
    threat = dataclasses.asdict(loop.delta.threat)
    more = {"replays": loop.replays, "ascents": loop.ascents, "noise": loop.noise}
    return {**threat, "step_size": loop.delta.step_size, **more}


def _rank() -> list[int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [0, 1]
    return [distributed.get_rank(), distributed.get_world_size()]


def _copy(batch: Any) -> Any:
    with torch.no_grad():
        return rebuilt(batch)


def _shapes(delta: Delta) -> list[tuple[int, ...]]:
    return [tuple(buffer.shape) for buffer in delta.buffers.values()]
