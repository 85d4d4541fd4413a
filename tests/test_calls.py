"""Any sequence of calls of the module `at`, and any number of inputs, against a plain model of what must hold."""

import collections
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from free_adv import FreeAdversarial
from tests.internals import buffers

EPS = 0.25
EXAMPLES = int(os.environ.get("EXAMPLES", 3000))  # of the long form
SHAPES = [(2,), (3,), (2, 2)]


class Model:
    """delta of each sample shape, and for each batch the gradients that have come, by stretch of rows."""

    def __init__(self):
        self.delta, self.grads = {}, collections.defaultdict(dict)

    def rows(self, shape, start, stop):
        old = self.delta.get(shape, torch.zeros(0, *shape))
        self.delta[shape] = torch.cat((old, torch.zeros(max(0, stop - len(old)), *shape)))
        return self.delta[shape][start:stop]

    def receive(self, batch, place, grad):
        held = self.grads[batch]
        held[place] = held[place] + grad if place in held else grad

    def ascend(self):
        for held in self.grads.values():
            for (shape, start, stop), grad in held.items():
                rows = self.delta[shape][start:stop]
                rows.copy_((rows + EPS * grad.sign()).clamp(-EPS, EPS))
        self.grads.clear()

    def agrees(self, free):
        for (shape, *_), buffer in buffers(free).items():  # made for a whole group at once
            assert torch.equal(
                buffer, self.rows(shape, 0, max(len(buffer), len(self.delta.get(shape, ()))))
            )
        return buffers(free).keys() == {(shape, torch.float32, 0) for shape in self.delta}


def drawn(data, shape):
    """A gradient with no rule to it."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    return torch.randint(-1, 2, shape, generator=generator).float()


def sequence_of_calls(data):
    """In each batch some passes of some calls each; some passes are given up."""
    replays, accumulate = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    module, model = nn.Identity(), Model()
    free = FreeAdversarial(eps=EPS, bounds=None, replays=replays, accumulate=accumulate, at=module)
    groups = [sizes[i : i + accumulate] for i in range(0, len(sizes), accumulate)]
    order = iter([(i, n) for group in groups for _ in range(replays) for i, n in enumerate(group)])

    def forward(n, left, used):
        """The calls of one pass: rows, output and gradient of each; what is left, and the rows used."""
        calls, used = [], used.copy()
        for size in data.draw(st.lists(st.integers(1, n), min_size=1, max_size=3)):
            if not calls:  # a pass takes as many samples as its first call
                size = min(size, left or n) if accumulate > 1 else size
                left, used = (n, taken.copy()) if size > left else (left, used)
                left -= size
            shape = data.draw(st.sampled_from(SHAPES))
            place = shape, used[shape], used[shape] + size
            used[shape] += size
            x = torch.rand(size, *shape)
            moved = module(x)
            assert torch.equal(moved.detach(), x + model.rows(*place))
            calls.append((place, moved, drawn(data, x.shape)))
        return calls, left, used

    for batch in free.replay([torch.zeros(n) for n in sizes]):
        index, n = next(order)
        assert len(batch) == n
        if index == 0:
            model.ascend()
            taken = collections.Counter()  # rows of the group's earlier batches
        assert model.agrees(free)
        left, used, most = n, taken, taken
        passes = data.draw(st.integers(1, 3))
        while passes > 0 or (accumulate > 1 and left):  # of a group, each batch goes through whole
            passes -= 1
            if data.draw(st.integers(0, 3)) == 0:  # given up, for a log or for want of memory
                forward(n, left, used)
            calls, left, used = forward(n, left, used)
            sum((moved * grad).sum() for _, moved, grad in calls).backward()
            most = most | used
            for place, _, grad in calls:
                model.receive(index, place, grad)
        taken = most
    assert next(order, None) is None


def sequence_of_batches(data):
    """Lists of inputs of some shapes, of which some receive their gradient late or more than once."""
    replays, accumulate = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    single = data.draw(st.booleans())  # each input one sample without a batch dimension
    count = data.draw(st.integers(1, 3))
    model, given = Model(), []
    for _ in range(data.draw(st.integers(1, 4))):
        forms = [data.draw(st.sampled_from(SHAPES)) for _ in range(count)]
        n = data.draw(st.integers(1, 3))
        given.append([torch.rand(shape if single else (n, *shape)) for shape in forms])
    free = FreeAdversarial(
        eps=EPS,
        bounds=None,
        replays=replays,
        accumulate=accumulate,
        key=(...,) if single else [*range(count)],
    )
    groups = [given[i : i + accumulate] for i in range(0, len(given), accumulate)]
    order = iter([(i, b) for group in groups for _ in range(replays) for i, b in enumerate(group)])
    copies = [[x.clone() for x in batch] for batch in given]
    for batch in free.replay(given):
        index, clean = next(order)
        if index == 0:
            model.ascend()
            used = collections.Counter()
        places = []
        for x, moved in zip(clean, batch, strict=True):
            shape = x.shape if single else x.shape[1:]
            size = 1 if single else len(x)
            places.append((tuple(shape), used[shape], used[shape] + size))
            used[shape] += size
            assert torch.equal(moved.detach(), (x + model.rows(*places[-1]).view(x.shape)))
        assert model.agrees(free)
        torch.testing.assert_close(free.clean, clean)
        passes = data.draw(st.lists(st.integers(0, count - 1), max_size=3))
        for which in [*range(count), *passes] if data.draw(st.booleans()) else [None]:
            grads = [drawn(data, x.shape) for x in clean]
            parts = [which] if which is not None else [*range(count)]
            sum((batch[i] * grads[i]).sum() for i in parts).backward()
            for i in parts:
                (shape, start, stop) = places[i]
                model.receive(index, places[i], grads[i].view(stop - start, *shape))
    assert next(order, None) is None
    for before, batch in zip(copies, given, strict=True):
        assert all(map(torch.equal, before, batch))


@pytest.mark.filterwarnings("ignore:the input gradient of", "ignore:the input's values run")
@pytest.mark.parametrize("sequence", [sequence_of_calls, sequence_of_batches])
def test_any_sequence_does_what_a_plain_model_says(sequence):
    hypothesis.given(st.data())(hypothesis.settings(max_examples=150)(sequence))()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the input gradient of", "ignore:the input's values run")
@pytest.mark.parametrize("sequence", [sequence_of_calls, sequence_of_batches])
def test_many_sequences_do_what_a_plain_model_says(sequence):
    settings = hypothesis.settings(max_examples=EXAMPLES, database=None)
    hypothesis.given(st.data())(settings(sequence))()
