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
from tests.internals import buffers, keeping

EPS, SHAPES = 0.125, 3  # the machine keeps three shapes, so that it comes to forget some
STEPS = int(os.environ.get("STEPS", 20_000))  # of the long form
made = collections.Counter()  # how often each rule has run, and what was refused

Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


PACK = {
    0: {"tuple": lambda x, y: (x, y), "list": lambda x, y: [x, y], "tensor": lambda x, y: x},
    "x": {"dict": lambda x, y: {"y": y, "x": x}, "named tuple": Pair, "dataclass": Record},
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
HOSTILE = {  # refused at the first sight of their shape, harmless to delta later
    "NaN": lambda x: torch.full_like(x, torch.nan),
    "infinity": lambda x: torch.full_like(x, torch.inf),
    "of 255": lambda x: x * 200 + 50,
}


@dataclasses.dataclass
class Item:
    """One thing that a loader gives."""

    kind: str
    x: torch.Tensor | None = None
    batch: object = None


@st.composite
def items(draw, key):
    kind = draw(st.sampled_from(["good"] * 24 + ["malformed", "hostile", "broken", "elsewhere"]))
    if kind == "broken":
        return Item(kind)
    sample = draw(st.sampled_from(SAMPLES))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    size = (draw(st.integers(0, 4)), *sample)
    x = torch.rand(size, generator=generator, dtype=torch.float64)
    x = ((x - 0.5) * 1.5 + 0.5).clamp(0, 1).to(dtype)
    layout = draw(st.sampled_from(list(LAYOUTS)))
    if layout != "channels last" or x.ndim == 4:
        x = LAYOUTS[layout](x)
    if kind == "malformed":
        x = MALFORMED[draw(st.sampled_from(list(MALFORMED)))](x)
    elif kind == "hostile":
        x = HOSTILE[draw(st.sampled_from(list(HOSTILE)))](x.detach())
    batch = PACK[key][draw(st.sampled_from(list(PACK[key])))](x, torch.arange(3))
    if kind == "elsewhere":
        batch = {"image": x}
    return Item(kind, x, batch)


# The model.


@dataclasses.dataclass(eq=False)
class Due:
    """A batch that was yielded: the library's tensor, and the model's gradient, None until it has arrived."""

    moved: torch.Tensor
    key: tuple
    rows: slice
    grad: torch.Tensor | None = None
    over: bool = False  # a gradient would come too late


@dataclasses.dataclass(eq=False)
class Epoch:
    """An iterator: not yet begun, running, replaced by a newer one, or over."""

    iterator: object
    items: list
    state: str = "new"


class Model:
    """One FreeAdversarial, in plain words."""

    def __init__(self, norm, m, k, start):
        self.norm, self.m, self.k, self.start = norm, m, k, start
        self.weight, self.gradient = 0.0, 0.0
        self.group, self.done, self.due, self.past, self.resumed = None, 0, [], [], False
        self.begin({})

    def begin(self, delta):
        """Begin anew with this delta."""
        self.leave()
        self.delta = delta  # by sample shape and precision; the one last in use comes last
        self.seen = set(delta)  # what has been looked at
        self.running = self.latest = None

    def leave(self):
        """Drop what is in flight: its time is over."""
        for due in self.past + self.due:
            due.over = True
        self.group, self.done, self.due, self.past, self.resumed = None, 0, [], [], False

    @property
    def settings(self):
        return self.norm, self.m

    def place(self, x, taken):
        """Rows of delta for a batch, behind those of its group."""
        key = (tuple(x.shape[1:]), torch.float64 if x.dtype == torch.float64 else torch.float32)
        first = taken.get(key, 0)
        taken[key] = first + len(x)
        old = self.delta.pop(key, torch.zeros(0, *x.shape[1:], dtype=key[1]))
        more = torch.zeros(max(0, taken[key] - len(old)), *x.shape[1:], dtype=key[1])
        self.delta[key] = torch.cat((old, more))
        self.seen.add(key)
        return key, slice(first, taken[key])

    def read(self, epoch):
        """The next group: whether there is one, or the error that it gives."""
        for key in list(self.delta)[:-SHAPES]:
            del self.delta[key]
            if self.latest and self.latest[1] == key:
                self.latest = None
        items = []
        while epoch.items and len(items) < self.k:
            item = epoch.items.pop(0)
            if item.kind == "broken":
                return Broken
            items.append(item)
        if any(i.kind == "elsewhere" or not isinstance(i.x, torch.Tensor) for i in items):
            return ValueError, TypeError  # whichever is first; no shape has been looked at
        places, taken = [], {}
        for item in items:
            if item.kind == "malformed":
                return TypeError, ValueError
            key = (tuple(item.x.shape[1:]), torch.promote_types(item.x.dtype, torch.float32))
            if item.kind == "hostile" and item.x.numel() and key not in self.seen:
                return ValueError
            places.append((item.x.detach(), *self.place(item.x, taken)))
        if items:
            self.group, self.done, self.due, self.past = places, 0, [], []
            for _, key, rows in places:
                if self.start == "zero":
                    self.delta[key][rows] = 0
        return bool(items)

    def take_in(self):
        """The gradients of whole replays move delta."""
        size = len(self.group or ())
        while size and len(self.due) >= size and all(d.grad is not None for d in self.due[:size]):
            for due in self.due[:size]:
                delta = self.delta[due.key][due.rows]
                grad = due.grad.to(delta.dtype).nan_to_num(0, 0, 0)
                if self.norm == "linf" or not delta.numel():
                    new = (delta + EPS * grad.sign()).clamp(-EPS, EPS)
                else:
                    flat = grad.reshape(len(grad), -1)
                    step = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
                    new = delta.reshape(len(grad), -1) + EPS * step
                    new = new * (EPS / new.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
                    new = new.reshape(delta.shape)
                self.delta[due.key][due.rows] = new
            self.past += self.due[:size]
            del self.due[:size]
            self.done += 1

    @property
    def left(self):
        return len(self.due) < (self.m - self.done) * len(self.group)

    def advance(self, epoch):
        """What the next batch is, or the error."""
        if epoch.state == "over":
            return StopIteration
        if epoch.state == "new":
            self.take_in()
            if not self.resumed:
                self.leave()
            self.running = epoch
            epoch.state = "running"
        elif self.running is not epoch:
            return RuntimeError
        elif self.group is not None:
            self.take_in()
            waiting = sum(d.grad is None for d in self.due)
            whole = len(self.group) == self.k and len(self.due) == len(self.group)
            if self.due and (whole or waiting >= self.k or not self.left):
                return RuntimeError
        while True:
            if self.group is not None and self.left:
                break
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
        clean, key, rows = self.group[len(self.due) % len(self.group)]
        self.latest = clean, key, rows
        moved = clean.to(key[1]) + self.delta[key][rows]
        low, high = clean.clamp(max=0).to(key[1]), clean.clamp(min=1).to(key[1])
        return moved.clamp(low, high).to(clean.dtype)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.epochs, self.states, self.yielded = [], [], []
        self.patched = contextlib.ExitStack()
        self.patched.enter_context(keeping(SHAPES))

    def teardown(self):
        self.patched.close()

    @initialize(
        key=st.sampled_from([0, "x"]),
        settings=st.lists(
            st.tuples(
                st.sampled_from(["linf", "linf", "l2"]),
                st.integers(1, 3),
                st.integers(1, 3),
                st.sampled_from(["carry", "carry", "zero"]),
            ),
            min_size=2,
            max_size=2,
        ),
    )
    def begin(self, key, settings):
        self.key, self.pairs = key, []
        for norm, m, k, start in settings:
            weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
            optimizer = Sgd([weight], lr=1)
            free = FreeAdversarial(
                optimizer, eps=EPS, replays=m, accumulate=k, norm=norm, start=start, key=key
            )
            self.pairs.append((free, Model(norm, m, k, start), weight, optimizer))

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
        given = data.draw(st.lists(items(self.key), max_size=5))

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
        self.count("batches asked for")
        # Mostly the newest.
        who, epoch = self.epochs[-1 if which else 0]
        model = self.pairs[who][1]
        context = torch.no_grad() if quiet else contextlib.nullcontext()
        expected = model.advance(epoch)
        if not isinstance(expected, torch.Tensor):
            self.refused(lambda: next(epoch.iterator), expected)
            epoch.state = "over"
            if model.running is epoch:
                model.running = None
            return
        with context:
            batch = next(epoch.iterator)
        x = batch if isinstance(batch, torch.Tensor) else batch[0] if self.key == 0 else None
        x = x if x is not None else batch["x"] if isinstance(batch, dict) else batch.x
        assert x.requires_grad
        assert not x.is_leaf
        assert x.dtype == expected.dtype
        torch.testing.assert_close(x.detach(), expected, atol=1e-6, rtol=1e-2, equal_nan=True)
        clean, key, rows = model.latest
        if clean.dtype in (torch.float32, torch.float64) and model.norm == "linf":
            assert torch.equal(x.detach().nan_to_num(7), expected.nan_to_num(7))
            far = (x.detach() - clean).abs().nan_to_num(0, 0, 0)
            assert not x.numel() or far.max() <= EPS + 1e-6
        model.due.append(due := Due(x, key, rows))
        self.yielded = [*self.yielded[-3:], (who, due)]
        made["batches"] += 1

    def loss(self, due, sign, bad):
        """A loss whose gradient at the batch is known, and that gradient."""
        grad = torch.linspace(-1, 1, due.moved.numel(), dtype=torch.float64).sign() * sign
        grad = grad.reshape(due.moved.shape).to(due.moved.dtype)
        if bad is not None and grad.numel():
            grad.view(-1)[::2] = bad
        return (due.moved * grad).sum(), grad

    def arrive(self, due, grad):
        grad = grad.to(due.key[1]).nan_to_num(0, 0, 0)
        due.grad = grad if due.grad is None else due.grad + grad

    bads = st.sampled_from([None, None, None, 0.0, float("nan"), float("inf"), float("-inf")])

    @precondition(lambda self: self.yielded)
    @rule(which=st.integers(0, 3), sign=st.sampled_from([1, -1]), bad=bads)
    def go_backward(self, which, sign, bad):
        """In the loop's own backward pass, also once more, or for a batch of long ago."""
        self.count("backward passes")
        _, due = self.yielded[-1 if which else 0]
        loss, grad = self.loss(due, sign, bad)
        if due.over:
            made["batches that came again"] += 1
            self.refused(loss.backward, RuntimeError)
            return
        loss.backward()
        self.arrive(due, grad)

    @precondition(lambda self: self.yielded)
    @rule(
        which=st.integers(0, 3),
        sign=st.sampled_from([1, -1]),
        bad=bads,
        broken=st.sampled_from([False, False, False, True]),
    )
    def step(self, which, sign, bad, broken):
        self.count("steps of the optimizer asked for")
        who, due = self.yielded[-1 if which else 0]
        free, model, weight, optimizer = self.pairs[who]
        loss, grad = self.loss(due, sign, bad)
        loss = loss.double() + weight
        optimizer.broken = broken
        model.take_in()
        index = next((i for i, d in enumerate(model.due) if d.grad is None), None)
        if model.group is None or index is None:
            self.refused(lambda: free.step(loss), RuntimeError)
            return
        sizes = [len(x) for x, *_ in model.group]
        share = sizes[index] / sum(sizes) if sum(sizes) else 1.0
        share = share if len(sizes) > 1 else 1.0
        model.gradient = share + (model.gradient if index else 0)
        if not due.over:
            self.arrive(due, grad * share)
        ends = index == len(sizes) - 1
        if due.over or model.due[index].grad is None or (ends and broken):
            self.refused(lambda: free.step(loss), (RuntimeError, Broken))
            for d in model.due[: index + 1]:
                d.grad = None
            return
        free.step(loss)
        made["steps of the optimizer"] += ends
        if ends:
            model.weight -= model.gradient
            model.take_in()

    def skip(self, who):
        self.count("skips")
        free, model, *_ = self.pairs[who]
        if model.group is None:
            self.refused(free.skip, RuntimeError)
            return
        free.skip()
        model.take_in()
        model.leave()

    @precondition(lambda self: self.epochs)
    @rule(which=st.integers(0, 3), how=st.sampled_from(["close", "throw", "forget"]))
    def leave_an_epoch(self, which, how):
        self.count("loops left")
        who, epoch = self.epochs[-1 if which else 0]
        model = self.pairs[who][1]
        if how == "throw":
            with pytest.raises((Broken, KeyboardInterrupt)):
                epoch.iterator.throw(KeyboardInterrupt if which % 2 else Broken)
        else:
            epoch.iterator.close()
        epoch.state = "over"
        if model.running is epoch:
            model.running = None
        if how == "forget":
            self.epochs.remove((who, epoch))

    @rule(who=st.integers(0, 1), way=st.sampled_from(["memory", "file"]))
    def save(self, who, way):
        self.count("states saved")
        free, model, *_ = self.pairs[who]
        state = free.state_dict()
        model.take_in()
        if way == "file":
            torch.save(state, file := io.BytesIO())
            file.seek(0)
            with torch.serialization.safe_globals([Pair, Record]):
                state = torch.load(file, weights_only=True)
        group = None if model.group is None else [x.clone() for x, *_ in model.group]
        delta = {key: buffer.clone() for key, buffer in model.delta.items()}
        self.states.append((state, model.settings, delta, group, model.done))
        self.states = self.states[-3:]

    @precondition(lambda self: self.states)
    @rule(who=st.integers(0, 1), which=st.integers(0, 2))
    def load(self, who, which):
        self.count("states loaded")
        free, model, *_ = self.pairs[who]
        state, settings, delta, group, done = self.states[which % len(self.states)]
        other = len(delta) == len(model.delta) == 1 and delta.keys() != model.delta.keys()
        unseen = group and any(
            x.numel() and not bool(((x >= -0.1) & (x <= 1.1)).all()) for x in group
        )
        assert not unseen or delta  # what stands in a group has its rows of delta
        if settings != model.settings or other or len(group or ()) > model.k:
            self.refused(lambda: free.load_state_dict(state), ValueError)
            return
        free.load_state_dict(state)
        model.begin({key: buffer.clone() for key, buffer in delta.items()})
        if group is not None:
            taken = {}
            model.group = [(x, *model.place(x, taken)) for x in group]
            model.done, model.resumed = done, True

    def leave_the_block(self, who):
        self.count("blocks left")
        free, model, *_ = self.pairs[who]
        with free:
            pass
        model.begin({})

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
        assert free.last == (model.group is not None and not len(model.due) % len(model.group))
        if model.latest is None:
            assert free.clean is free.delta is None
            return
        clean, key, rows = model.latest
        assert torch.equal(free.clean.nan_to_num(7), clean.nan_to_num(7))
        torch.testing.assert_close(free.delta, model.delta[key][rows], atol=1e-6, rtol=0)

    @rule(
        who=st.integers(0, 1),
        what=st.sampled_from(
            [
                "look",
                "look",
                "skip",
                "skip",
                "leave the block",
                "state",
                "window",
                "delta",
                "done",
            ]
        ),
    )
    def do_something_rare(self, who, what):
        rare = {"look": self.look, "skip": self.skip, "leave the block": self.leave_the_block}
        rare[what](who) if what in rare else self.load_junk(who, what)

    @precondition(lambda self: self.epochs)
    @rule(count=st.integers(1, 12), own=st.booleans())
    def train(self, count, own):
        """As a loop would that does all right."""
        for _ in range(count):
            before = made["batches"]
            self.take_a_batch(1, False)
            if made["batches"] == before:
                return
            self.go_backward(1, 1, None) if own else self.step(1, 1, None, False)

    @invariant()
    def both_agree(self):
        for free, model, weight, _ in getattr(self, "pairs", []):
            held = buffers(free)
            assert list(held) == [(*key, 0) for key in model.delta]
            for mine, buffer in zip(model.delta.values(), held.values(), strict=True):
                torch.testing.assert_close(buffer, mine, atol=1e-6, rtol=0)
                far = free.threat.distance(buffer)
                assert buffer.isfinite().all()
                assert not buffer.numel() or far.max() <= EPS * (1 + 1e-6)
            assert abs(weight.item() - model.weight) < 1e-9


@pytest.mark.filterwarnings("ignore:the input gradient of", "ignore:the input's values run")
def test_any_sequence_of_calls_does_what_a_plain_model_says():
    run_state_machine_as_test(
        Machine, settings=hypothesis.settings(max_examples=60, stateful_step_count=40)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the input gradient of", "ignore:the input's values run")
def test_a_long_sequence_of_calls_does_what_a_plain_model_says(capsys):
    made.clear()
    settings = hypothesis.settings(max_examples=300, stateful_step_count=60, database=None)
    while made["steps"] < STEPS:
        run_state_machine_as_test(Machine, settings=settings)
    with capsys.disabled():
        sys.stdout.write(f"\n{dict(made)}\n")
