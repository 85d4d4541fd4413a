"""delta: the perturbation that is carried from minibatch to minibatch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from free_adv.checks import positive
from free_adv.threat import ThreatModel

Key = tuple[tuple[int, ...], torch.dtype]
SHAPES = 16  # how many buffers are kept from one minibatch to the next


class Rows(NamedTuple):
    """The rows of one buffer that belong to one batch."""

    key: Key
    start: int
    stop: int


class Perturbation:
    """One buffer of delta per sample shape, in pixel units, as long as the largest minibatch seen.

    A minibatch uses the leading rows, so a short last batch leaves the others as they are. Buffers
    are float32 (float64 for float64 input) whatever the precision of the input, live on the device
    of the input and have its layout. The sixteen shapes last in use are kept, in that order.
    """

    def __init__(self, threat: ThreatModel, step_size: float | None, start: str) -> None:
        if start not in ("carry", "zero", "uniform"):
            raise ValueError(f"start must be 'carry', 'zero' or 'uniform', got {start!r}")
        self.threat = threat
        self.step_size = threat.eps if step_size is None else positive("step_size", step_size)
        self.start = start
        self.buffers: dict[Key, Tensor] = {}

    def place(self, x: Tensor, before: Iterable[Rows] = ()) -> Rows:
        """Assign rows to a batch, behind those of its minibatch that share its sample shape."""
        self.threat.check_form(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (tuple(x.shape[1:]), dtype)
        if key not in self.buffers:
            self.threat.check_values(x)
        start = max((rows.stop for rows in before if rows.key == key), default=0)
        rows = Rows(key, start, start + len(x))
        self._fit(key, x, rows.stop)
        return rows

    def forget(self) -> None:
        """Keep memory bounded where there is no end of shapes: drop those longest out of use."""
        for key in list(self.buffers)[:-SHAPES]:
            del self.buffers[key]

    def begin(self, rows: Sequence[Rows]) -> None:
        """Set delta as a new minibatch finds it: carried over, zero, or uniform in the ball."""
        for r in rows:
            if self.start == "zero":
                self[r].zero_()
            elif self.start == "uniform":
                self.threat.randomise(self[r])

    def perturb(self, x: Tensor, rows: Rows) -> Tensor:
        """`x + delta` held inside the bounds, as a new tensor."""
        return self.threat.perturb(x, self[rows])

    def ascend(self, rows: Rows, grad: Tensor) -> None:
        """One step of steepest ascent and projection of those rows (Algorithm 1 of the paper)."""
        delta = self[rows]
        self.threat.ascend(delta, grad.to(delta.device), self.step_size)

    def load(self, buffers: Sequence[Tensor]) -> None:
        """Take over copies of saved buffers; they follow the input to its device when next used."""
        self.buffers = {(tuple(b.shape[1:]), b.dtype): b.clone() for b in buffers}

    def __getitem__(self, rows: Rows) -> Tensor:
        return self.buffers[rows.key][rows.start : rows.stop]

    def _fit(self, key: Key, x: Tensor, length: int) -> None:
        """Make the buffer long enough, and bring it to where `x` is."""
        old = self.buffers.get(key)
        if old is not None and (not len(x) or (old.device == x.device and len(old) >= length)):
            new = old
        else:
            kept = 0 if old is None else len(old)
            rows = x[:1].expand(max(length, kept), *x.shape[1:]) if len(x) else x
            new = torch.zeros_like(rows, dtype=key[1])
            if old is not None:
                new[:kept] = old
        # The last in use comes last. In one assignment: an interrupt finds the old buffers or the new ones.
        self.buffers = {**{k: b for k, b in self.buffers.items() if k != key}, key: new}
