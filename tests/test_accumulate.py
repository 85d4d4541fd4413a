"""Several micro-batches per update: their shares, when the weights move, and how far a loop may look ahead."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from free_adv import FreeAdversarial
from tests.helpers import free_for, in_ball, loss_of
from tests.internals import ascents
from tests.reference import batches, network


def test_the_share_of_a_micro_batch_is_that_of_its_inputs():
    loader = [(torch.ones(3), x, y) for x, y in batches((8, 3), torch.float64)]
    one, two = network(torch.float64), network(torch.float64)
    plain = free_for(one, accumulate=2)
    for x, y in plain.replay([batch[1:] for batch in loader]):
        plain.step(loss_of(one, x, y))
    free = free_for(two, accumulate=2, key=1)
    for _, x, y in free.replay(loader):
        free.step(loss_of(two, x, y))
    assert torch.equal(one[0].weight, two[0].weight)


def test_a_group_of_empty_batches_passes():
    model = network()
    free = free_for(model, accumulate=2)
    for x, _ in free.replay(batches((0, 0))):
        free.step(model(x).sum())


@pytest.mark.parametrize("sizes", [(4,), (4, 4)])
def test_step_goes_on_where_gradients_of_the_loops_own_have_arrived(sizes):
    model = network()
    free = free_for(model, replays=3, accumulate=3)
    window = list(itertools.islice(free.replay(batches(sizes)), 3))
    for x, y in window[: len(sizes)]:
        loss_of(model, x, y).backward()
    before = model[0].weight.detach().clone()
    for x, y in window[len(sizes) : 2 * len(sizes)]:
        free.step(loss_of(model, x, y))
    assert torch.equal(model[0].weight, before) == (len(sizes) == 2)


@pytest.mark.parametrize("sizes", [(4,), (4, 4)])
def test_step_moves_the_weights_at_the_end_of_each_group_in_a_window_too(sizes):
    model = network()
    free = free_for(model, replays=3, accumulate=3)
    replay, moved = iter(free.replay(batches(sizes))), []
    for _ in range(len(sizes)):
        for x, y in itertools.islice(replay, 3):
            before = model[0].weight.detach().clone()
            free.step(loss_of(model, x, y))
            moved.append(not torch.equal(model[0].weight, before))
    assert moved == [i % len(sizes) == len(sizes) - 1 for i in range(3 * len(sizes))]


def test_every_batch_of_a_full_group_must_have_its_gradient_before_the_next_replay():
    model = network()
    replay = iter(FreeAdversarial(eps=0.1, accumulate=2).replay(batches((4, 4))))
    next(replay)
    loss_of(model, *next(replay)).backward()
    with pytest.raises(RuntimeError, match="replay 1 of 4 received no gradient"):
        next(replay)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    replays=st.integers(1, 4),
    accumulate=st.integers(1, 4),
)
def test_a_consumer_may_take_as_many_batches_as_it_accumulates(sizes, replays, accumulate):
    model = network()
    free = free_for(model, replays=replays, accumulate=accumulate)
    taken = ascents(free)
    loader = free.replay(batches(sizes))
    replay, left = iter(loader), len(loader)
    while left:
        window = list(itertools.islice(replay, min(left, accumulate)))
        left -= len(window)
        for x, y in window:
            loss_of(model, x, y).backward()
    assert list(replay) == []
    assert len(taken) == replays * len(sizes)
    assert in_ball(free)


@pytest.mark.parametrize("short", [1, 2])
def test_looking_further_ahead_than_accumulate_is_refused_in_a_short_last_group_too(short):
    free = FreeAdversarial(eps=0.1, replays=5, accumulate=3)
    replay = iter(free.replay(batches((4,) * short)))
    for _ in range(3):
        next(replay)
    with pytest.raises(RuntimeError, match="replay 1 of 5 received no gradient"):
        next(replay)


def test_a_short_last_group_without_gradients_is_refused_at_the_end_at_the_latest():
    free = FreeAdversarial(eps=0.1, replays=2, accumulate=3)
    with pytest.raises(RuntimeError, match="replay 1 of 2 received no gradient"):
        list(free.replay(batches((4,))))


def test_one_loss_of_a_whole_group_is_refused_and_the_group_can_be_trained_on_after_that():
    model, twin = network(), network()
    frees = [free_for(net, accumulate=2, replays=1) for net in (model, twin)]
    for net, free in zip((model, twin), frees, strict=True):
        iterator = iter(free.replay(batches((8, 8))))
        group = [next(iterator), next(iterator)]
        losses = [loss_of(net, x, y) for x, y in group]
        if net is model:
            with pytest.raises(RuntimeError, match="of several batches of the replay: call step"):
                free.step(sum(losses) / 2)
            assert torch.equal(model[0].weight, twin[0].weight)
            losses = [loss_of(net, x, y) for x, y in group]
        for loss in losses:
            free.step(loss)
    assert torch.equal(model[0].weight, twin[0].weight)


def test_a_batch_of_the_next_update_that_is_taken_ahead_leaves_the_gradients_of_this_one():
    weight, had = nn.Parameter(torch.zeros(())), []
    sgd = torch.optim.SGD([weight], 0.1)
    sgd.register_step_pre_hook(lambda *_: had.append(weight.grad.item()))
    free = FreeAdversarial(sgd, eps=0.1, replays=3, accumulate=3)
    taken = []
    for x, _ in free.replay(batches((4, 4))):
        taken.append(x)
        if len(taken) == 3:  # a host takes three for an update, of which this group has two
            for x in taken:
                free.step(weight + x.mean())  # a gradient of 1, however it is shared out
            taken = []
    assert had == [1.0, 1.0, 1.0]
