"""delta: the perturbation that is carried from minibatch to minibatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_adv.checks import Start, choice, positive
from free_adv.threat import ThreatModel, finite

SHAPES = 16  # of how many sample shapes the buffers are kept from one minibatch to the next

# The number of a minibatch in the window, of a micro-batch in that, and in that the path of an input, or the
# number of a call of `at`.
Place = tuple[int, int, str | int]


class Key(NamedTuple):
    """What a buffer belongs to: whatever stands at this place with this sample shape and precision."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype


class Rows(NamedTuple):
    """Some rows of a buffer."""

    key: Key
    start: int
    stop: int

    def meets(self, other: Rows) -> bool:
        """Whether they have a row in common."""
        return self.key == other.key and self.start < other.stop and other.start < self.stop


class Delta:
    """A buffer for each place and sample shape, in pixel units, as long as the largest batch seen there.

    A shorter batch leaves the other rows as they are. Buffers are float32 (float64 for float64 input) whatever the
    precision of the input, live on the device of the input and have its layout. Those of the sixteen shapes last
    in use are kept, in that order.
    """

    def __init__(self, threat: ThreatModel, step_size: float | None, start: Start) -> None:
        choice("start", start, Start)
        self.threat, self.start = threat, start
        self.step_size = as_step_size(step_size)
        self.load({})

    @property
    def length(self) -> float:
        """That of an ascent step."""
        return self.threat.eps if self.step_size is None else self.step_size

    def load(self, buffers: dict[Key, Tensor]) -> None:
        """Hold these buffers; they follow the input to its device when next used."""
        self.buffers = buffers
        self.seen = {key[1:] for key in buffers}  # the shapes whose values have been looked at

    def __getitem__(self, rows: Rows) -> Tensor:
        return self.buffers[rows.key][rows.start : rows.stop]

    def rows(
        self, x: Tensor, place: Place, taken: Mapping[Key, int] | None = None, first: int = 0
    ) -> Rows:
        """The rows for `x`, shape (N, ...), at a place: from a first one on, or behind those taken of the buffer."""
        self.threat.check(x, values=False)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = Key(place, tuple(x.shape[1:]), dtype)
        start = first if taken is None else taken.get(key, 0)
        rows = Rows(key, start, start + len(x))
        if key[1:] not in self.seen:
            self.threat.check(x, doubts=not self.seen)
        # The last in use comes last. In one assignment: an interrupt finds the old buffers or the new ones.
        others = {k: b for k, b in self.buffers.items() if k != key}
        self.buffers = {**others, key: _fitted(self.buffers.get(key), x, rows)}
        self.seen.add(key[1:])
        return rows

    def begin(self, rows: Rows) -> None:
        """Set delta as a new minibatch finds it: carried over, zero, or uniform in the ball."""
        if self.start == "zero":
            self[rows].zero_()
        elif self.start == "uniform":
            self.threat.randomise(self[rows])

    @torch.no_grad()
    def ascend(self, rows: Rows, grad: Tensor) -> None:
        """One step of steepest ascent and projection of those rows (Algorithm 1 of the paper)."""
        delta = self[rows]
        self.threat.steepest(delta, grad.to(delta.device), self.length)

    def enter(self, threat: ThreatModel) -> None:
        """Go on in the ball of another threat model: all of delta is projected into it."""
        self.threat = threat
        for buffer in self.buffers.values():
            threat.project(buffer)

    def forget(self) -> None:
        """Keep memory bounded where there is no end of shapes: drop those longest out of use."""
        shapes = [*dict.fromkeys(key[1:] for key in reversed(self.buffers))]
        if len(shapes) > SHAPES:
            kept = shapes[:SHAPES]
            self.buffers = {key: b for key, b in self.buffers.items() if key[1:] in kept}


class Move(torch.autograd.Function):
    """The sum of an input and its rows of delta, held inside the bounds.

    The gradient at the sum goes to both as if it were not held. Nothing of the input is kept for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,
        threat: ThreatModel,
        arrived: Callable[[], object],
        noise: Tensor | None,
    ) -> Tensor:
        """See `torch.autograd.Function`; `arrived` is told of the gradient, and raises if its time is over."""
        ctx.set_materialize_grads(False)  # a gradient that does not come is no gradient of zeros
        ctx.arrived, ctx.dtype = arrived, leaf.dtype
        return threat.perturb(x, leaf if noise is None else leaf + noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if grad is None:
            return (None,) * 5
        ctx.arrived()
        # A copy: its producer may use that memory again, as CUDA graphs do.
        return grad if ctx.needs_input_grad[0] else None, finite(grad, ctx.dtype), None, None, None


def as_step_size(value: Any) -> float | None:
    """The argument `step_size`: None stands for eps."""
    return None if value is None else positive("step_size", value)


def _fitted(old: Tensor | None, x: Tensor, rows: Rows) -> Tensor:
    """The buffer, long enough and where `x` is."""
    kept = 0 if old is None else len(old)
    if old is not None and (not len(x) or (old.device == x.device and kept >= rows.stop)):
        return old
    like = x[:1].expand(max(rows.stop, kept), *x.shape[1:]) if len(x) else x
    new = torch.zeros_like(like, dtype=rows.key.dtype)
    if old is not None:
        new[:kept] = old
    return new
