"""delta: the perturbation that is carried from minibatch to minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_adv.checks import LATE, Start, choice, positive, vanishing
from free_adv.threat import ThreatModel, finite

Key = tuple[tuple[int, ...], torch.dtype, int]  # sample shape, precision, place in the window
SHAPES = 16  # of how many shapes the buffers are kept from one minibatch to the next


class Rows(NamedTuple):
    """The rows of one buffer that belong to one input of a batch."""

    key: Key
    start: int
    stop: int


class Slot:
    """One batch that was yielded.

    Attributes:
        leaves: For the rows of delta that moved it, those rows as a leaf, which gets their gradient. With
            `at` there is none until that module has run, and one for each of its calls.
        over: Whether the loop has moved on, so that a gradient would come too late.
        calls: The calls of the module `at` in this forward pass, whose gradients are still to come.
        used: The rows of its calls since all samples have been through.
        left: How many samples have not been through.
    """

    def __init__(self, samples: int, inside: bool) -> None:
        self.leaves: dict[Rows, Tensor] = {}
        self.over = False
        self.samples = samples
        self.inside = inside
        self._begin()

    def _begin(self) -> None:
        self.calls: dict[Rows, Callable[[], object]] = {}  # by rows, a weak reference to the graph
        self.used: list[Rows] = []
        self.left = self.samples
        self.before = self.used, self.left  # this forward pass

    @property
    def waits(self) -> bool:
        """Whether a gradient is still to come."""
        self._release()
        for leaf in self.leaves.values():
            if leaf.grad is None:
                return True
        return not self.leaves

    def _release(self) -> None:
        """Take back the rows of calls that were given up: their graphs are gone."""
        for rows, graph in [*self.calls.items()]:
            if graph() is None:
                del self.calls[rows]
                self.used.remove(rows)
                if self.leaves[rows].grad is None:
                    del self.leaves[rows]

    def turn(self, size: int) -> None:
        """A call of the module `at` begins, with an output of that length."""
        self._release()
        if self.calls:
            return  # a further call of the same pass
        self.used, self.left = self.before  # the last pass may have been given up
        self.before = [*self.used], self.left
        if size > self.left:  # all have been through
            self.used, self.left = [], self.samples
        self.left -= min(size, self.left)

    def arrive(self, rows: Rows) -> None:
        """The gradient of a call has come: the next one begins a forward pass."""
        if self.calls.pop(rows, None):
            self.before = self.used, self.left

    def forget(self) -> None:
        """Drop the gradients that have arrived: the batch begins anew."""
        for leaf in self.leaves.values():
            leaf.grad = None
        if self.inside:
            self.leaves = {}
            self._begin()


class Delta:
    """One buffer per sample shape and place in the window, in pixel units, as long as the largest minibatch.

    A minibatch uses the leading rows, so a short last batch leaves the others as they are. Buffers
    are float32 (float64 for float64 input) whatever the precision of the input, live on the device
    of the input and have its layout. The sixteen shapes last in use are kept, in that order.
    """

    def __init__(self, threat: ThreatModel, step_size: float | None, start: Start) -> None:
        choice("start", start, Start)
        self.threat = threat
        self.step_size = threat.eps if step_size is None else positive("step_size", step_size)
        self.start = start
        self.load({})

    def load(self, buffers: dict[Key, Tensor]) -> None:
        """Hold these buffers; they follow the input to its device when next used."""
        self.buffers = buffers
        self.seen = {key[:2] for key in buffers}  # the shapes whose values have been looked at
        self.fresh: set[Key] = set()  # those of which no gradient has been looked at
        self.latest: list[tuple[Tensor, Rows]] = []  # what was moved last, and by which rows

    def __getitem__(self, rows: Rows) -> Tensor:
        return self.buffers[rows.key][rows.start : rows.stop]

    def place(self, x: Tensor, before: Iterable[Rows] = (), place: int = 0) -> Rows:
        """Assign rows to an input, behind those `before` it that share its buffer."""
        self.threat.check(x, values=False)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (tuple(x.shape[1:]), dtype, place)
        if key[:2] not in self.seen:
            self.threat.check(x, doubts=not self.seen)
            self.fresh.add(key)
        start = max((rows.stop for rows in before if rows.key == key), default=0)
        rows = Rows(key, start, start + len(x))
        # The last in use comes last. In one assignment: an interrupt finds the old buffers or the new ones.
        others = {k: b for k, b in self.buffers.items() if k != key}
        self.buffers = {**others, key: _fitted(self.buffers.get(key), x, rows)}
        self.seen.add(key[:2])
        return rows

    def begin(self, rows: Rows) -> None:
        """Set delta as a new minibatch finds it: carried over, zero, or uniform in the ball."""
        if self.start == "zero":
            self[rows].zero_()
        elif self.start == "uniform":
            self.threat.randomise(self[rows])

    def move(self, x: Tensor, rows: Rows, slot: Slot, last: bool = False) -> Tensor:
        """`x + delta` held inside the bounds; the gradient there arrives at the slot's leaf for these rows.

        Of a new shape it is looked at in the last replay: before, weights may begin at zero.
        """
        leaf = slot.leaves.get(rows)
        if leaf is None:
            leaf = slot.leaves[rows] = self[rows].detach().requires_grad_()
        with torch.enable_grad():
            moved: Tensor = Move.apply(x, leaf, self.threat, slot, rows)
        if last and rows.key in self.fresh:
            self.fresh.remove(rows.key)
            moved.register_hook(vanishing)  # type: ignore[no-untyped-call]
        return moved

    @torch.no_grad()
    def ascend(self, rows: Rows, grad: Tensor) -> None:
        """One step of steepest ascent and projection of those rows (Algorithm 1 of the paper)."""
        delta = self[rows]
        self.threat.climb(delta, grad.to(delta.device), self.step_size)

    def forget(self) -> None:
        """Keep memory bounded where there is no end of shapes: drop those longest out of use."""
        shapes = dict.fromkeys(key[:2] for key in reversed(self.buffers))
        for key in [key for key in self.buffers if key[:2] in [*shapes][SHAPES:]]:
            del self.buffers[key]
        if any(rows.key not in self.buffers for _, rows in self.latest):
            self.latest = []


class Move(torch.autograd.Function):
    """The sum of an input and its rows of delta, held inside the bounds.

    The gradient at the sum goes to both as if it were not held. Nothing of the input is kept for it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, leaf: Tensor, threat: ThreatModel, slot: Slot, rows: Rows
    ) -> Tensor:
        """See `torch.autograd.Function`."""
        ctx.set_materialize_grads(False)  # a gradient that does not come is no gradient of zeros
        ctx.slot, ctx.rows = slot, rows
        return threat.perturb(x, leaf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if grad is None:
            return (None,) * 5
        if ctx.slot.over:
            raise RuntimeError(LATE)
        ctx.slot.arrive(ctx.rows)
        # A copy: its producer may use that memory again, as CUDA graphs do.
        copy = finite(grad, ctx.rows.key[1])
        return grad if ctx.needs_input_grad[0] else None, copy, None, None, None


def _fitted(old: Tensor | None, x: Tensor, rows: Rows) -> Tensor:
    """The buffer, long enough and where `x` is."""
    kept = 0 if old is None else len(old)
    if old is not None and (not len(x) or (old.device == x.device and kept >= rows.stop)):
        return old
    like = x[:1].expand(max(rows.stop, kept), *x.shape[1:]) if len(x) else x
    new = torch.zeros_like(like, dtype=rows.key[1])
    if old is not None:
        new[:kept] = old
    return new
