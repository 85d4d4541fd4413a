"""The loop that is running: its settings, the group of batches in flight, and the gradients it waits for."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from free_adv.batch import Path, dressed, find, length, move, nested, plain, rebuilt
from free_adv.checks import CURES
from free_adv.delta import Delta, Rows, Slot

# Where it is, as the loader gave it, as a batch of its own, its rows of delta.
Input = tuple[Path, Tensor, Tensor, Rows]


class Group:
    """The batches that are replayed together: one, or up to `accumulate`.

    Attributes:
        batches: What the loader gave, on the device of the training.
        inputs: The inputs of each batch; None where the output of a module is perturbed.
        todo: How many batches are still to be yielded.
        done: How many replays have been taken in.
        slots: The batches that were yielded since, in that order. A consumer may take as many as
            `accumulate` before it trains on them, so of a short group they may be several replays'.
        past: The batches that were taken in since the latest was yielded: they may still be in use.
        turn: That of the last forward pass of the module `at`; an empty one if it was not moved.
    """

    def __init__(
        self,
        delta: Delta,
        batches: list[Any],
        paths: list[Path] | None,
        replays: int,
        done: int = 0,
    ) -> None:
        self.delta = delta
        self.batches = batches
        self.done = done
        self.todo = (replays - done) * len(batches)
        self.slots: list[Slot] = []
        self.past: list[Slot] = []
        self.turn: Slot | None = None
        self.sizes = [0 if paths else length(batch) for batch in batches]
        self.inputs: list[list[Input]] | None = None
        if paths is not None:
            found = [[(path, at) for path in paths for at in find(b, path)] for b in batches]
            taken: list[Rows] = []
            self.inputs = [[self._place(p, *at, taken) for p, at in inputs] for inputs in found]
            for i, ((_, _, x, rows), *others) in enumerate(self.inputs):
                self.sizes[i] = 1 + len(others) if x.ndim == len(rows.key[0]) else len(x)

    def _place(self, path: Path, at: Path, given: Tensor, taken: list[Rows]) -> Input:
        """Assign rows of delta to an input, behind those that are taken."""
        x = plain(given.detach())
        taken.append(self.delta.place(x[None] if ... in path else x, taken))
        return at, given, x, taken[-1]

    def next(self) -> Any:
        """The next batch in fresh containers, the perturbed input in its place."""
        self.close(self.past)
        index = len(self.slots) % len(self.batches)
        slot = Slot(self.sizes[index], inside=self.inputs is None)
        self.slots.append(slot)
        self.todo -= 1
        self.turn = None
        if self.inputs is None:
            return rebuilt(self.batches[index])
        moved = []
        for path, given, x, rows in self.inputs[index]:
            one = x.ndim == len(rows.key[0])  # a sample without a batch dimension
            t = self.delta.move(x[None] if one else x, rows, slot)
            moved.append((path, dressed(t[0] if one else t, given)))
        self.delta.latest = [(x, rows) for _, _, x, rows in self.inputs[index]]
        return rebuilt(self.batches[index], nested(moved))

    def inside(self, output: Tensor) -> Tensor:
        """`output` of the module `at`, moved by rows of the first batch that is not through."""
        if not self.slots:  # between the gradient and the next batch
            self.turn = Slot(0, inside=True)
            return output
        fits = (i for i, s in enumerate(self.slots) if s.waits or s.left >= len(output) > 0)
        index = next(fits, len(self.slots) - 1)
        self.turn = slot = self.slots[index]
        slot.turn(len(output))
        first = index - index % len(self.batches)
        peers = [rows for peer in self.slots[first:index] for rows in peer.leaves]
        rows = self.delta.place(output, [*peers, *slot.used])
        if rows not in slot.leaves and self.done == first == 0:
            self.delta.begin(rows)
        moved = self.delta.move(output, rows, slot)
        slot.calls[rows] = weakref.ref(moved.grad_fn)
        self.delta.latest = [*(self.delta.latest if slot.used else ()), (output.detach(), rows)]
        slot.used.append(rows)
        return moved

    def again(self, output: Tensor) -> Tensor:
        """`output` moved as it was in the forward pass, for a checkpoint that runs the module again."""
        if self.turn is not None and not self.turn.leaves:
            return output
        shape, leaves = output.shape, {} if self.turn is None else self.turn.leaves
        fits = [(x, r) for x, r in self.delta.latest if x.shape == shape and r in leaves]
        if len(fits) > 1:  # several calls of one shape
            fits = [(x, r) for x, r in fits if torch.equal(x, output)]
        if self.turn is None or len(fits) != 1:
            raise RuntimeError(
                "a checkpoint runs the module given as at again, and it cannot be told which of its calls "
                "in the forward pass that was: checkpoint it with use_reentrant=False, or leave the "
                "module out of the checkpoint"
            )
        return self.delta.move(output, fits[0][1], self.turn)

    def take_in(self) -> None:
        """Move delta along the gradients of all replays that have received theirs."""
        size = len(self.batches)
        while len(replay := self.slots[:size]) == size and not any(s.waits for s in replay):
            for slot in replay:
                for rows, leaf in slot.leaves.items():
                    if leaf.grad is not None:
                        self.delta.ascend(rows, leaf.grad)
            for slot in replay:
                slot.forget()  # the loop's last loss still holds the leaves
            self.past += replay
            del self.slots[:size]
            self.done += 1

    def close(self, slots: list[Slot]) -> None:
        """Their time is over."""
        for slot in slots:
            slot.over = True
        slots.clear()


@dataclasses.dataclass
class Loop:
    """What a `FreeAdversarial` shares with its iterators and its module."""

    delta: Delta
    replays: int
    accumulate: int
    paths: list[Path] | None  # to the inputs; None where delta belongs to the output of a module
    several: bool  # whether there may be more than one input
    device: torch.device | None
    optimizers: list[Optimizer]
    scaler: GradScaler | None
    max_norm: float | None
    group: Group | None = None
    resumed: bool = False  # the group comes from a state and no iterator has begun it
    newest: object = None  # the iterator that may go on
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
        group = Group(self.delta, batches, self.paths, self.replays)
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
            self.group.take_in()
        return self.group

    def demand(self, group: Group) -> None:
        """Take in what has arrived.

        Raises:
            RuntimeError: A gradient has not arrived that must have: no loop takes more than `accumulate`.
        """
        group.take_in()
        full = len(group.slots) == len(group.batches) == self.accumulate
        late = sum(slot.waits for slot in group.slots) >= self.accumulate
        if group.slots and (full or late or not group.todo):
            raise RuntimeError(
                f"replay {group.done + 1} of {self.replays} received no gradient, so delta "
                f"cannot move and training would not be adversarial.\n{CURES}"
            )

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
