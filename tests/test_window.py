"""Minibatches that take turns."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import advance, joined, sgd, train, weights
from tests.reference import batches, free_training, network

EPS, SIZES = 8 / 255, (8, 8, 8, 8, 8, 3)


def held(free, rows):
    """The library's delta, as long as the reference's."""
    state = free.state_dict()
    by_place = dict(zip(state["places"], state["delta"], strict=True))
    whole = torch.zeros(rows // 8, 8, 2, 5, 5, dtype=state["delta"][0].dtype)
    for (place, *_), buffer in by_place.items():
        whole[place, : len(buffer)] = buffer
    return whole.flatten(0, 1)


@pytest.mark.parametrize("own_backward", [False, True], ids=["step", "own backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_every_step_is_bit_equal_to_the_paper_s_loop_with_turns(window, dtype, own_backward):
    m, epochs, loader = 4, 2, batches(SIZES, dtype=dtype)
    twin, model = network(dtype), network(dtype)
    oracle = free_training(twin, sgd(twin), loader, eps=EPS, m=m, epochs=epochs, window=window)
    optimizer = sgd(model)
    free = FreeAdversarial(None if own_backward else optimizer, eps=EPS, replays=m, window=window)
    replay, count = free.replay(loader), 0
    assert len(replay) == m * len(loader)
    for _ in range(epochs):
        for x, y in replay:
            advance(model, free, x, y, optimizer if own_backward else None)
            expected = next(oracle)
            assert torch.equal(held(free, len(expected)), expected)
            assert torch.equal(weights(model), weights(twin))
            assert free.last
            count += 1
    assert count == m * epochs * len(loader)


def test_the_minibatches_take_turns_and_the_loader_is_read_a_window_at_a_time():
    read = []

    def loader():
        for i, (x, _) in enumerate(batches((2,) * 5)):
            read.append(i)
            yield x, i

    free = FreeAdversarial(eps=EPS, replays=3, window=2)
    order = []
    for x, i in free.replay(loader()):
        order.append((i, len(read)))
        x.sum().backward()
    turns = [(0, 2), (1, 2)] * 3 + [(2, 4), (3, 4)] * 3 + [(4, 5)] * 3
    assert order == turns


def test_windows_of_groups_equal_windows_of_large_batches():
    small = batches((8, 8, 8, 8, 8, 8, 3), dtype=torch.float64)
    parts = [small[:2], small[2:4], small[4:6], small[6:]]
    large = [tuple(torch.cat(part) for part in zip(*p, strict=True)) for p in parts]
    runs = []
    for loader, accumulate in ((large, 1), (small, 2)):
        model = network(torch.float64)
        free = FreeAdversarial(sgd(model), eps=EPS, replays=3, window=3, accumulate=accumulate)
        train(model, free, loader, epochs=2)
        runs.append((weights(model), joined(free)))
    torch.testing.assert_close(*runs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("start", ["carry", "zero", "uniform"])
@pytest.mark.parametrize(("window", "accumulate"), [(2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("at", [False, True], ids=["input", "at"])
def test_a_run_stopped_after_each_replay_of_a_window_goes_on_bit_equal(
    window, accumulate, at, start
):
    loader = batches((8, 8, 8, 8, 3), dtype=torch.float64)
    arguments = {"eps": EPS, "replays": 3, "start": start}
    arguments |= {"window": window, "accumulate": accumulate, "bounds": (0, 1)}

    def made():
        model = nn.Sequential(nn.Identity(), network(torch.float64))
        optimizer = sgd(model)
        place = {"at": model[0]} if at else {}
        return model, optimizer, FreeAdversarial(optimizer, **arguments, **place)

    def go(model, optimizer, free, source, stop=None):
        for i, (x, y) in enumerate(free.replay(source), 1):
            free.step(functional.cross_entropy(model(x), y))
            if i == stop:
                return

    def outcome(model, free):
        return weights(model), *free.state_dict()["delta"]

    torch.manual_seed(0)
    whole = made()
    torch.manual_seed(1)
    go(*whole, loader)
    for stop in range(accumulate, 3 * len(loader), accumulate):
        model, optimizer, free = made()
        torch.manual_seed(1)
        source = iter(loader)
        go(model, optimizer, free, source, stop)
        states = copy.deepcopy([o.state_dict() for o in (model, optimizer, free)])
        random = torch.get_rng_state()
        again = made()
        torch.set_rng_state(random)
        for part, state in zip(again, states, strict=True):
            part.load_state_dict(state)
        go(*again, source)
        assert all(map(torch.equal, outcome(again[0], again[2]), outcome(whole[0], whole[2])))


def test_at_a_module_it_is_the_same_window():
    loader = batches(SIZES, dtype=torch.float64)
    twin, model = network(torch.float64), nn.Sequential(nn.Identity(), network(torch.float64))
    oracle = free_training(twin, sgd(twin), loader, eps=EPS, m=3, epochs=2, window=4)
    free = FreeAdversarial(sgd(model), eps=EPS, replays=3, window=4, at=model[0], bounds=(0, 1))
    train(model, free, loader, epochs=2)
    *_, expected = oracle
    assert torch.equal(held(free, len(expected)), expected)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("step", [True, False], ids=["step", "own backward"])
def test_skip_leaves_out_one_minibatch_and_the_others_of_its_window_go_on(step):
    loader = [(x, i) for i, (x, _) in enumerate(batches((4,) * 4))]
    weight = nn.Parameter(torch.ones(()))
    free = FreeAdversarial(
        torch.optim.SGD([weight], 0.1) if step else None, eps=EPS, replays=3, window=3
    )
    seen = []
    for x, i in free.replay(loader):
        seen.append(i)
        if seen == [0, 1, 2, 0, 1]:
            free.skip()
        elif step:
            free.step((x * weight).sum())
        else:
            x.sum().backward()
    assert seen == [0, 1, 2, 0, 1, 2, 0, 2, 3, 3, 3]


def test_after_a_skip_a_run_goes_on_from_its_state_with_what_is_left():
    loader = [(x, i) for i, (x, _) in enumerate(batches((4,) * 3))]
    free = FreeAdversarial(eps=EPS, replays=2, window=3)
    for n, (x, _) in enumerate(free.replay(loader)):
        if n == 1:
            free.skip()
            state = free.state_dict()
            break
        x.sum().backward()
    other = FreeAdversarial(eps=EPS, replays=2, window=3)
    other.load_state_dict(state)
    seen = []
    for x, i in other.replay([]):
        seen.append(i)
        x.sum().backward()
    assert seen == [2, 0, 2]


def test_a_host_that_takes_a_minibatch_ahead_of_its_update_is_served_in_windows():
    """The Trainer takes `accumulate` batches, then trains on them."""
    loader = batches((4,) * 8, dtype=torch.float64)
    runs = []
    for ahead in (False, True):
        model = network(torch.float64)
        optimizer = sgd(model)
        free = FreeAdversarial(eps=EPS, replays=2, window=2, accumulate=2)
        replay = iter(free.replay(loader))
        while taken := list(itertools.islice(replay, 2 if ahead else 1)):
            for x, y in taken:
                functional.cross_entropy(model(x), y).backward()
            if ahead or free.last:
                optimizer.step()
                optimizer.zero_grad()
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_a_host_that_takes_batches_ahead_over_a_short_minibatch_gets_every_gradient_taken_in():
    free = FreeAdversarial(eps=EPS, replays=4, window=2, accumulate=2, bounds=None)
    replay, seen = iter(free.replay([(torch.rand(4, 3), i) for i in range(3)])), []
    while taken := list(itertools.islice(replay, 2)):
        for x, i in taken:
            seen.append(i)
            x.sum().backward()
    assert seen == [0, 1, 2] * 4
    assert all((buffer == EPS).all() for buffer in free.state_dict()["delta"])


def test_several_inputs_take_turns_too():
    loader = [([x, x.flip(0)], y) for x, y in batches((4, 4, 4))]
    free = FreeAdversarial(eps=EPS, replays=2, window=2, key=[(0, 0), (0, 1)])
    grads = iter(range(100))
    for (one, two), _ in free.replay(loader):
        sign = 1 if next(grads) % 2 else -1
        (one.sum() * sign - two.sum() * sign).backward()
    state = free.state_dict()
    by_place = dict(zip(state["places"], state["delta"], strict=True))
    assert {p: len(d) for p, d in by_place.items()} == {
        (w, 0, f"[0][{i}]"): 4 for w in (0, 1) for i in (0, 1)
    }
    # The second minibatch had the second gradients of the turns: up for its first input, down for the other.
    assert (by_place[1, 0, "[0][0]"] > 0).all()
    assert (by_place[1, 0, "[0][1]"] < 0).all()


@pytest.mark.parametrize(
    ("window", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_window_that_is_no_whole_number_is_refused(window, error):
    with pytest.raises(error, match="window must be"):
        FreeAdversarial(eps=EPS, window=window)


def test_a_state_with_a_wider_window_is_refused():
    free = FreeAdversarial(eps=EPS, window=3)
    for x, _ in free.replay(batches((4, 4, 4))):
        x.sum().backward()
        break
    with pytest.raises(ValueError, match=r"3 minibatches .* window=2"):
        FreeAdversarial(eps=EPS, window=2).load_state_dict(free.state_dict())
