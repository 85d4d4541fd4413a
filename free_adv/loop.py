"""The loop that is running: its settings, and the group of batches in flight."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from free_adv.batch import Path, move
from free_adv.checks import CURES
from free_adv.delta import Delta
from free_adv.group import Group
from free_adv.tally import Tally


@dataclasses.dataclass
class Loop:
    """What a `FreeAdversarial` shares with its iterators and its module."""

    moving: ClassVar[bool] = False  # whether a `step`, of any loop, is at the optimizers

    delta: Delta
    replays: int
    accumulate: int
    window: int
    paths: list[Path] | None  # to the inputs; None where delta belongs to the output of a module
    several: bool  # whether there may be more than one input
    device: torch.device | None
    optimizers: list[Optimizer]
    scaler: GradScaler | None
    max_norm: float | None
    group: Group | None = None
    stepped: bool = False  # whether `step` has moved the weights for the latest batch
    resumed: bool = False  # the group comes from a state and no iterator has begun it
    newest: object = None  # the iterator that may go on
    tally: Tally | None = None  # once a report was asked for
    told: set[str] = dataclasses.field(default_factory=set)  # what was warned of, once

    def open(self) -> object:
        """Start a new iterator: older ones end here, with the gradients they still hold."""
        self.settle()
        if not self.resumed:
            self.leave()
        self.newest = object()
        return self.newest

    def read(self, batches: list[Any]) -> Group:
        """Make a group of what the loader gave."""
        if self.device is not None:
            batches = [move(batch, self.device) for batch in batches]
        k = self.accumulate
        window = [batches[i : i + k] for i in range(0, len(batches), k)]
        group = Group(self.delta, window, self.paths, self.replays)
        for batch, inputs in zip(batches, group.inputs or (), strict=False):
            for _, given, _, rows in inputs:
                if self.device is not None and given.device.type != self.device.type:
                    raise TypeError(
                        f"device={str(self.device)!r} cannot move the {type(batch).__name__} that the loader "
                        f"gave: its input is still on {given.device}; give it a method to(device), or move "
                        "it in the loader"
                    )
                self.delta.begin(rows)
        self.group = group
        return group

    def settle(self) -> Group | None:
        """Take in the gradients that the loop's own backward passes have left; what is in flight."""
        if self.group is not None:
            self.group.take_in(self.tally)
        return self.group

    def demand(self, group: Group) -> None:
        """Take in what has arrived.

        Raises:
            RuntimeError: A gradient has not arrived that must have: no loop takes more than `accumulate`.
        """
        group.take_in(self.tally)
        if not group.slots:
            return
        turn, part = group.order[0]
        whole = all(len(p) == self.accumulate for p in group.parts)
        full = whole and len(group.slots) == len(part)
        late = sum(slot.waits for slot in group.slots) >= self.accumulate
        if full or late or not group.todo:
            raise RuntimeError(
                f"replay {turn + 1} of {self.replays} received no gradient, so delta "
                f"cannot move and training would not be adversarial.\n{CURES}"
            )

    def skip(self) -> None:
        """Leave out the minibatch of the latest batch; the others of its window go on."""
        group = self.settle()
        if group is None:
            raise RuntimeError(
                "skip() expects a minibatch in flight: call it inside the replay's loop"
            )
        group.skip()
        if self.tally is not None:
            self.tally.skipped += 1
        if not group.order:
            self.leave()

    def report(self) -> dict[str, Any]:
        """See `FreeAdversarial.report`."""
        self.settle()
        if self.tally is None:
            self.tally = Tally(self.replays)
        return self.tally.read()

    def latest(self, tensors: list[Tensor]) -> Tensor | list[Tensor] | None:
        """Copies: one tensor for one input, a list for several or if samples differ in shape."""
        if not tensors:
            return None
        several = self.several or len({t.shape[1:] for t in tensors}) > 1
        return [t.clone() for t in tensors] if several else torch.cat(tensors)

    def leave(self) -> None:
        """Drop what is in flight: its gradients would come too late."""
        group, self.group, self.resumed = self.group, None, False
        if group is not None:
            group.close(group.past)
            group.close(group.slots)

    def clear(self) -> None:
        """Drop delta and any batch in flight."""
        self.leave()
        self.delta.load({})
        self.newest = None
