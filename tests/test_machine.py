"""Random sequences of everything public, several objects at once, against a plain model of what must hold.

The model keeps delta, the minibatch in flight and the gradients that are due in dictionaries and lists, and knows the
gradient of each loss in advance. After every call it and the library agree: on what was yielded, on delta, on the
weights, and on whether there was an error.
"""

import collections
import contextlib
import dataclasses
import io
import os
import sys
import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from free_adv import FreeAdversarial
from tests.helpers import told_of
from tests.internals import buffers, keeping

RADII = [0.125, 0.0625, 0.25]  # what eps may be
LENGTHS = [None, 0.03125, 0.125]  # and step_size
SHAPES = 3  # the machine keeps three shapes, so that it comes to forget some
STEPS = int(os.environ.get("STEPS", 20_000))  # of the long form
JUNK = ["state", "minibatches", "delta", "done", "places", "begun"]  # what is wrong in a state
made = collections.Counter()  # how often each rule has run, and what was refused

Pair = collections.namedtuple("Pair", "x y")
Stop = collections.namedtuple("Stop", "turn minibatch micro ends")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


# Where the inputs are, and how a batch holds them. `...` are samples without a batch dimension.
KEYS = {
    "first": 0,
    "named": "x",
    "two": [0, 1],
    "nested": ["x", ("views", ...)],
}
PACK = {
    "first": [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: x],
    "named": [lambda x, y: {"y": y, "x": x}, Pair, Record],
    "two": [lambda x, other, y: (x, other, y), lambda x, other, y: [x, other, y]],
    "nested": [lambda x, *views, y: {"views": [*views], "y": y, "x": x}],
}
FIND = {
    "first": lambda batch: [batch if isinstance(batch, torch.Tensor) else batch[0]],
    "named": lambda batch: [batch["x"] if isinstance(batch, dict) else batch.x],
    "two": lambda batch: [*batch[:2]],
    "nested": lambda batch: [batch["x"], *batch["views"]],
}
PATHS = {
    "first": ["[0]"],
    "named": ["['x']"],
    "two": ["[0]", "[1]"],
    "nested": ["['x']"] + ["['views'][...]"] * 4,
}


class Broken(Exception):
    """What the tests raise themselves."""


class Sgd(torch.optim.SGD):
    """An optimizer that can be told to fail before it moves anything."""

    broken = False

    def step(self):
        if self.broken:
            raise Broken
        super().step()


# Batches, good and bad.

SAMPLES = [(3,), (2, 4), (2, 3, 3), (1, 2, 2, 2), ()]
LAYOUTS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "turned": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1) if x.ndim > 2 else x,
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "a view of shared memory": lambda x: torch.cat((x, x)).share_memory_()[len(x) :],
    "wants a gradient": lambda x: x.clone().requires_grad_(),
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors may change
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
MALFORMED = {
    "integers": lambda x: x.long(),
    "booleans": lambda x: x > 0.5,
    "complex": lambda x: x.float() + 0j,
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: nested,
    "no batch": lambda x: torch.tensor(0.5),
    "no tensor": lambda x: "text",
}
UNFIT = {"integers", "booleans", "complex", "no tensor"}  # seen before anything is done with them
HOSTILE = {  # refused at the first sight of their shape, harmless to delta later
    "NaN": lambda x: torch.full_like(x, torch.nan),
    "infinity": lambda x: torch.full_like(x, torch.inf),
    "of 255": lambda x: x * 200 + 50,
}


@dataclasses.dataclass
class Item:
    """One thing that a loader gives."""

    kind: str
    xs: tuple = ()
    batch: object = None


def random(draw, *size):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    x = torch.rand(size, generator=generator, dtype=torch.float64)
    return ((x - 0.5) * 1.5 + 0.5).clamp(0, 1).to(dtype)


@st.composite
def items(draw, key):
    kind = draw(st.sampled_from(["good"] * 40 + ["malformed", "hostile", "broken", "elsewhere"]))
    if kind == "broken":
        return Item(kind)
    sample = draw(st.sampled_from(SAMPLES))
    x = random(draw, draw(st.integers(0, 4)), *sample)
    layout = draw(st.sampled_from(list(LAYOUTS)))
    if layout != "channels last" or x.ndim == 4:
        x = LAYOUTS[layout](x)
    if kind == "malformed":
        kind = draw(st.sampled_from(list(MALFORMED)))
        x = MALFORMED[kind](x)
    elif kind == "hostile":
        x = HOSTILE[draw(st.sampled_from(list(HOSTILE)))](x.detach())
    xs = [x]
    if key == "two":
        xs.append(random(draw, draw(st.integers(0, 4)), *draw(st.sampled_from(SAMPLES))))
    elif key == "nested":
        shapes = draw(st.lists(st.sampled_from(SAMPLES), min_size=1, max_size=3))
        xs += [random(draw, *shape) for shape in shapes]
        xs += xs[1:2] * draw(st.integers(0, 1))  # the same tensor twice
    batch = draw(st.sampled_from(PACK[key]))(*xs, y=torch.arange(3))
    if kind == "elsewhere":
        batch = {"image": x}
    return Item(kind, (*xs,), batch)


# The model.


@dataclasses.dataclass(eq=False)
class Input:
    """An input that is in flight: what the loader gave, with a batch dimension, and its rows of delta."""

    x: torch.Tensor
    key: tuple
    rows: slice
    single: bool  # one sample without a batch dimension


@dataclasses.dataclass(eq=False)
class Due:
    """A batch that was yielded: the library's tensors, and the gradients, None until they have arrived."""

    stop: Stop
    inputs: list
    grads: list
    moved: list = ()
    over: bool = False  # a gradient would come too late

    @property
    def waits(self):
        return any(grad is None for grad in self.grads)

    def forget(self):
        self.grads = [None] * len(self.grads)


@dataclasses.dataclass(eq=False)
class Epoch:
    """An iterator: not yet begun, running or replaced by a newer one, behind an error, or over."""

    iterator: object
    items: list
    state: str = "new"
    kept: list = dataclasses.field(default_factory=list)  # what came before a loader's error
    flights: int | None = None  # how many there had been when an error came


class Model:
    """One FreeAdversarial, in plain words."""

    def __init__(self, key, norm, m, k, window, start, step):
        self.flights = 0  # how many there were
        self.paths, self.several = PATHS[key], key in ("two", "nested")
        self.norm, self.m, self.k, self.window, self.start = norm, m, k, window, start
        self.eps, self.step = RADII[0], step
        self.weight, self.gradient = 0.0, 0.0
        self.spent = True  # an update has had that gradient
        self.updates = self.skipped = 0
        self.past, self.due, self.turn = [], [], None
        self.begin({})

    def begin(self, delta):
        """Begin anew with this delta."""
        self.leave()
        self.delta = delta  # by place, sample shape and precision; the one last in use comes last
        self.seen = self.shapes  # what has been looked at
        self.running, self.moved = None, []

    def leave(self):
        """Drop what is in flight: its time is over."""
        for due in self.past + self.due:
            due.over = True
        self.flight, self.stops, self.due, self.past, self.begun = [], [], [], [], {}
        self.resumed, self.latest = False, None  # which stop was yielded last

    @property
    def settings(self):
        return self.norm, self.m

    @property
    def shapes(self):
        return {key[1:] for key in self.delta}

    @property
    def length(self):
        return self.eps if self.step is None else self.step

    @property
    def left(self):
        return len(self.stops) - len(self.due)

    @property
    def done(self):
        """How many updates the minibatches in flight have made."""
        return self.m * sum(map(bool, self.flight)) - sum(stop.ends for stop in self.stops)

    def take_off(self, flight, done):
        """They are in flight, and take turns."""
        self.flights += 1
        self.flight, self.due, self.past, self.latest = flight, [], [], None
        self.stops = [
            Stop(turn, w, i, i == len(minibatch) - 1)
            for turn in range(self.m)
            for w, minibatch in enumerate(flight)
            for i in range(len(minibatch))
        ]
        for _ in range(done):
            del self.stops[: len(flight[self.stops[0].minibatch])]

    def clean_weights(self):
        """Before an update's first batch, or first step."""
        if self.spent:
            self.gradient, self.spent = 0.0, False

    def places(self, xs, w, i):
        """Rows of delta for the inputs of a micro-batch: the leading ones, or one behind the other for elements."""
        found, taken = [], collections.Counter()
        for x, path in zip(xs, self.paths, strict=False):
            single = "..." in path
            x = x.detach()[None] if single else x.detach()
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            shape = tuple(x.shape[1:])
            if x.numel() and (shape, dtype) not in self.seen and ((x < -0.2) | ~(x < 1.2)).any():
                return None
            key = ((w, i, path), shape, dtype)
            first = taken[key]
            taken[key] += len(x)
            old = self.delta.pop(key, torch.zeros(0, *shape, dtype=dtype))
            more = torch.zeros(max(0, first + len(x) - len(old)), *shape, dtype=dtype)
            self.delta[key] = torch.cat((old, more))
            self.seen.add(key[1:])
            found.append(Input(x, key, slice(first, first + len(x)), single))
        return found

    def read(self, epoch):
        """The next window: whether there is one, or the error that it gives."""
        last = [*dict.fromkeys(key[1:] for key in reversed(self.delta))][:SHAPES]
        for key in [key for key in self.delta if key[1:] not in last]:
            del self.delta[key]
        if any(i.key not in self.delta for i in self.moved):
            self.moved = []
        items, epoch.kept = epoch.kept, []
        while epoch.items and len(items) < self.k * self.window:
            item = epoch.items.pop(0)
            if item.kind == "broken":
                epoch.kept, epoch.items = items, []  # a generator ends with its error
                return Broken
            items.append(item)
        if any(i.kind == "elsewhere" or i.kind in UNFIT for i in items):
            return ValueError, TypeError  # whichever is first; no shape has been looked at
        flight = []
        for n, item in enumerate(items):
            if item.kind in MALFORMED:
                return TypeError, ValueError
            if (micro := self.places(item.xs, n // self.k, n % self.k)) is None:
                return ValueError
            if n % self.k == 0:
                flight.append([])
            flight[-1].append(micro)
        if flight:
            self.take_off(flight, 0)
        return bool(flight)

    @property
    def update(self):
        """The batches of the oldest update, if all of them are through."""
        if not self.due:
            return []
        size = len(self.flight[self.due[0].stop.minibatch])
        found = self.due[:size]
        return [] if len(found) < size or any(due.waits for due in found) else found

    def take_in(self):
        """The gradients of whole replays move delta."""
        while found := self.update:
            for due in found:
                for i, grad in zip(due.inputs, due.grads, strict=True):
                    self.delta[i.key][i.rows] = self.ascent(self.delta[i.key][i.rows], grad)
                due.forget()
            self.past += found
            del self.due[: len(found)], self.stops[: len(found)]
            self.updates += 1

    def ascent(self, delta, grad):
        if self.norm == "linf" or not delta.numel():
            return (delta + self.length * grad.sign()).clamp(-self.eps, self.eps)
        flat = grad.reshape(len(grad), -1)
        flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=1e-30)
        step = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return self.projected(delta + (self.length * step).reshape(delta.shape))

    def projected(self, delta):
        if self.norm == "linf" or not delta.numel():
            return delta.clamp(-self.eps, self.eps)
        flat = delta.reshape(len(delta), -1)
        flat = flat * (self.eps / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        return flat.reshape(delta.shape)

    def advance(self, epoch):
        """The batch that comes next, or the error."""
        if epoch.state == "over":
            return StopIteration
        if epoch.state == "failed" and self.running is None and epoch.flights == self.flights:
            self.running, epoch.state = epoch, "running"
        if epoch.state == "new":
            self.take_in()
            if not self.resumed:
                self.leave()
            self.running = epoch
            epoch.state = "running"
        elif self.running is not epoch:
            return RuntimeError
        else:
            self.take_in()
            waiting = sum(due.waits for due in self.due)
            if self.due:
                whole = all(len(minibatch) in (0, self.k) for minibatch in self.flight)
                if (whole and len(self.due) == self.k) or waiting >= self.k or not self.left:
                    return RuntimeError
        while not self.left:
            self.leave()
            found = self.read(epoch)
            if found is False:
                return StopIteration
            if found is not True:
                return found
        self.resumed = False
        for due in self.past:
            due.over = True
        self.past = []
        self.latest = stop = self.stops[len(self.due)]
        self.turn = stop.turn
        if stop.micro == 0 and not self.due:  # an update that is under way keeps its gradients
            self.clean_weights()
        inputs = self.flight[stop.minibatch][stop.micro]
        due = Due(stop, inputs, [None] * len(inputs))
        self.due.append(due)
        self.moved = inputs
        return due

    def fails(self, epoch, error):
        """An iterator goes on behind an error, unless something else has begun since."""
        mine = self.running is epoch
        epoch.state = "failed" if mine and error is not StopIteration else "over"
        epoch.flights = self.flights
        if mine:
            self.running = None

    def begins(self, free, inputs):
        """Rows that nothing in flight has used begin now; a random beginning is taken from the library."""
        for i in inputs:
            begun = self.begun.get(i.key, 0)
            if i.rows.stop <= begun:
                continue
            rows = slice(begun, i.rows.stop)
            self.begun[i.key] = i.rows.stop
            old = self.delta[i.key][rows]
            if self.start == "zero":
                self.delta[i.key][rows] = 0
            elif self.start == "uniform":
                new = buffers(free)[i.key][rows].clone()
                assert not new.numel() or not torch.equal(new, old)
                assert not new.numel() or free.threat.distance(new).max() <= self.eps * (1 + 1e-6)
                self.delta[i.key][rows] = new

    def perturbed(self, i):
        moved = i.x.to(i.key[2]) + self.delta[i.key][i.rows]
        low, high = i.x.clamp(max=0).to(i.key[2]), i.x.clamp(min=1).to(i.key[2])
        moved = moved.clamp(low, high).to(i.x.dtype)
        return moved[0] if i.single else moved

    def share(self, due):
        """What the mean over the samples of its minibatch gives a batch."""
        minibatch = self.flight[due.stop.minibatch]

        def size(micro):
            return sum(len(i.x) for i in micro if i.key[0][2] == self.paths[0])

        whole = sum(map(size, minibatch))
        return size(due.inputs) / whole if whole and len(minibatch) > 1 else 1.0

    def drop_what_has_no_place(self):
        """Delta of a larger window, or of more micro-batches, after it was loaded."""
        self.delta = {
            key: buffer
            for key, buffer in self.delta.items()
            if key[0][0] < self.window and key[0][1] < self.k
        }
        self.seen = self.shapes

    def skip(self):
        for due in self.past + self.due:
            due.over = True
        self.past, self.due, self.skipped = [], [], self.skipped + 1
        if self.latest is None:
            self.stops = []
        else:
            self.stops = [stop for stop in self.stops if stop.minibatch != self.latest.minibatch]
            self.flight[self.latest.minibatch] = []
        if not self.stops:
            self.leave()


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.epochs, self.states, self.yielded = [], [], []
        self.patched = contextlib.ExitStack()
        self.patched.enter_context(keeping(SHAPES))

    def teardown(self):
        self.patched.close()

    @initialize(
        key=st.sampled_from([*KEYS]),
        settings=st.lists(
            st.tuples(
                st.sampled_from(["linf", "linf", "l2"]),
                st.integers(1, 3),
                st.integers(1, 3),
                st.sampled_from([1, 1, 2, 3]),
                st.sampled_from(["carry", "carry", "zero", "uniform"]),
                st.sampled_from(LENGTHS),
            ),
            min_size=2,
            max_size=2,
        ),
    )
    def begin(self, key, settings):
        self.key, self.pairs = key, []
        for norm, m, k, window, start, step in settings:
            weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
            optimizer = Sgd([weight], lr=1)
            free = FreeAdversarial(
                optimizer,
                eps=RADII[0],
                step_size=step,
                replays=m,
                accumulate=k,
                window=window,
                norm=norm,
                start=start,
                key=KEYS[key],
            )
            free.report()  # begins to look
            model = Model(key, norm, m, k, window, start, step)
            self.pairs.append((free, model, weight, optimizer))

    def count(self, name):
        made[name] += 1
        made["steps"] += 1

    def refused(self, call, errors):
        """`call` raises one of the errors, which says why."""
        with pytest.raises(errors) as caught:
            call()
        if not isinstance(caught.value, StopIteration | Broken):
            made["refused"] += 1
            assert len(str(caught.value)) > 20

    @rule(who=st.integers(0, 1), data=st.data())
    def start_an_epoch(self, who, data):
        self.count("epochs")
        given = data.draw(st.lists(items(self.key), min_size=1, max_size=6))

        def loader():
            for item in given:
                if item.kind == "broken":
                    raise Broken
                yield item.batch

        free, *_ = self.pairs[who]
        self.epochs.append((who, Epoch(iter(free.replay(loader())), list(given))))
        self.epochs = self.epochs[-4:]

    @precondition(lambda self: self.epochs)
    @rule(which=st.integers(0, 3), quiet=st.booleans())
    def take_a_batch(self, which, quiet):
        # Mostly the newest.
        self.take(*self.epochs[-1 if which else 0], quiet)

    def take(self, who, epoch, quiet=False):
        """Ask for a batch: what was yielded, None if nothing was."""
        self.count("batches asked for")
        free, model, *_ = self.pairs[who]
        context = torch.no_grad() if quiet else contextlib.nullcontext()
        due = model.advance(epoch)
        if not isinstance(due, Due):
            self.refused(lambda: next(epoch.iterator), due)
            model.fails(epoch, due)
            return None
        with context:
            batch = next(epoch.iterator)
        model.begins(free, due.inputs)
        due.moved = FIND[self.key](batch)
        for i, x in zip(due.inputs, due.moved, strict=True):
            expected = model.perturbed(i)
            assert x.requires_grad
            assert not x.is_leaf
            assert x.dtype == expected.dtype
            torch.testing.assert_close(x.detach(), expected, atol=1e-6, rtol=1e-2, equal_nan=True)
            if x.dtype != torch.bfloat16:
                clean = i.x[0] if i.single else i.x
                far = (x.detach() - clean).abs().nan_to_num(0, 0, 0)
                assert not x.numel() or far.max() <= model.eps + 1e-6
        self.yielded = [*self.yielded[-3:], (who, due)]
        made["batches"] += 1
        return due

    def loss(self, due, sign, bad, part):
        """A loss of some of the inputs whose gradients there are known, and these."""
        total, grads = 0.0, []
        for number, moved in enumerate(due.moved):
            grad = torch.linspace(-1, 1, moved.numel(), dtype=torch.float64).sign() * sign
            grad = grad.reshape(moved.shape).to(moved.dtype)
            if bad is not None and grad.numel():
                grad.view(-1)[::2] = bad
            used = part is None or number == part % len(due.moved)
            total = total + (moved * grad).sum().double() if used else total
            grads.append(grad if used else None)
        return total, grads

    def arrive(self, due, grads, share=1.0):
        for n, (i, grad) in enumerate(zip(due.inputs, grads, strict=True)):
            if grad is not None:
                grad = (grad * share).to(i.key[2]).nan_to_num(0, 0, 0).reshape(i.x.shape)
                due.grads[n] = grad if due.grads[n] is None else due.grads[n] + grad

    bads = st.sampled_from([None, None, None, 0.0, float("nan"), float("inf"), float("-inf")])
    parts = st.sampled_from([None, None, None, 0, 1, 2])

    @precondition(lambda self: self.yielded)
    @rule(which=st.integers(0, 3), sign=st.sampled_from([1, -1]), bad=bads, part=parts)
    def go_backward(self, which, sign, bad, part):
        """In the loop's own backward pass, also once more, or for a batch of long ago."""
        self.backward(self.yielded[-1 if which else 0][1], sign, bad, part)

    def backward(self, due, sign=1, bad=None, part=None):
        self.count("backward passes")
        loss, grads = self.loss(due, sign, bad, part)
        if due.over:
            made["batches that came again"] += 1
            self.refused(loss.backward, RuntimeError)
            return
        loss.backward()
        self.arrive(due, grads)

    @precondition(lambda self: self.yielded)
    @rule(
        which=st.integers(0, 3),
        sign=st.sampled_from([1, -1]),
        bad=bads,
        part=parts,
        broken=st.sampled_from([False, False, False, True]),
    )
    def step(self, which, sign, bad, part, broken):
        self.step_for(*self.yielded[-1 if which else 0], sign, bad, part, broken)

    def step_for(self, who, due, sign=1, bad=None, part=None, broken=False):
        self.count("steps of the optimizer asked for")
        free, model, weight, optimizer = self.pairs[who]
        loss, grads = self.loss(due, sign, bad, part)
        loss = loss + weight
        optimizer.broken = broken
        model.take_in()
        index = next((i for i, d in enumerate(model.due) if d.waits), None)
        if index is None:
            self.refused(lambda: free.step(loss), RuntimeError)
            return
        visit = model.due[index]
        share, ends = model.share(visit), visit.stop.ends
        if visit.stop.micro == 0:
            model.clean_weights()
        model.spent = True
        model.gradient += share
        if not due.over:
            self.arrive(due, grads, share)
        if due.over or visit.waits or (ends and broken):
            self.refused(lambda: free.step(loss), (RuntimeError, Broken))
            for d in model.due[: index + 1]:
                d.forget()
            return
        free.step(loss)
        made["steps of the optimizer"] += ends
        if ends:
            model.weight -= model.gradient
            model.take_in()
            if model.due:  # they are out ahead, so that nobody asks for one before their update
                model.clean_weights()

    def go_backward_for_another_loss(self, who):
        """Its gradient counts in full, unless it came before the batch was asked for."""
        self.count("other losses")
        _, model, weight, _ = self.pairs[who]
        (2 * weight).backward()
        model.gradient += 2

    def skip(self, who):
        self.count("skips")
        free, model, *_ = self.pairs[who]
        if not model.flight:
            self.refused(free.skip, RuntimeError)
            return
        free.skip()
        model.take_in()
        model.skip()

    @precondition(lambda self: self.epochs)
    @rule(which=st.integers(0, 3), how=st.sampled_from(["close", "forget"]))
    def leave_an_epoch(self, which, how):
        self.count("loops left")
        who, epoch = self.epochs[-1 if which else 0]
        model = self.pairs[who][1]
        epoch.iterator.close()
        epoch.state = "over"
        if model.running is epoch:
            model.running = None
        if how == "forget":
            self.epochs.remove((who, epoch))

    @rule(
        who=st.integers(0, 1),
        eps=st.sampled_from([None, *RADII]),
        step=st.sampled_from(["as it is", "as it is", *LENGTHS]),
    )
    def assign(self, who, eps, step):
        self.count("assignments")
        free, model, *_ = self.pairs[who]
        if eps is not None:
            free.eps = model.eps = self.settled(model, eps)
            model.delta = {key: model.projected(buffer) for key, buffer in model.delta.items()}
        if step != "as it is":
            free.step_size = model.step = self.settled(model, step)
        if eps is step is None:
            for name, error in {
                "eps": ValueError,
                "step_size": ValueError,
                "m": AttributeError,
            }.items():
                self.refused(lambda name=name: setattr(free, name, -0.5), error)

    def settled(self, model, value):
        """What has arrived is taken in before, with the old values."""
        model.take_in()
        return value

    @rule(who=st.integers(0, 1), way=st.sampled_from(["memory", "file"]))
    def save(self, who, way):
        self.count("states saved")
        free, model, *_ = self.pairs[who]
        state = free.state_dict()
        model.take_in()
        if way == "file":
            torch.save(state, file := io.BytesIO())
            file.seek(0)
            with told_of(Pair, Record):
                state = torch.load(file, weights_only=True)
        flight = [
            [[(i.x[0] if i.single else i.x).clone() for i in micro] for micro in minibatch]
            for minibatch in model.flight
        ]
        delta = {key: buffer.clone() for key, buffer in model.delta.items()}
        brought = model.eps, model.step, dict(model.begun)
        self.states.append((state, model.settings, delta, flight, model.done, brought))
        self.states = self.states[-3:]

    @precondition(lambda self: self.states)
    @rule(who=st.integers(0, 1), which=st.integers(0, 2))
    def load(self, who, which):
        self.count("states loaded")
        free, model, *_ = self.pairs[who]
        state, settings, delta, flight, done, brought = self.states[which % len(self.states)]
        shapes = {key[1:] for key in delta}
        other = len(shapes) == len(model.seen) == 1 and shapes != model.seen
        large = len(flight) > model.window or any(len(m) > model.k for m in flight)
        if settings != model.settings or other or large:
            self.refused(lambda: free.load_state_dict(state), ValueError)
            return
        free.load_state_dict(state)
        model.begin({key: buffer.clone() for key, buffer in delta.items()})
        model.flights += 1  # which may be none
        model.turn = None
        model.eps, model.step, begun = brought
        if flight:
            places = [
                [model.places(xs, w, i) for i, xs in enumerate(minibatch)]
                for w, minibatch in enumerate(flight)
            ]
            model.take_off(places, done)
            model.resumed, model.begun = True, dict(begun)
        model.drop_what_has_no_place()

    def leave_the_block(self, who):
        self.count("blocks left")
        free, model, *_ = self.pairs[who]
        with free:
            pass
        model.begin({})
        model.flights += 1
        model.turn = None

    def load_junk(self, who, what="state"):
        self.count("junk loaded")
        free, model, *_ = self.pairs[who]
        state = {**free.state_dict(), what: [torch.ones(2)] * 9} if what != "state" else 1
        if what != "state":
            model.take_in()
        self.refused(lambda: free.load_state_dict(state), (ValueError, TypeError))

    def look(self, who):
        self.count("looks")
        free, model, *_ = self.pairs[who]
        latest = model.latest
        assert free.last == (bool(model.flight) and (latest is None or latest.ends))
        assert free.turn == model.turn
        if not model.moved:
            assert free.clean is free.delta is None
            return
        clean, delta = free.clean, free.delta
        assert isinstance(clean, list) == isinstance(delta, list) == model.several
        clean, delta = (clean, delta) if model.several else ([clean], [delta])
        for i, x, d in zip(model.moved, clean, delta, strict=True):
            expected = i.x, model.delta[i.key][i.rows]
            expected = [t[0] for t in expected] if i.single else expected
            assert torch.equal(x.nan_to_num(7), expected[0].nan_to_num(7))
            torch.testing.assert_close(d, expected[1], atol=1e-6, rtol=0)

    def read_the_report(self, who):
        self.count("reports")
        free, model, *_ = self.pairs[who]
        report = free.report()  # between two passes of a batch it takes nothing in
        assert (report["updates"], report["skipped"]) == (model.updates, model.skipped)
        model.updates = model.skipped = 0

    @rule(
        who=st.integers(0, 1),
        what=st.sampled_from(
            [
                "look",
                "look",
                "skip",
                "skip",
                "leave the block",
                "report",
                "other loss",
                "other loss",
                "other loss",
                *JUNK,
            ]
        ),
    )
    def do_something_rare(self, who, what):
        rare = {"look": self.look, "skip": self.skip, "leave the block": self.leave_the_block}
        rare |= {"report": self.read_the_report, "other loss": self.go_backward_for_another_loss}
        rare[what](who) if what in rare else self.load_junk(who, what)

    counts, whos = st.integers(1, 12), st.integers(0, 1)

    @rule(who=whos, count=counts, ahead=st.booleans(), data=st.data())
    def train_by_step(self, who, count, ahead, data):
        self.train(who, count, ahead, data, own=False)

    @rule(who=whos, count=counts, ahead=st.booleans(), data=st.data())
    def train_by_a_backward_pass_of_its_own(self, who, count, ahead, data):
        self.train(who, count, ahead, data, own=True)

    def train(self, who, count, ahead, data, own):
        """As a loop would that does all right, which may take the batches of an update ahead."""
        if not self.epochs or self.epochs[-1][1].state == "over":
            self.start_an_epoch(who, data)
        who, epoch = self.epochs[-1]
        model = self.pairs[who][1]
        for _ in range(count):
            if self.take(who, epoch) is None:
                return
            while ahead and model.left and len(model.due) < model.k:
                self.take(who, epoch)
                made["batches taken ahead"] += 1
            for due in [due for due in model.due if due.waits]:
                self.backward(due) if own else self.step_for(who, due)

    @invariant()
    def both_agree(self):
        for free, model, weight, _ in getattr(self, "pairs", []):
            assert (free.eps, free.step_size) == (free.threat.eps, model.length)
            assert free.eps == model.eps
            held = buffers(free)
            assert list(held) == list(model.delta)
            for mine, buffer in zip(model.delta.values(), held.values(), strict=True):
                torch.testing.assert_close(buffer, mine, atol=1e-6, rtol=0)
                far = free.threat.distance(buffer)
                assert buffer.isfinite().all()
                assert not buffer.numel() or far.max() <= model.eps * (1 + 1e-6)
            assert abs(weight.item() - model.weight) < 1e-9


quiet = pytest.mark.filterwarnings(
    "ignore:the input gradient of",
    "ignore:the input's values run",
    "ignore:the batches that were taken ahead",
)


@quiet
def test_any_sequence_of_calls_does_what_a_plain_model_says():
    run_state_machine_as_test(
        Machine, settings=hypothesis.settings(max_examples=20, stateful_step_count=40)
    )


@pytest.mark.slow
@quiet
def test_a_long_sequence_of_calls_does_what_a_plain_model_says(capsys):
    made.clear()
    settings = hypothesis.settings(max_examples=300, stateful_step_count=60, database=None)
    while made["steps"] < STEPS:
        run_state_machine_as_test(Machine, settings=settings)
    with capsys.disabled():
        sys.stdout.write(f"\n{dict(made)}\n")
