"""The batches that are replayed together: their order, what was yielded of them, and the gradients they wait for."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from free_adv.batch import Path, dressed, find, length, nested, plain, rebuilt
from free_adv.delta import Delta, Rows, Slot
from free_adv.tally import Tally

# Where it is, as the loader gave it, as a batch of its own, its rows of delta.
Input = tuple[Path, Tensor, Tensor, Rows]


class Group:
    """The batches that are replayed together: `window` minibatches, each of up to `accumulate` batches.

    Attributes:
        batches: What the loader gave, on the device of the training.
        inputs: The inputs of each batch; None where the output of a module is perturbed.
        order: What is to come, an update each: the turn, and which batches.
        slots: The batches of it that were yielded. A consumer may take as many as `accumulate` before it
            trains on them, so of a short minibatch they may be several replays'.
        past: The batches that were taken in since the latest was yielded: they may still be in use.
        rows: The rows of each batch when it was last yielded.
        latest: The batches of the update to which the latest one belongs, and whether it is their last.
        turn: That of the last forward pass of the module `at`; an empty one if it was not moved.
    """

    def __init__(
        self,
        delta: Delta,
        window: list[list[Any]],
        paths: list[Path] | None,
        replays: int,
        done: int = 0,
    ) -> None:
        self.delta, self.window, self.paths, self.replays = delta, window, paths, replays
        self.batches = [batch for minibatch in window for batch in minibatch]
        stops = itertools.accumulate(map(len, window))
        self.parts = [range(n - len(m), n) for m, n in zip(window, stops, strict=True)]
        self.order = [(turn, part) for turn in range(replays) for part in self.parts if part][done:]
        self.slots: list[Slot] = []
        self.past: list[Slot] = []
        self.rows: list[Iterable[Rows]] = [()] * len(self.batches)
        self.latest: tuple[range, bool] | None = None
        self.turn: Slot | None = None
        self.sizes = [0 if paths else length(batch) for batch in self.batches]
        self.inputs: list[list[Input]] | None = None
        if paths is not None:
            found = [[(path, at) for path in paths for at in find(b, path)] for b in self.batches]
            taken: list[Rows] = []
            self.inputs = [
                [self._place(path, *at, taken, self.place(i)) for path, at in inputs]
                for i, inputs in enumerate(found)
            ]
            for i, ((_, _, x, rows), *others) in enumerate(self.inputs):
                self.sizes[i] = 1 + len(others) if x.ndim == len(rows.key[0]) else len(x)

    def place(self, index: int) -> int:
        """The place in the window of that batch's minibatch."""
        return next(place for place, part in enumerate(self.parts) if index in part)

    def _place(self, path: Path, at: Path, given: Tensor, taken: list[Rows], place: int) -> Input:
        """Assign rows of delta to an input, behind those that are taken."""
        x = plain(given.detach())
        taken.append(self.delta.place(x[None] if ... in path else x, taken, place))
        return at, given, x, taken[-1]

    @property
    def done(self) -> int:
        """How many updates have been made."""
        return self.replays * sum(map(bool, self.window)) - len(self.order)

    @property
    def todo(self) -> int:
        """How many batches are still to be yielded."""
        return sum(len(part) for _, part in self.order) - len(self.slots)

    def coming(self, place: int) -> tuple[int, range, int]:
        """Turn, update and index of the batch whose slot has that place."""
        batches = ((turn, part, i) for turn, part in self.order for i in part)
        return next(itertools.islice(batches, place, None))

    def next(self) -> Any:
        """The next batch in fresh containers, the perturbed input in its place."""
        self.close(self.past)
        turn, part, index = self.coming(len(self.slots))
        slot = Slot(self.sizes[index], inside=self.inputs is None)
        self.slots.append(slot)
        self.rows[index] = slot.leaves
        self.latest = part, index == part[-1]
        self.turn = None
        if self.inputs is None:
            return rebuilt(self.batches[index])
        moved = []
        for path, given, x, rows in self.inputs[index]:
            one = x.ndim == len(rows.key[0])  # a sample without a batch dimension
            t = self.delta.move(x[None] if one else x, rows, slot, turn == self.replays - 1)
            moved.append((path, dressed(t[0] if one else t, given)))
        self.delta.latest = [(x, rows) for _, _, x, rows in self.inputs[index]]
        return rebuilt(self.batches[index], nested(moved))

    def inside(self, output: Tensor) -> Tensor:
        """`output` of the module `at`, moved by rows of the first batch that is not through."""
        if not self.slots:  # between the gradient and the next batch
            self.turn = Slot(0, inside=True)
            return output
        fits = (i for i, s in enumerate(self.slots) if s.waits or s.left >= len(output) > 0)
        place = next(fits, len(self.slots) - 1)
        turn, _, index = self.coming(place)
        self.turn = slot = self.slots[place]
        slot.turn(len(output))
        peers = itertools.chain(*self.rows[:index], slot.used)
        rows = self.delta.place(output, peers, self.place(index))
        if turn == 0 and rows not in slot.leaves:
            self.delta.begin(rows)
        moved = self.delta.move(output, rows, slot, turn == self.replays - 1)
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

    def take_in(self, tally: Tally | None = None) -> None:
        """Move delta along the gradients of all replays that have received theirs."""
        while self.order:
            turn, part = self.order[0]
            size = len(part)
            replay = self.slots[:size]
            if len(replay) < size or any(slot.waits for slot in replay):
                return
            for slot in replay:
                for rows, leaf in slot.leaves.items():
                    if tally is not None and leaf.grad is not None:
                        tally.gradient(turn, self.delta[rows], leaf.grad, self.delta.threat)
                    if leaf.grad is not None:
                        self.delta.ascend(rows, leaf.grad)
            for slot in replay:
                slot.forget()  # the loop's last loss still holds the leaves
            self.past += replay
            del self.slots[:size], self.order[0]
            if tally is not None:
                tally.updates += 1

    def skip(self) -> None:
        """Leave out the minibatch of the latest batch; the others of the window go on."""
        if self.latest is None:
            self.order = []
            return
        part, _ = self.latest
        self.close(self.past)
        self.close(self.slots)
        self.order = [(turn, p) for turn, p in self.order if p != part]
        self.window[self.place(part.start)] = []

    def close(self, slots: list[Slot]) -> None:
        """Their time is over."""
        for slot in slots:
            slot.over = True
        slots.clear()
