"""The minibatch in flight: what is replayed, how far it is, and the gradients it waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from free_adv.batches import Path, find, length, put, tree_map
from free_adv.perturbation import Perturbation, Rows
from free_adv.slot import Slot

CURES = """\
Each batch that replay() yields needs one backward pass through its input. Look for:
- no backward pass before the next batch: call free.step(loss) or loss.backward() for every batch;
- a forward pass under torch.no_grad(): move it out;
- an input cut off from its graph (x.detach(), x.data, torch.tensor(x)): give the model x itself;
- a wrapper round the replay that takes batches ahead: wrap it the other way, free.replay(wrapper);
- a batch left out on purpose, such as one that did not fit into memory: call free.skip() there;
- several batches per optimizer step: pass FreeAdversarial(..., accumulate=<that number>);
- with at=module: a forward pass without that module, by a copy of it, with it in eval mode, after the
  loop was left, or compiled before FreeAdversarial was made (torch._dynamo.reset() once)."""


@dataclasses.dataclass
class Flight:
    """What is in flight: the one place where a `FreeAdversarial` and its iterators keep their state."""

    perturbation: Perturbation
    replays: int
    accumulate: int
    path: Path
    device: torch.device | None
    inside: bool = False  # delta belongs to the output of a module, not to the input
    minibatch: Minibatch | None = None
    resumed: bool = False  # the minibatch comes from a state and no iterator has begun it
    newest: object = None  # the iterator that may go on
    latest: tuple[Tensor, Rows] | None = None  # the clean input and the rows of the latest batch

    def open(self) -> object:
        """Start a new iterator: older ones end here, with the gradients they still hold."""
        self.settle()
        if not self.resumed:
            self.minibatch = None
        self.newest = object()
        return self.newest

    def settle(self) -> Minibatch | None:
        """Take in the gradients that the loop's own backward passes have left; what is in flight."""
        if self.minibatch is not None:
            self.minibatch.take_in()
        return self.minibatch

    def forget(self) -> None:
        """Drop the buffers of shapes that have long been out of use, while no minibatch needs them."""
        self.perturbation.forget()
        if self.latest is not None and self.latest[1].key not in self.perturbation.buffers:
            self.latest = None

    def skip(self) -> None:
        """See `FreeAdversarial.skip`."""
        if self.settle() is None:
            raise RuntimeError(
                "skip() expects a minibatch in flight: call it inside "
                "`for x, y in free.replay(loader):`"
            )
        self.minibatch, self.resumed = None, False

    def clear(self) -> None:
        """Drop delta and any batch in flight."""
        self.perturbation.buffers = {}
        self.minibatch = self.newest = self.latest = None
        self.resumed = False


class Minibatch:
    """The batches that are replayed together: one, or with `accumulate` a group of them.

    Attributes:
        batches: What the loader gave, on the device of the training.
        done: How many replays have been taken in.
        slots: The batches that were yielded since, in that order. A consumer may take as many as
            `accumulate` before it trains on them, so after a short group they may be several replays'.
    """

    def __init__(self, flight: Flight, batches: list[Any], done: int = 0) -> None:
        self.flight = flight
        self.batches = batches
        self.done = done
        self.slots: list[Slot] = []
        self.moved: Slot | None = None  # of the last forward pass of the module `at`
        self.inputs: list[Tensor] = []
        self.rows: list[Rows] = []
        if not flight.inside:
            self.inputs = [find(batch, flight.path) for batch in batches]
            for x in self.inputs:
                self.rows.append(flight.perturbation.place(x, self.rows))

    @property
    def left(self) -> bool:
        """Whether there are batches to yield."""
        return len(self.slots) < (self.flight.replays - self.done) * len(self.batches)

    @property
    def waiting(self) -> int | None:
        """Index of the first yielded batch that has no gradient yet."""
        return next((i for i, slot in enumerate(self.slots) if slot.waiting), None)

    def share(self, index: int) -> float:
        """Weight of one batch's mean in the mean over the minibatch."""
        sizes = [len(x) for x in self.inputs] or [length(batch) for batch in self.batches]
        return sizes[index] / sum(sizes) if sum(sizes) else 1.0

    def next(self) -> Any:
        """The next batch of this replay in fresh containers, the perturbed input in its place."""
        index = len(self.slots) % len(self.batches)
        batch, slot = self.batches[index], Slot()
        self.slots.append(slot)
        self.moved = None
        if self.flight.inside:
            return tree_map(Tensor.clone, batch)
        x = self.inputs[index]
        self.flight.latest = (x, self.rows[index])
        moved = slot.perturb(self.flight.perturbation, x.detach(), self.rows[index])
        return put(tree_map(lambda t: t if t is x else t.clone(), batch), self.flight.path, moved)

    def inside(self, output: Tensor) -> Tensor:
        """`output` of the module `at`, moved by the delta of the first batch that waits for a gradient."""
        perturbation = self.flight.perturbation
        index = self.waiting
        self.moved = slot = Slot() if index is None else self.slots[index]
        if index is None:
            return output
        first = index - index % len(self.batches)
        peers = [rows for peer in self.slots[first:index] for rows in peer.leaves]
        rows = perturbation.place(output, peers)
        if rows not in slot.leaves and self.done == first == 0:
            perturbation.begin([rows])
        self.flight.latest = (output.detach(), rows)
        return slot.perturb(perturbation, output, rows)

    def again(self, output: Tensor) -> Tensor:
        """`output` moved as it was in the forward pass, for a checkpoint that runs the module again."""
        if self.moved is None:
            raise RuntimeError(
                "the module given as at ran without gradients in the forward pass and with them in the "
                "backward pass; checkpoint it with use_reentrant=False"
            )
        for rows in self.moved.leaves:
            if rows.key[0] == output.shape[1:] and rows.stop - rows.start == len(output):
                return self.moved.perturb(self.flight.perturbation, output, rows)
        return output

    def take_in(self) -> None:
        """Move delta along the gradients of all replays that have received theirs."""
        size = len(self.batches)
        while len(self.slots) >= size and not any(slot.waiting for slot in self.slots[:size]):
            with torch.no_grad():
                for slot in self.slots[:size]:
                    slot.ascend(self.flight.perturbation)
            del self.slots[:size]
            self.done += 1

    def demand(self) -> None:
        """Take in what has arrived.

        Raises:
            RuntimeError: A gradient has not arrived that must have.
        """
        self.take_in()
        size, allowed = len(self.batches), self.flight.accumulate
        full = size == allowed and len(self.slots) == size
        late = sum(slot.waiting for slot in self.slots) >= allowed
        if self.slots and (full or late or not self.left):
            raise RuntimeError(
                f"replay {self.done + 1} of {self.flight.replays} received no gradient, so delta "
                f"cannot move and training would not be adversarial.\n{CURES}"
            )
