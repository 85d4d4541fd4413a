"""The loop that is running: its settings, and what is in flight."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from free_adv.ascents import Objective, climb
from free_adv.batch import Path, move, rebuilt
from free_adv.checks import CURES, OFF
from free_adv.delta import Delta, Place
from free_adv.flight import Flight
from free_adv.hints import Hints
from free_adv.report import Report


@dataclasses.dataclass(eq=False)
class Loop:
    """What a `FreeAdversarial` shares with its iterators and its module."""

    moving: ClassVar[bool] = False  # whether a `step`, of any loop, is at the optimizers
    # All that were, by id. No set under a lock: an interrupt could leave the lock taken for ever.
    iterated: ClassVar[weakref.WeakValueDictionary[int, Loop]] = weakref.WeakValueDictionary()

    delta: Delta
    replays: int
    accumulate: int
    window: int
    paths: list[Path]  # to the inputs; none where delta belongs to the output of a module
    several: bool  # whether there may be more than one input
    device: torch.device | None
    optimizers: list[Optimizer]
    scaler: GradScaler | None
    max_norm: float | None
    ascents: int = 0
    objective: Objective | None = None
    noise: float = 0.0
    newest: object = None  # the iterator that may go on
    yielded: int = 0  # how many batches
    driven: bool = False  # whether `step` was ever called
    spent: bool = True  # whether the weights may have gradients that the next update is not to have
    report: Report = dataclasses.field(default_factory=Report)
    hints: Hints = dataclasses.field(default_factory=Hints)

    def __post_init__(self) -> None:
        self.flight = self.flight_of(self.delta, [])

    def flight_of(self, delta: Delta, minibatches: list[list[Any]], done: int = 0) -> Flight:
        """Those minibatches, to be replayed."""
        return Flight(
            delta,
            self.hints,
            self.paths,
            minibatches,
            self.replays,
            done,
            self.ascents,
            self.noise,
        )

    @property
    def resumed(self) -> bool:
        """Whether the flight is one that no iterator has begun, as it comes from a state."""
        return bool(self.flight.minibatches) and self.flight.latest is None

    @property
    def stepped(self) -> bool:
        """Whether `step` has moved the weights for the latest batch."""
        return self.spent and bool(self.flight.past)

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizers move."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [p for group in groups for p in group["params"]]

    def has(self, place: Place) -> bool:
        """Whether a minibatch of this loop can stand there."""
        return place[0] < self.window and place[1] < self.accumulate

    def open(self) -> object:
        """Start a new iterator: older ones end here, with the gradients they still hold."""
        self.settle()
        if not self.resumed:
            self.leave()
        self.newest = object()
        Loop.iterated[id(self)] = self
        return self.newest

    def held(self, batch: Any) -> Any:
        """What the loader gave, on the device of the training; a copy if the loader goes on before it is used up."""
        if self.device is not None:
            batch = move(batch, self.device)
        return rebuilt(batch) if self.accumulate * self.window > 1 else batch

    def read(self, batches: list[Any]) -> None:
        """Begin with what the loader gave."""
        k = self.accumulate
        minibatches = [batches[i : i + k] for i in range(0, len(batches), k)]
        flight = self.flight_of(self.delta, minibatches)
        for batch, inputs, _ in flight.micros:
            for *_, x, _ in inputs:
                if self.device is not None and x.device.type != self.device.type:
                    raise TypeError(
                        f"device={str(self.device)!r} cannot move the {type(batch).__name__} that the loader "
                        f"gave: its input is still on {x.device}; give it a method to(device), or move "
                        "it in the loader"
                    )
        self.flight = flight

    def next(self) -> Any:
        """The next batch; with the first of an update, the gradients of the one before go."""
        flight = self.flight
        begins = self.spent and flight.coming.micro == 0 and not flight.waiting  # not taken ahead
        if begins:
            self.clean_weights()
        if flight.ascents and self.objective is not None and flight.new:
            climb(flight, self.objective, self.scaler, self.report)
            if begins:  # of what else the objective may have done
                self.clean_weights()
        self.yielded += 1
        return flight.next()

    @property
    def alone(self) -> bool:
        """Whether no other loop under way moves some of these weights, in which gradients of this one would count."""
        loops = [ref() for ref in Loop.iterated.valuerefs()]  # a copy, which no thread changes
        others = [o for o in loops if o is not None and o is not self and o.newest and o.optimizers]
        mine = {*map(id, self.parameters)} if others else set()
        return not any(id(p) in mine for other in others for p in other.parameters)

    def clean_weights(self) -> None:
        """Drop the gradients that `step` has made, and those from before the first batch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.spent, self.hints.summed = False, None

    def settle(self) -> Flight:
        """Take in the gradients that have arrived; what is in flight."""
        while update := self.flight.update():
            for visit in update:
                self.hints.of_the_climb(self.flight.climbed, visit)
                for rows, grad in visit.gradients():
                    if self.report.sums:
                        delta = self.delta[rows]
                        self.report.gradient(visit.stop.turn, delta, grad, self.delta.threat)
                    self.delta.ascend(rows, grad)
            self.flight.leave(update)
            self.report.updates += 1
            self.hints.of_an_update()
        return self.flight

    def demand(self) -> None:
        """Take in what has arrived.

        Raises:
            RuntimeError: A gradient has not arrived that must have: no loop takes more than `accumulate`.
        """
        flight = self.settle()
        if not flight.waiting:
            return
        turn, minibatch, *_ = flight.stops[0]
        whole = all(len(m) == self.accumulate for m in flight.minibatches if m)
        full = whole and len(flight.waiting) == len(flight.minibatches[minibatch])
        late = sum(visit.waits for visit in flight.waiting) >= self.accumulate
        if full or late or not flight.todo:
            off = "" if torch.is_grad_enabled() else OFF
            raise RuntimeError(
                f"replay {turn + 1} of {self.replays} received no gradient, so delta "
                f"cannot move and training would not be adversarial. {off}{CURES}"
            )

    def skip(self) -> None:
        """Leave out the minibatch of the latest batch; the others of its window go on."""
        flight = self.settle()
        flight.outside("skip")
        if not flight.minibatches:
            raise RuntimeError(
                "skip() expects a minibatch in flight: call it inside the replay's loop"
            )
        flight.skip()
        self.report.skipped += 1
        if not flight.stops:
            self.leave()

    def moved(self, delta: bool) -> Tensor | list[Tensor] | None:
        """Copies of what was moved last, or of its delta: a list for several inputs or if samples differ in shape."""
        for visit in self.flight.waiting[-1:]:
            visit.seen = True
        self.hints.of_the_latest([v.seen for v in self.flight.waiting if v.waits])
        found, moved = [], [*self.flight.moved.items()]
        for i, (rows, x) in enumerate(moved):
            if rows.key not in self.delta.buffers:
                return None
            if not any(rows.meets(later) for later, _ in moved[i + 1 :]):
                found.append(self.delta[rows].reshape(x.shape) if delta else x)
        if not found:
            return None
        several = self.several or len({t.shape[1:] for t in found}) > 1
        return [t.clone() for t in found] if several else torch.cat(found)

    def leave(self) -> None:
        """Drop what is in flight: its gradients would come too late."""
        self.flight.close()

    def clear(self) -> None:
        """Drop delta and any batch in flight."""
        self.leave()
        self.delta.load({})
        self.flight, self.newest = self.flight_of(self.delta, []), None
