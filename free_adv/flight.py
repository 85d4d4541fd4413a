"""What is in flight: the minibatches that are replayed, and the visits of their micro-batches to the loop."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_adv.batch import (
    Path,
    dressed,
    find,
    named,
    nested,
    piece,
    plain,
    rebuilt,
    samples,
    tensors,
)
from free_adv.checks import LATE
from free_adv.delta import Delta, Key, Move, Rows
from free_adv.hints import Hints


class Input(NamedTuple):
    """An input of a micro-batch."""

    path: Path
    given: Tensor  # as it is in the batch
    x: Tensor  # the same as an ordinary tensor of shape (N, ...)
    rows: Rows


class Micro(NamedTuple):
    """A micro-batch, on the device of the training."""

    batch: Any
    inputs: list[Input]  # none where the output of a module is perturbed
    size: int  # how many samples it has


class Stop(NamedTuple):
    """A micro-batch in one of its replays."""

    turn: int  # which replay
    minibatch: int  # which one of the window
    micro: int  # which one of that minibatch
    ends: bool  # whether the update is made with it


@dataclass(eq=False)
class Call:
    """A call of the module `at` whose gradient is to come.

    Attributes:
        which: The path of what it was given; its number since the last backward pass if that is unknown.
        start: The first sample that goes through in it.
        stop: The sample behind the last one.
        per: How many rows a sample has.
        now: Whether it is of the forward pass that is under way.
        rows: What moves its output.
        graph: Its node of the graph, while there is one.
    """

    which: str | int
    start: int
    stop: int
    per: int
    now: bool = True
    rows: Rows | None = None
    graph: Callable[[], object] = lambda: None

    def has(self, rows: Rows) -> bool:
        """Whether it may be the call that was moved by those rows."""
        return (rows.key.place[2], rows.start) == (self.which, self.start * self.per)


@dataclass(eq=False)
class Visit:
    """A stop that was yielded. A graph that a loop keeps holds it.

    Attributes:
        size: How many samples the micro-batch has.
        inside: Whether the output of a module is perturbed.
        given: The tensors that were yielded, and where in the batch: a call of `at` is known by them.
        clean: What delta has moved.
        leaves: The rows that have moved it, each a leaf that gets the gradient.
        calls: Those of the module `at` whose gradients are to come.
        through: How many samples have been through, by the number of the call.
        behind: Whether a further batch was yielded after its calls.
        seen: Whether what has moved was asked for while it was the latest.
        over: Whether the loop has moved on, so that a gradient would come too late.
    """

    stop: Stop
    size: int
    inside: bool
    given: list[tuple[Path, Tensor]] = field(default_factory=list)
    clean: dict[Rows, Tensor] = field(default_factory=dict)
    leaves: dict[Rows, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    through: dict[str | int, int] = field(default_factory=dict)
    behind: bool = False
    seen: bool = False
    over: bool = False

    @property
    def waits(self) -> bool:
        """Whether a gradient is still to come."""
        self.release()
        for leaf in self.leaves.values():
            if leaf.grad is None:
                return True
        return not self.leaves

    def release(self) -> None:
        """Take back calls that were given up: their graphs are gone."""
        dead = [call for call in self.calls if call.graph() is None] if self.calls else ()
        if not dead:
            return
        self.calls = [call for call in self.calls if call not in dead]
        alive = [call.rows for call in self.calls]
        for rows in [call.rows for call in dead]:
            if rows in self.leaves and rows not in alive and self.leaves[rows].grad is None:
                del self.leaves[rows], self.clean[rows]

    def arrived(self, call: Call | None = None) -> None:
        """A gradient has come: the next call begins a forward pass."""
        if self.over:
            raise RuntimeError(LATE)
        if call in self.calls:
            self.calls.remove(call)
            self.through[call.which] = call.stop
            for other in self.calls:
                other.now = False

    def gradients(self) -> Iterator[tuple[Rows, Tensor]]:
        """What has come, once for each buffer: rows that overlap have their sum, rows between them zero."""
        found: dict[Key, list[tuple[Rows, Tensor]]] = {}
        for rows, leaf in self.leaves.items():
            if leaf.grad is not None:
                found.setdefault(rows.key, []).append((rows, leaf.grad))
        for key, parts in found.items():
            whole, total = parts[0]
            if parts[1:]:
                whole = Rows(key, min(r.start for r, _ in parts), max(r.stop for r, _ in parts))
                total = total.new_zeros(whole.stop - whole.start, *key.shape)
                for r, grad in parts:
                    total[r.start - whole.start : r.stop - whole.start] += grad
            yield whole, total

    def forget(self) -> None:
        """Drop the gradients that have come, which a kept loss would hold: it begins anew."""
        for leaf in self.leaves.values():
            leaf.grad = None
        if self.inside:
            self.leaves, self.calls, self.through = {}, [], {}


class Flight:
    """The minibatches that are replayed together: they take turns, *m* times, with an update after each.

    Attributes:
        minibatches: Those of the window, each of up to `accumulate` micro-batches; one that was skipped is empty.
        stops: Those whose gradients have not been taken in, in their order.
        waiting: The visits of those of them that were yielded. A consumer may take as many as `accumulate`
            before it trains on them, so of a short minibatch they may be several replays'.
        past: The visits that were taken in since the latest was yielded: they may still be in use.
        latest: The stop that was yielded last.
        moved: What delta has moved last.
        begun: How many rows of a buffer have begun with these minibatches.
        noise: What lies beside the rows that have begun, if `level` is not 0: its radius, in radii of the ball.
        before: While a batch climbs, `begun` and `noise` as they were: what has not climbed to the end begins anew.
        climbed: The buffers that the batch of an objective has met.
    """

    def __init__(
        self,
        delta: Delta,
        hints: Hints,
        paths: list[Path],
        given: list[list[Any]],
        replays: int,
        done: int = 0,
        ascents: int = 0,
        level: float = 0.0,
    ) -> None:
        self.delta, self.hints, self.replays = delta, hints, replays
        self.ascents, self.level = ascents, level
        for batch in itertools.chain(*given):  # refuse one before delta is touched
            for path in paths:
                find(batch, path)
        self.minibatches = [
            [_micro(batch, paths, delta, w, i) for i, batch in enumerate(minibatch)]
            for w, minibatch in enumerate(given)
        ]
        self.stops = [
            Stop(turn, w, i, ends=i == len(minibatch) - 1)
            for turn in range(replays)
            for w, minibatch in enumerate(given)
            for i in range(len(minibatch))
        ]
        for _ in range(done):
            del self.stops[: 1 + next(i for i, stop in enumerate(self.stops) if stop.ends)]
        self.waiting: list[Visit] = []
        self.past: list[Visit] = []
        self.latest: Stop | None = None
        self.moved: dict[Rows, Tensor] = {}
        self.begun: dict[Key, int] = {}
        self.noise: dict[Key, Tensor] = {}
        self.before: tuple[dict[Key, int], dict[Key, Tensor]] | None = None
        self.climbed: set[Key] = set()
        self.calling: Visit | None = None  # to which the last call belongs, since the latest

    @property
    def micros(self) -> list[Micro]:
        """All micro-batches."""
        return [micro for minibatch in self.minibatches for micro in minibatch]

    @property
    def todo(self) -> int:
        """How many batches are still to be yielded."""
        return len(self.stops) - len(self.waiting)

    @property
    def done(self) -> int:
        """How many updates have been made."""
        return self.replays * sum(map(bool, self.minibatches)) - sum(s.ends for s in self.stops)

    def share(self, visit: Visit) -> float:
        """The share of a visit in the mean over the samples of its minibatch."""
        sizes = [micro.size for micro in self.minibatches[visit.stop.minibatch]]
        return visit.size / sum(sizes) if any(sizes) else 1.0

    def next(self) -> Any:
        """The next batch in fresh containers, the perturbed inputs in their places."""
        self._close(self.past)
        for visit in self.waiting:
            visit.behind = bool(visit.leaves)
            if not visit.waits:  # of no use any more
                visit.clean = {}
        self.latest = self.coming
        visit = self._visit(self.latest)
        batch = self._batch(visit)
        self.waiting.append(visit)
        return batch

    @property
    def coming(self) -> Stop:
        """The stop that is yielded next."""
        return self.stops[len(self.waiting)]

    @property
    def new(self) -> bool:
        """Whether the micro-batch that is yielded next was not seen before: it may climb."""
        turn, *of, _ = self.coming
        return turn == 0 and not any(
            self.begun[key] and [*key.place[:2]] == of for key in self.begun
        )

    @contextlib.contextmanager
    def climb(self) -> Iterator[None]:
        """Ascents of the batch that is yielded next: they count once all are made."""
        self.before = {**self.begun}, {**self.noise}
        try:
            yield
        except BaseException:
            self.begun, self.noise = self.before
            raise
        finally:
            self.before = None

    def outside(self, name: str) -> None:
        """Refuse a method that an objective calls."""
        if self.before is not None:
            raise RuntimeError(
                f"{name}() was called by the objective, which only returns a loss: call it in the loop"
            )

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[tuple[Visit, Any]]:
        """The batch that is yielded next, and a visit of its own, for a pass that no loop sees."""
        self.latest = self.coming
        visit, waiting = self._visit(self.latest), self.waiting
        try:
            self.waiting = [visit]  # to which the calls of `at` belong
            yield visit, self._batch(visit)
        finally:
            self.waiting = waiting
            self.climbed |= {rows.key for rows in visit.leaves}
            self._close([visit])

    def _visit(self, stop: Stop) -> Visit:
        _, inputs, size = self.minibatches[stop.minibatch][stop.micro]
        return Visit(stop, size, not inputs)

    def _batch(self, visit: Visit) -> Any:
        """The batch of a visit in fresh containers, the perturbed inputs in their places."""
        self.calling = None
        batch, inputs, _ = self.minibatches[visit.stop.minibatch][visit.stop.micro]
        moved = []
        with torch.enable_grad():  # the loop may ask where they are off
            for path, given, x, rows in inputs:
                t = self._move(visit, rows, x)
                if given.ndim < x.ndim:  # a sample without a batch dimension
                    t, visit.clean[rows] = t[0], x[0]
                moved.append((path, dressed(t, given)))
        batch = rebuilt(batch, nested(moved))
        if visit.inside:
            visit.given = [*tensors(batch)]
        return batch

    def call(self, output: Tensor, args: list[Tensor]) -> Tensor:
        """`output` of the module `at`, which was given those tensors, moved by its rows of delta."""
        visit, call = self._known(len(output), args) or self._by_order(len(output), args)
        if visit is None or visit not in self.waiting:  # between its gradient and the next batch
            return output
        self.hints.of_a_call(args)
        place = visit.stop.minibatch, visit.stop.micro, call.which
        call.rows = self.delta.rows(output, place, first=call.start * call.per)
        moved = self._move(visit, call.rows, output, call)
        call.graph = weakref.ref(moved.grad_fn)
        visit.calls.append(call)
        self.calling = visit
        return moved

    def again(self, output: Tensor, args: list[Tensor]) -> Tensor:
        """`output` moved as it was in the forward pass, for a checkpoint that runs the module again."""
        known = self._known(len(output), args)
        if not self.waiting or (known and known[0] in self.past):
            return output  # after its gradient
        fits = [
            (visit, rows)
            for visit in self.waiting
            for rows, x in visit.clean.items()
            if rows in visit.leaves
            and x.shape == output.shape
            and (not known or (visit is known[0] and known[1].has(rows)))
        ]
        if len(fits) > 1:  # several calls of one shape
            fits = [(visit, rows) for visit, rows in fits if torch.equal(visit.clean[rows], output)]
        if len(fits) != 1:
            raise RuntimeError(
                "a checkpoint runs the module given as at again, and it cannot be told which of its calls "
                "in the forward pass that was: checkpoint it with use_reentrant=False, or leave the "
                "module out of the checkpoint"
            )
        return self._move(*fits[0], output)

    def _known(self, length: int, args: list[Tensor]) -> tuple[Visit, Call] | None:
        """The call of that output by what it was given: the largest piece of a batch that was yielded.

        What are the same samples of several tensors has a place of its own: two texts may have one mask.
        """
        if any(t.grad_fn is not None for t in args):  # something computed, with a batch beside it
            return None
        found: tuple[Visit, int, int] | None = None
        names: set[str] = set()
        for t in args:
            fits = [
                (visit, named(path), start, stop)
                for visit in (*self.past, *self.waiting)
                for path, whole in visit.given
                for start, stop in (piece(t, whole),)
                if stop > start and not length % (stop - start)
            ]
            if not (fits or found) and t.ndim and len(t) == length:
                return None  # these samples are not the batch's; what stands behind is beside them
            for visit, name, start, stop in fits:
                if not found or found[2] - found[1] < stop - start:
                    found, names = (visit, start, stop), set()
                if found == (visit, start, stop):
                    names.add(name)
        if not found:
            return None
        visit, start, stop = found
        return visit, Call("+".join(sorted(names)), start, stop, length // (stop - start))

    def _by_order(self, length: int, args: list[Tensor]) -> tuple[Visit | None, Call]:
        """The call of that output by its number since the last backward pass.

        It belongs to the visit of the call before it, as long as that has samples or gradients to come and no other
        batch was yielded since; else to the first such visit without a call.
        """
        if not self.waiting:
            return None, Call(0, 0, length, 1)
        size, first, of = length, 0, None
        if args and (whole := args[0]._base) is not None:  # a piece, or a fold, of a copy
            start, stop = piece(args[0], whole)
            if stop > start and not length % (stop - start):
                size, first, of = stop - start, start, len(whole)
        left = [
            v
            for v in self.waiting
            if not v.behind and (v.waits or v.size - v.through.get(0, 0) >= size > 0)
        ]
        new = next((v for v in left if not v.calls), self.waiting[-1])
        visit = self.calling if self.calling in left else new
        number = sum(call.now and isinstance(call.which, int) for call in visit.calls)
        if of != visit.size:  # those that are left, or all begin again
            first = visit.through.get(number, 0)
            first = first if first + size <= visit.size else 0
        return visit, Call(number, first, first + size, length // max(1, size))

    def _move(self, visit: Visit, rows: Rows, x: Tensor, call: Call | None = None) -> Tensor:
        """`x + delta` held inside the bounds; the gradient there arrives at the visit's leaf."""
        begun = self.begun.get(rows.key, 0)
        if rows.stop > begun:  # a resumed flight goes on with what had begun
            new = Rows(rows.key, begun, rows.stop)
            self.delta.begin(new)
            if self.level:
                drawn = torch.empty_like(self.delta[new])
                self.delta.threat.ball.draw(drawn, self.level * self.delta.threat.eps, None)
                held = self.noise.get(rows.key)
                self.noise[rows.key] = drawn if held is None else torch.cat([held, drawn])
            self.begun[rows.key] = rows.stop
        leaf = visit.leaves.get(rows)
        if leaf is None:
            leaf = visit.leaves[rows] = self.delta[rows].detach().requires_grad_()
        visit.clean[rows] = x.detach()
        self.moved = visit.clean
        noise = None
        if rows.key in self.noise:
            noise = self.noise[rows.key][rows.start : rows.stop].to(x.device)
        arrived = partial(visit.arrived, call)
        moved: Tensor = Move.apply(x, leaf, self.delta.threat, arrived, noise)
        if visit.stop.turn == self.replays - 1:  # before, weights may begin at zero
            self.hints.of_the_gradient(rows.key[1:], moved)
        return moved

    def update(self) -> list[Visit]:
        """The visits of the oldest update, if all of them are through."""
        ends = next((i + 1 for i, visit in enumerate(self.waiting) if visit.stop.ends), 0)
        return [] if any(v.waits for v in self.waiting[:ends]) else self.waiting[:ends]

    def leave(self, update: list[Visit]) -> None:
        """Leave the visits behind whose gradients were taken in."""
        for visit in update:
            visit.forget()
        self.past += update
        del self.waiting[: len(update)], self.stops[: len(update)]

    def skip(self) -> None:
        """Leave out the minibatch of the latest batch; the others of the window go on."""
        self._close(self.past)
        self._close(self.waiting)
        if self.latest is None:
            self.stops = []
            return
        skipped = self.latest.minibatch
        self.stops = [stop for stop in self.stops if stop.minibatch != skipped]
        self.minibatches[skipped] = []

    def close(self) -> None:
        """The time of all that was yielded is over; what was moved last can still be seen."""
        self._close(self.past)
        self._close(self.waiting)
        self.minibatches, self.stops, self.begun, self.noise = [], [], {}, {}

    def _close(self, visits: list[Visit]) -> None:
        for visit in visits:
            visit.over, visit.clean, visit.given, visit.calls = True, {}, [], []
        visits.clear()


def _micro(batch: Any, paths: list[Path], delta: Delta, minibatch: int, number: int) -> Micro:
    """Find the inputs of a micro-batch, and the rows of delta for them."""
    inputs: list[Input] = []
    for path in paths:
        taken: dict[Key, int] = {}  # rows of a buffer
        place = minibatch, number, named(path)
        for to, given in find(batch, path):
            x = plain(given.detach())
            x = x[None] if ... in path else x  # each is one sample
            rows = delta.rows(x, place, taken)
            taken[rows.key] = rows.stop
            inputs.append(Input(to, given, x, rows))
    first = [len(i.x) for i in inputs if i.rows.key.place[2] == named(paths[0])]
    return Micro(batch, inputs, sum(first) if inputs else samples(batch))
