"""Every place has a delta of its own: minibatch and micro-batch, and in it the path of an input or the number of a call."""

import itertools
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import free_for, joined, weights

EPS, STEP, M, LR = 0.1, 0.03, 3, 0.1
SIZES = (5, 3, 5)  # a shorter one between, of which the rows behind stay as they are


def layers(*sizes):
    torch.manual_seed(1)
    return nn.Sequential(
        *[nn.Linear(i, o, dtype=torch.float64) for i, o in itertools.pairwise(sizes)]
    )


def pairs():
    """Two views and labels."""
    torch.manual_seed(2)
    return [
        (*torch.rand(2, n, 4, dtype=torch.float64).unbind(), torch.arange(n) % 3) for n in SIZES
    ]


class ByHand:
    """Algorithm 1 with a delta for each name, as long as the longest that it has met."""

    def __init__(self, parameters):
        self.parameters = [*parameters]
        self.deltas = defaultdict(lambda: torch.zeros(0, dtype=torch.float64))
        self.leaves = {}

    def rows(self, name, x, start=0):
        """`x` moved by rows of the delta of that name."""
        old, stop = self.deltas[name], start + len(x)
        if len(old) < stop:
            new = torch.zeros(stop, *x.shape[1:], dtype=x.dtype)
            new[: len(old)] = old.reshape(-1, *x.shape[1:])
            self.deltas[name] = new
        if name not in self.leaves or len(self.leaves[name]) < stop:
            assert name not in self.leaves or self.leaves[name].grad is None
            self.leaves[name] = self.deltas[name].clone().requires_grad_()
        return x + self.leaves[name][start:stop]

    def update(self, *losses):
        """One backward pass for each loss, then one step of the weights and of every delta that was met."""
        for loss in losses:
            loss().backward()
        with torch.no_grad():
            for p in self.parameters:
                p -= LR * p.grad
                p.grad = None
            for name, leaf in self.leaves.items():
                moved = self.deltas[name] + STEP * leaf.grad.sign()
                self.deltas[name] = moved.clamp(-EPS, EPS)
        self.leaves = {}


def library(parameters, loader, loss, **arguments):
    """Train by the library, with `step`; the weights."""
    sgd = torch.optim.SGD(parameters, LR)
    settings = {"eps": EPS, "step_size": STEP, "replays": M, "bounds": None, **arguments}
    free = FreeAdversarial(sgd, **settings)
    for batch in free.replay(loader):
        free.step(loss(*batch))
    return free


def same(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def train_by_hand(model):
    """Each of the two views with a delta of its own."""
    hand = ByHand(model.parameters())
    for a, b, y in pairs():
        for _ in range(M):
            x = torch.cat([hand.rows("a", a), hand.rows("b", b)], 1)
            hand.update(lambda x=x, y=y: functional.cross_entropy(model(x), y))


def test_two_inputs_keep_a_delta_each_when_a_batch_is_shorter():
    model, twin = layers(8, 3), layers(8, 3)
    library(
        model.parameters(),
        pairs(),
        lambda a, b, y: functional.cross_entropy(model(torch.cat([a, b], 1)), y),
        key=[0, 1],
    )
    train_by_hand(twin)
    same(model.parameters(), twin.parameters())


GIVEN = {  # how a module may be given a tensor of the batch
    "as it is": lambda at, t: at(t),
    "by name": lambda at, t: at(input=t),
    "a copy, as on its way to a GPU": lambda at, t: at(t.clone()),
    "a view": lambda at, t: at(t.view(len(t), -1)),
    "a view of a copy": lambda at, t: at(t.clone()[:]),
}
given = pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN)


@given
def test_two_calls_of_a_module_keep_a_delta_each_when_a_batch_is_shorter(give):
    model, twin, at = layers(8, 3), layers(8, 3), nn.Identity()
    at.forward = lambda input: input
    library(
        model.parameters(),
        pairs(),
        lambda a, b, y: functional.cross_entropy(
            model(torch.cat([give(at, a), give(at, b)], 1)), y
        ),
        at=at,
    )
    train_by_hand(twin)
    same(model.parameters(), twin.parameters())


CUTS = {  # the samples of each backward pass, in its order
    "halves": [slice(0, 2), slice(2, 4)],
    "the second half first": [slice(2, 4), slice(0, 2)],
    "one by one": [slice(i, i + 1) for i in (2, 0, 3, 1)],
    "twice, as for SAM": [slice(0, 4), slice(0, 4)],
    "the whole, then halves": [slice(0, 4), slice(2, 4), slice(0, 2)],
    "the halves twice": [slice(0, 2), slice(0, 2), slice(2, 4), slice(2, 4)],
}


@pytest.mark.parametrize("moved", [False, True], ids=["of the batch", "of a copy of the batch"])
@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_piece_of_the_batch_has_the_rows_of_its_samples_whenever_it_comes(cuts, fold, moved):
    torch.manual_seed(3)
    x, y = torch.rand(4, fold, 5, dtype=torch.float64), torch.arange(4) % 3
    (stem, head), (p, q) = layers(5, 6, 3), layers(5, 6, 3)
    logits = lambda h, out: out(torch.tanh(h)).unflatten(0, (-1, fold)).sum(1)  # noqa: E731
    sgd = torch.optim.SGD([*stem.parameters(), *head.parameters()], LR)
    for a, c in FreeAdversarial(eps=EPS, step_size=STEP, replays=M, at=stem).replay([(x, y)]):
        a = a.clone() if moved else a
        sgd.zero_grad()
        for cut in cuts:
            functional.cross_entropy(logits(stem(a[cut].flatten(0, 1)), head), c[cut]).backward()
        sgd.step()
    hand = ByHand([*p.parameters(), *q.parameters()])
    for _ in range(M):
        whole = p(x.flatten(0, 1)).detach()
        hand.rows("x", whole)
        hand.update(
            *[
                lambda cut=cut: functional.cross_entropy(
                    logits(
                        p(x[cut].flatten(0, 1))
                        + hand.leaves["x"][cut.start * fold : cut.stop * fold],
                        q,
                    ),
                    y[cut],
                )
                for cut in cuts
            ]
        )
    same([*stem.parameters(), *head.parameters()], [*p.parameters(), *q.parameters()])


def test_pieces_along_another_dimension_and_copies_of_pieces_are_known_by_their_order():
    x = torch.rand(4, 6)
    at = nn.Identity()
    free = FreeAdversarial(eps=EPS, replays=2, at=at, start="uniform")
    for (a,) in free.replay([(x,)]):
        one, two = at(a[:, :3]), at(a[:, 3:])  # two calls of one pass
        deltas = one - a[:, :3], two - a[:, 3:]
        assert not torch.equal(*deltas)
        (one.sum() + two.sum()).backward()
        again = at(a[:, :3].clone())  # the first call of the next pass: all were through
        torch.testing.assert_close(again - a[:, :3], deltas[0])
        again.sum().backward()
        first, second = at(a[:2].clone()), at(a[2:].clone())  # two calls, each with a delta
        (first.sum() + second.sum()).backward()
        if free.turn == 0:
            assert not torch.equal(first - a[:2], second - a[2:])


@pytest.mark.parametrize("order", [("ids", "mask"), ("mask", "ids"), ("copy", "mask")])
def test_two_texts_with_one_mask_keep_a_delta_each(order):
    class Masked(nn.Module):
        def forward(self, mask, ids=None, copy=None):
            return (copy if ids is None else ids) * mask

    at = Masked()
    free = FreeAdversarial(eps=EPS, replays=2, bounds=None, at=at)
    batch = {"a": torch.rand(4, 3), "b": torch.rand(4, 3), "mask": torch.ones(4, 1)}
    for b in free.replay([batch]):
        out = []
        for name in ("a", "b"):
            given = {"mask": b["mask"], "ids": b[name], "copy": b[name].clone()}
            out.append(at(**{word: given[word] for word in order}))
        (out[0].sum() - out[1].sum()).backward()
    torch.testing.assert_close(
        free.delta, EPS * torch.tensor([1.0] * 4 + [-1.0] * 4)[:, None].expand(8, 3)
    )


@pytest.mark.parametrize("ahead", [False, True])
def test_copies_of_a_part_of_a_micro_batch_do_not_take_the_next_one_for_it(ahead):
    """A model that leaves samples out, as those without a label: what is left of the last micro-batch stays out."""
    at = nn.Identity()
    free = FreeAdversarial(eps=EPS, replays=2, accumulate=2, at=at, start="uniform")
    replay, used = iter(free.replay([torch.rand(4, 3), torch.rand(4, 3)])), []
    for _ in range(2):
        batches = [next(replay), next(replay)] if ahead else [None, None]
        for i, x in enumerate(batches):
            x = next(replay) if x is None else x
            part = x[[0, 1, 2, 3]] if ahead else x[[0, 1, 2]] if i == 0 else x[[3]]
            z = at(part)
            used.append((z - part).detach())
            z.sum().backward()
    assert list(replay) == []
    one, two = used[:2]
    assert not torch.equal(one[:1], two[:1])
    for before, after in zip(used[:2], used[2:], strict=True):  # each has gone up from where it was
        torch.testing.assert_close(after, (before + EPS).clamp(max=EPS))


def test_what_stands_first_in_a_batch_does_not_say_how_many_samples_it_has():
    words, y = torch.arange(50).view(10, 5), torch.arange(10) % 3

    def trained(first, accumulate):
        torch.manual_seed(1)
        emb, head = nn.Embedding(50, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
        model = nn.ModuleList([emb, head])
        free = free_for(model, eps=EPS, replays=2, accumulate=accumulate, at=emb)
        cuts = [slice(0, 8), slice(8, 10)] if accumulate == 2 else [slice(0, 10)]
        for _, t, c in free.replay([(first, words[cut], y[cut]) for cut in cuts]):
            free.step(functional.cross_entropy(head(emb(t).mean(1)), c))
        return weights(model)

    for first in (torch.tensor(1.0), torch.ones(3), torch.ones(20)):
        torch.testing.assert_close(trained(first, 2), trained(first, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("grads", [True, False])
def test_features_that_are_cached_are_those_of_the_perturbed_batch_or_it_is_told(grads, recwarn):
    """A contrastive loss over all features, which are made once, and again in chunks with gradients."""
    torch.manual_seed(4)
    x, z = torch.rand(6, 5, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    loss = lambda f: functional.cross_entropy(5 * f @ z.T, torch.arange(6))  # noqa: E731
    (at, rest), (p, q) = layers(5, 6, 4), layers(5, 6, 4)
    sgd = torch.optim.SGD([*at.parameters(), *rest.parameters()], LR)
    for (a,) in FreeAdversarial(eps=EPS, step_size=STEP, replays=M, at=at).replay([(x,)]):
        sgd.zero_grad()
        with torch.set_grad_enabled(grads):
            features = rest(at(a)).detach().requires_grad_()
        loss(features).backward()
        for cut in (slice(3, 6), slice(0, 3)):
            (rest(at(a[cut])) * features.grad[cut]).sum().backward()
        sgd.step()
    told = [str(w.message) for w in recwarn if "torch.no_grad() come again" in str(w.message)]
    assert len(told) == (not grads)
    if grads:
        hand = ByHand([*p.parameters(), *q.parameters()])
        for _ in range(M):
            hand.rows("x", p(x).detach())
            hand.update(lambda: loss(q(p(x) + hand.leaves["x"])))
        same([*at.parameters(), *rest.parameters()], [*p.parameters(), *q.parameters()])


def test_a_module_that_is_given_something_computed_beside_the_batch_is_known_by_its_calls():
    """A layer that runs twice over hidden states, with a mask of the batch."""

    class Masked(nn.Module):
        def forward(self, h, mask):
            return h * mask

    torch.manual_seed(5)
    stem, at = nn.Linear(3, 3), Masked()
    free = FreeAdversarial(eps=EPS, replays=2, at=at, start="uniform")
    for x, mask in free.replay([(torch.rand(4, 3), torch.ones(4, 1))]):
        one = stem(x)
        two = at(one, mask)
        three = at(two, mask)
        assert not torch.equal((two - one).detach(), (three - two).detach())
        three.sum().backward()
        assert len(free.delta) == 8


@pytest.mark.parametrize("short", [1, 2, 3])
@pytest.mark.parametrize("at", [False, True])
def test_delta_of_a_consumer_that_takes_batches_ahead_is_that_of_one_that_does_not(short, at):
    """Micro-batches of a short last group; gradients that do not depend on delta, so that looking ahead changes nothing."""
    torch.manual_seed(0)
    xs = [torch.rand(4, 5) for _ in range(short)]
    grads = {i: torch.randn(4, 5) for i in range(short)}
    found = []
    for ahead in (1, 4):
        module = nn.Identity()
        free = FreeAdversarial(
            eps=0.1, step_size=0.03, bounds=None, replays=4, accumulate=4, at=module if at else None
        )
        order = iter([i for _ in range(4) for i in range(short)])
        replay, left = iter(free.replay([(x, 0) for x in xs])), 4 * short
        while left:
            taken = list(itertools.islice(replay, min(left, ahead)))
            left -= len(taken)
            for x, _ in taken:
                (module(x) * grads[next(order)]).sum().backward()
        list(replay)
        found.append(joined(free))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)
