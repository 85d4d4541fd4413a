"""The minibatch in flight: what is replayed, how far it is, and the gradients it waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from free_adv.batches import Path, find, put, tree_map
from free_adv.perturbation import Perturbation, Rows

CURES = """\
Each batch that replay() yields needs one backward pass through its input. Look for:
- no backward pass before the next batch: call free.step(loss) or loss.backward() for every batch;
- a forward pass under torch.no_grad(): move it out;
- an input cut off from its graph (x.detach(), x.data, torch.tensor(x)): give the model x itself;
- a wrapper round the replay that takes batches ahead: wrap it the other way, free.replay(wrapper);
- several batches per optimizer step: pass FreeAdversarial(..., accumulate=<that number>)."""


@dataclasses.dataclass
class Flight:
    """What is in flight: the one place where a `FreeAdversarial` and its iterators keep their state."""

    perturbation: Perturbation
    replays: int
    accumulate: int
    path: Path
    device: torch.device | None
    minibatch: Minibatch | None = None
    resumed: bool = False  # the minibatch comes from a state and waits for the next iterator
    newest: object = None  # the iterator that may go on
    latest: tuple[Tensor, Rows] | None = None  # the clean input and the rows of the latest batch

    def open(self) -> object:
        """Start a new iterator: older ones end here, with the gradients they still hold."""
        self.settle()
        if not self.resumed:
            self.minibatch = None
        self.resumed = False
        self.newest = object()
        return self.newest

    def settle(self) -> None:
        """Take in the gradients that a loop has left by its last backward pass, before a `break`."""
        if self.minibatch is not None and self.minibatch.finished:
            self.minibatch.take_in()

    def state_dict(self) -> dict[str, Any]:
        """See `FreeAdversarial.state_dict`."""
        self.settle()
        minibatch = self.minibatch
        return {
            "version": 1,
            "settings": self._settings(),
            "delta": [buffer.clone() for buffer in self.perturbation.buffers.values()],
            "minibatch": None if minibatch is None else list(minibatch.batches),
            "done": 0 if minibatch is None else minibatch.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `FreeAdversarial.load_state_dict`."""
        missing = {"version", "settings", "delta", "minibatch", "done"}.difference(state)
        if missing:
            raise ValueError(
                f"state lacks {sorted(missing)}; it must come from FreeAdversarial.state_dict()"
            )
        if state["version"] != 1:
            raise ValueError(
                f"state has version {state['version']!r}, but this release reads version 1"
            )
        for name, mine in self._settings().items():
            theirs = state["settings"].get(name)
            if theirs != mine:
                raise ValueError(
                    f"state was made with {name}={theirs!r}, but this object has {name}={mine!r}; "
                    "construct it with the same settings"
                )
        old = self.perturbation.buffers
        try:
            self.perturbation.load(state["delta"])
            batches = state["minibatch"]
            minibatch = None if batches is None else Minibatch(self, batches, state["done"])
        except Exception:
            self.perturbation.buffers = old
            raise
        self.minibatch, self.resumed = minibatch, minibatch is not None
        self.newest = self.latest = None

    def clear(self) -> None:
        """Drop delta and any batch in flight."""
        self.perturbation.buffers = {}
        self.minibatch = self.newest = self.latest = None
        self.resumed = False

    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.perturbation.threat), "replays": self.replays}


class Minibatch:
    """The batches that are replayed together: one, or with `accumulate` a group of them.

    Attributes:
        batches: What the loader gave, on the device of the training.
        done: How many replays have been taken in.
        leaves: For each batch that this replay has yielded so far, the tensor that gets its gradient.
    """

    def __init__(self, flight: Flight, batches: list[Any], done: int = 0) -> None:
        self.flight = flight
        self.batches = batches
        self.done = done
        self.leaves: list[Tensor] = []
        self.inputs = [find(batch, flight.path) for batch in batches]
        self.rows = flight.perturbation.place(self.inputs)

    @property
    def complete(self) -> bool:
        """Whether this replay has yielded all its batches."""
        return len(self.leaves) == len(self.batches)

    @property
    def finished(self) -> bool:
        """Whether all the batches of this replay have their gradient."""
        return self.complete and self.waiting is None

    @property
    def waiting(self) -> int | None:
        """Index of the first yielded batch that has no gradient yet."""
        return next((i for i, leaf in enumerate(self.leaves) if leaf.grad is None), None)

    def share(self, index: int) -> float:
        """Weight of one batch's mean in the mean over the minibatch."""
        total = sum(len(x) for x in self.inputs)
        return len(self.inputs[index]) / total if total else 1.0

    def perturbed(self) -> Any:
        """The next batch of this replay in fresh containers, the perturbed input in its place."""
        index = len(self.leaves)
        batch, x, rows = self.batches[index], self.inputs[index], self.rows[index]
        with torch.no_grad():
            moved = self.flight.perturbation.perturb(x, rows)
        leaf = moved.detach().requires_grad_()
        with torch.enable_grad():
            moved = _Tap.apply(leaf, moved)
        self.leaves.append(leaf)
        self.flight.latest = (x, rows)
        fresh = tree_map(lambda t: t if t is x else t.clone(), batch)
        return put(fresh, self.flight.path, moved)

    def take_in(self) -> None:
        """Move delta along the gradients of this replay.

        Raises:
            RuntimeError: A batch of this replay has received no gradient.
        """
        grads = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if len(grads) < len(self.leaves):
            raise RuntimeError(
                f"replay {self.done + 1} of {self.flight.replays} received no gradient, so delta "
                f"cannot move and training would not be adversarial.\n{CURES}"
            )
        with torch.no_grad():
            for rows, grad in zip(self.rows, grads, strict=True):
                self.flight.perturbation.ascend(rows, grad)
        self.leaves.clear()
        self.done += 1


class _Tap(torch.autograd.Function):
    """Makes `x` a non-leaf whose gradient arrives on `leaf`, without a copy.

    `x` may then be changed in place, as Mixup and normalisation do, which a leaf may not.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
