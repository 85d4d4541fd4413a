"""Any sequence of calls of the module `at`, and any number of inputs, against a plain model of what must hold.

The model shares no code with the library: a buffer for every place and sample shape, the batches that are out, and the
gradients that have come for each of them.
"""

import dataclasses
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from free_adv import FreeAdversarial
from tests.helpers import equal
from tests.internals import buffers

EPS, STEP = 0.25, 0.0625  # sums of such steps are exact
EXAMPLES = int(os.environ.get("EXAMPLES", 3000))  # of the long form
SHAPES = [(2,), (3,), (2, 2)]
STARTS = ["carry", "carry", "zero", "uniform"]
CLASSES = 7  # the length of a tensor that is not one of samples


@dataclasses.dataclass(eq=False)
class Visit:
    """A batch as it is yielded in one of its replays."""

    number: int  # which batch of the loader
    turn: int
    minibatch: int
    micro: int
    ends: bool  # an update
    batch: object = dataclasses.field(default=None, repr=False)  # what was yielded
    grads: dict = dataclasses.field(default_factory=dict, repr=False)  # by buffer, from row 0 on
    trained: bool = False
    whole: bool = True  # not in the middle of its samples
    through: dict = dataclasses.field(default_factory=dict)  # samples, by the number of a call
    calls: int = 0  # by order, since the last backward pass

    def receive(self, key, start, grad):
        held = self.grads.get(key, torch.zeros(0, *key[1]))
        more = torch.zeros(max(0, start + len(grad) - len(held)), *key[1])
        self.grads[key] = torch.cat((held, more))
        self.grads[key][start : start + len(grad)] += grad


class Model:
    """What is in flight, and delta by place and sample shape."""

    def __init__(self, data, count):
        self.m, self.k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        self.w, self.start = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(STARTS))
        self.unread = [*range(count)]
        self.delta, self.begun = {}, {}
        self.leave()

    def free(self, **arguments):
        return FreeAdversarial(
            eps=EPS,
            step_size=STEP,
            bounds=None,
            replays=self.m,
            accumulate=self.k,
            window=self.w,
            start=self.start,
            **arguments,
        )

    def leave(self):
        """Nothing is in flight."""
        self.stops, self.waiting, self.past, self.latest = [], [], [], None

    def through(self):
        """How many of the batches that are out have made their updates."""
        ends = [i + 1 for i, visit in enumerate(self.waiting) if visit.ends]
        return max((n for n in ends if all(visit.trained for visit in self.waiting[:n])), default=0)

    def settle(self):
        n = self.through()
        for visit in self.waiting[:n]:
            for key, grad in visit.grads.items():
                rows = self.delta[key][: len(grad)]
                rows.copy_((rows + STEP * grad.sign()).clamp(-EPS, EPS))
        self.past += self.waiting[:n]
        del self.waiting[:n], self.stops[:n]

    def may_ask(self):
        """No loop takes more batches than an update has."""
        n = self.through()
        out = self.waiting[n:]
        if not out:
            return True
        sizes = {}
        for stop in self.stops:
            sizes[stop.minibatch] = max(sizes.get(stop.minibatch, 0), stop.micro + 1)
        whole = all(size == self.k for size in sizes.values()) and len(out) == self.k
        late = sum(not visit.trained for visit in out) >= self.k
        return not (whole or late or len(self.stops) == n + len(out))

    def ask(self):
        """The next batch; None behind the last one."""
        self.settle()
        self.past = []
        if not self.stops:
            numbers, self.unread = self.unread[: self.k * self.w], self.unread[self.k * self.w :]
            minibatches = [numbers[i : i + self.k] for i in range(0, len(numbers), self.k)]
            self.begun = {}
            self.stops = [
                Visit(number, turn, w, i, ends=i == len(minibatch) - 1)
                for turn in range(self.m)
                for w, minibatch in enumerate(minibatches)
                for i, number in enumerate(minibatch)
            ]
        if not self.stops:
            return None
        self.latest = self.stops[len(self.waiting)]
        self.waiting.append(self.latest)
        return self.latest

    def skip(self):
        self.settle()
        self.forget()
        self.stops = [stop for stop in self.stops if stop.minibatch != self.latest.minibatch]

    def forget(self):
        """Batches that are out have to come again."""
        for visit in self.waiting:
            visit.grads, visit.trained, visit.whole = {}, False, True
            visit.through, visit.calls = {}, 0
        self.waiting, self.past = [], []

    def rows(self, free, key, start, stop):
        """Those rows of delta: each begins when it is first used by what is in flight."""
        old = self.delta.get(key, torch.zeros(0, *key[1]))
        more = torch.zeros(max(0, stop - len(old)), *key[1])
        buffer = self.delta[key] = torch.cat((old, more))
        begun = self.begun.setdefault(key, set())
        for row in set(range(start, stop)) - begun:
            if self.start == "zero":
                buffer[row] = 0
            elif self.start == "uniform":
                new = buffers(free)[(*key, torch.float32)][row]
                assert new.abs().max() <= EPS
                assert not torch.equal(new, buffer[row])
                buffer[row] = new
        begun.update(range(start, stop))
        return buffer[start:stop]

    def agrees(self, free):
        held = buffers(free)
        assert held.keys() >= {(*key, torch.float32) for key in self.delta}
        for (place, shape, _), buffer in held.items():
            key = place, shape
            # Those of inputs are made for all that is in flight at once.
            mine = self.delta.get(key, torch.zeros(0, *shape))
            mine = torch.cat((mine, torch.zeros(max(0, len(buffer) - len(mine)), *shape)))
            if self.start != "carry":  # others begin anew before they are used
                rows = sorted(self.begun.get(key, ()))
                mine, buffer = mine[rows], buffer[rows]
            assert torch.equal(buffer, mine)


def drawn(data, shape):
    """A gradient with no rule to it."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    return torch.randint(-1, 2, shape, generator=generator).float()


class Run:
    """A loop of its own, which now and then is left, resumed, or skips a minibatch."""

    def __init__(self, data, given, **arguments):
        self.data, self.given, self.arguments = data, given, arguments
        self.model, self.source = Model(data, len(given)), iter(given)
        self.ahead = self.model.k > 1 and data.draw(st.booleans())  # takes batches before it trains
        self.free = self.model.free(**arguments)
        self.replay = iter(self.free.replay(self.source))

    def go(self, check, train):
        """Take batches and train on them, until there are no more."""
        model = self.model
        while True:
            self.something_rare()
            left = [visit for visit in model.waiting if not visit.trained]
            begun = [visit for visit in model.waiting if not visit.whole]
            if (
                model.may_ask()
                and not begun
                and (self.ahead or not left)
                and not self.chance(4, model.waiting)
            ):
                visit = model.ask()
                batch = next(self.replay, None)
                assert (batch is None) == (visit is None)
                if visit is None:
                    return model.agrees(self.free)
                assert (self.free.turn, self.free.last) == (visit.turn, visit.ends)
                visit.batch = batch
                check(visit)
                model.agrees(self.free)
            else:
                train(left)

    def chance(self, n, possible=True):
        """One of n, where it is possible."""
        return bool(possible) and self.data.draw(st.integers(0, n - 1)) == n - 1

    def something_rare(self):
        model, what = self.model, self.data.draw(st.integers(0, 15), label="something rare")
        if what == 13:  # another process goes on
            state = self.free.state_dict()
            model.settle()
            self.free = model.free(**self.arguments)
            self.free.load_state_dict(state)
            model.forget()
            model.latest = None
            assert self.free.turn is None
        elif what == 14:  # `break`, and a new loop
            self.replay.close()
            model.settle()
            model.leave()
        elif what == 15 and model.latest and model.stops:
            self.free.skip()
            model.skip()
            return
        else:
            return
        self.replay = iter(self.free.replay(self.source))


class At(nn.Module):
    """Makes what it is told to, whatever it is given beside."""

    def forward(self, *given, make, **named):
        return make()


def batch_of(n):
    """Tensors of samples at several depths, and one that is none."""
    return {
        "ids": torch.randint(0, 9, (n, 4)),
        "more": [torch.rand(n, 2, 3), torch.arange(n), "a text"],
        "classes": torch.rand(CLASSES, 2),
    }


TENSORS = {
    "['ids']": lambda b: b["ids"],
    "['more'][0]": lambda b: b["more"][0],
    "['more'][1]": lambda b: b["more"][1],
    "['classes']": lambda b: b["classes"],
}


@dataclasses.dataclass
class Given:
    """What a call is given, and what the model knows of it.

    Without a path it is known by its order; without a start the samples follow those of the last call of that number.
    """

    args: tuple
    samples: int
    rows: int  # of each
    path: str | None = None
    start: int | None = None


def known(data, visit, n):
    """A piece of the batch."""
    path = data.draw(st.sampled_from([*TENSORS]))
    t = TENSORS[path](visit.batch)
    start = data.draw(st.integers(0, len(t) - 1))
    stop = data.draw(st.integers(start + 1, len(t)))
    part = (
        t[start:stop]
        if data.draw(st.booleans())
        else t.split([start, stop - start, len(t) - stop])[1]
    )
    rows = data.draw(st.integers(1, 2))
    if t.ndim == 3:
        part = data.draw(
            st.sampled_from([part, part.transpose(1, 2), part.flatten(0, 1), part[None]])
        )
    beside = data.draw(st.sampled_from([(), (torch.arange(stop - start),), (1, None), "piece"]))
    if beside == "piece":  # of as many samples, behind it
        beside = (visit.batch["ids"][: stop - start],)
        beside = beside if len(beside[0]) == stop - start else ()
        if beside and start == 0:  # the same samples of two tensors
            path = "+".join(sorted({path, "['ids']"}))
    return Given((part, *beside), stop - start, rows, path, start)


def unknown(data, visit, n, most):
    """No memory of the batch, of up to so many samples, or no piece of it."""
    t, size = visit.batch["ids"], data.draw(st.integers(1, most))
    first, rows = data.draw(st.integers(0, n - min(n, size))), data.draw(st.integers(1, 2))
    crops = visit.batch["more"][0]
    forms = {
        "nothing": lambda: Given((), size, 1),
        "new": lambda: Given((torch.rand(size, 3),), size, 1),
        "columns": lambda: Given((t[first : first + size, 1:3],), size, 1),
        "moved": lambda: Given((t[first : first + size].clone(),), size, 1),
        "moved and folded": lambda: Given(
            (crops[first : first + size].clone().flatten(0, 1),), size, 2
        ),
        "computed": lambda: Given(
            ((torch.ones(size, 2, requires_grad=True) * 2), t[first : first + size]), size, 1
        ),
        "padded": lambda: Given((torch.cat((t, t))[:size],), size, rows),
    }
    if most >= n:
        forms["all moved"] = lambda: Given((t.clone(),), n, 1)
        forms["all moved and folded"] = lambda: Given((crops.clone().flatten(0, 1),), n, 2, start=0)
    form = data.draw(st.sampled_from([*forms]))
    return forms["moved" if size > n else form]() if size <= n else forms["new"]()


def sequence_of_calls(data):
    """In each batch some passes of some calls each; some passes are given up, some are without gradients."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    module = At()
    run = Run(data, [batch_of(n) for n in sizes], at=module)
    model = run.model
    # By order, batches that are out together go through one after the other, each as a whole.
    ordered = model.k > 1 and data.draw(st.booleans())

    def whole(visit):
        return visit.through.get(0, 0) >= sizes[visit.number]

    def call(visit, fresh):
        """One call of the module: its output, buffer, first row, and what comes of it."""
        n = sizes[visit.number]
        if model.k > 1 and not ordered:
            given = known(data, visit, n)
        else:
            most = n - visit.through.get(0, 0) if ordered and fresh and not whole(visit) else n + 1
            forms = [unknown] if ordered else [known, unknown]
            form = data.draw(st.sampled_from(forms), label="form")
            given = form(data, visit, n) if form is known else form(data, visit, n, most)
        shape = data.draw(st.sampled_from(SHAPES), label="shape")
        out = torch.rand(given.samples * given.rows, *shape)
        args, named = given.args, {}
        if args and run.chance(3):
            args, named = (), {f"_{i}": t for i, t in enumerate(args)}
        moved = module(*args, make=lambda: out, **named)
        which, start = given.path, given.start
        if which is None:
            which = visit.calls
            begin = visit.through.get(which, 0)
            again = begin + given.samples > n
            start = (0 if again else begin) if start is None else start
        key = ((visit.minibatch, visit.micro, which), shape)
        first = start * given.rows
        rows = model.rows(run.free, key, first, first + len(out))
        assert torch.equal(moved.detach(), out + rows)
        if data.draw(st.integers(0, 5)) == 5:  # given up, for a log or for want of memory
            return None
        visit.calls += given.path is None
        return moved, key, first, which, start + given.samples

    def backward(visit, calls):
        grads = [drawn(data, moved.shape) for moved, *_ in calls]
        loss = sum((c[0] * grad).sum() for c, grad in zip(calls, grads, strict=True))
        twice = run.chance(5)
        for again in range(1 + twice):
            loss.backward(retain_graph=twice and not again)
            for (_, key, first, *_), grad in zip(calls, grads, strict=True):
                visit.receive(key, first, grad)
        for *_, which, stop in calls:
            visit.through[which] = stop
        visit.calls = 0

    def train(left):
        """A forward pass of some calls, whose gradients come together or one after the other."""
        visit = model.waiting[data.draw(st.integers(0, len(model.waiting) - 1))]
        if ordered:
            visit = next((v for v in model.waiting if not whole(v)), model.waiting[-1])
        calls = []
        for _ in range(data.draw(st.integers(1, 3))):
            if run.chance(5):
                bare(visit)
            calls += filter(None, [call(visit, not calls)])
            if calls and run.chance(4):
                some = [c for c in calls if run.chance(2)] or calls[:1]
                backward(visit, some)
                calls = [c for c in calls if not any(c is s for s in some)]
                break  # what comes next is another pass
        if calls:
            backward(visit, calls)
        visit.trained = bool(visit.grads)
        visit.whole = not visit.trained or not ordered or whole(visit)

    def bare(visit):
        out = torch.rand(sizes[visit.number], 2)
        with torch.no_grad():
            assert module(visit.batch["ids"], make=lambda: out) is out
        module.eval()
        assert module(visit.batch["ids"], make=lambda: out) is out
        module.train()

    def check(visit):
        for path in TENSORS.values():
            assert torch.equal(path(visit.batch), path(run.given[visit.number]))

    run.go(check, train)


def sequence_of_batches(data):
    """Lists of inputs of some shapes, of which some receive their gradient late or more than once."""
    count, given = data.draw(st.integers(1, 3)), []
    listed, named = data.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    key = [("views", ...)] * listed + [*range(count)] * named
    for _ in range(data.draw(st.integers(1, 5))):
        batch = {"label": torch.arange(3)}
        for i in range(count):
            shape = data.draw(st.sampled_from(SHAPES))
            batch[i] = torch.rand(data.draw(st.integers(1, 3)), *shape)
        shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
        batch["views"] = [torch.rand(shape) for shape in shapes]
        if data.draw(st.booleans()):  # a tensor that is there twice
            batch["views"].append(batch["views"][0])
        given.append(batch)
    copies = [{k: [*map(torch.clone, v)] for k, v in b.items()} for b in given]
    run = Run(data, given, key=key if len(key) > 1 else key[0])
    model = run.model

    def inputs(visit):
        """Buffer and first row of each input, what the loader gave and what was yielded."""
        found, taken = [], {}
        clean = given[visit.number]
        if listed:
            for x, moved in zip(clean["views"], visit.batch["views"], strict=True):
                place = (visit.minibatch, visit.micro, "['views'][...]"), tuple(x.shape)
                taken[place] = taken.get(place, -1) + 1
                found.append((place, taken[place], x[None], moved[None]))
        for i in range(count) if named else ():
            place = (visit.minibatch, visit.micro, f"[{i}]"), tuple(clean[i].shape[1:])
            found.append((place, 0, clean[i], visit.batch[i]))
        return found

    def check(visit):
        came = inputs(visit)
        for place, first, x, moved in came:
            rows = model.rows(run.free, place, first, first + len(x))
            assert torch.equal(moved.detach(), x + rows)
        if not named or not listed:
            several = listed or count > 1
            clean = [x[0] if listed else x for _, _, x, _ in came]
            assert equal(run.free.clean, clean if several else clean[0])
        assert torch.equal(visit.batch["label"], given[visit.number]["label"])

    def train(left):
        visits = left or model.waiting
        visit = visits[data.draw(st.integers(0, len(visits) - 1))]
        came = inputs(visit)
        numbers = st.lists(st.integers(0, len(came) - 1), max_size=2, unique=True)
        parts = [[came[i] for i in data.draw(numbers)] for _ in range(2)]
        for part in [came, *parts] if data.draw(st.booleans()) else [*[[c] for c in came], *parts]:
            grads = [drawn(data, x.shape) for _, _, x, _ in part]
            if part:
                losses = zip(part, grads, strict=True)
                sum((moved * grad).sum() for (*_, moved), grad in losses).backward()
            for (place, first, *_), grad in zip(part, grads, strict=True):
                visit.receive(place, first, grad)
        visit.trained = True

    run.go(check, train)
    for before, batch in zip(copies, given, strict=True):
        for k, held in before.items():
            assert all(map(torch.equal, held, batch[k]))


quiet = pytest.mark.filterwarnings(
    "ignore:the input gradient of",
    "ignore:the input's values run",
    "ignore:the batch holds a tensor like its input",
    "ignore:the batches that were taken ahead",
    "ignore:samples that the module given as at",
)


@quiet
@pytest.mark.parametrize("sequence", [sequence_of_calls, sequence_of_batches])
def test_any_sequence_does_what_a_plain_model_says(sequence):
    hypothesis.given(st.data())(hypothesis.settings(max_examples=50)(sequence))()


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("sequence", [sequence_of_calls, sequence_of_batches])
def test_many_sequences_do_what_a_plain_model_says(sequence):
    settings = hypothesis.settings(max_examples=EXAMPLES, database=None)
    hypothesis.given(st.data())(settings(sequence))()
