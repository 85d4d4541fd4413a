"""Loops that end early, start anew or run side by side, and any order of calls."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from free_adv import FreeAdversarial
from tests.helpers import free_for, in_ball, loss_of
from tests.internals import ascents
from tests.reference import batches, network


@pytest.mark.parametrize("end", ["break", "exception", "forgotten iterator"])
@pytest.mark.parametrize("own_backward", [False, True], ids=["step", "own backward"])
def test_after_an_early_end_the_object_goes_on_with_what_it_had_learnt(end, own_backward):
    model = network()
    free = free_for(model, replays=4)
    replay = iter(free.replay(batches()))
    with contextlib.suppress(KeyError):
        for i, (x, y) in enumerate(replay):
            loss = loss_of(model, x, y)
            loss.backward() if own_backward else free.step(loss)
            if i == 1:
                if end == "exception":
                    raise KeyError
                break
    if end != "forgotten iterator":
        replay.close()
    taken = free.state_dict()
    assert taken["done"] == 2
    model.zero_grad()
    count = 0
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))
        count += 1
    assert count == 12
    assert in_ball(free)


def test_the_newest_replay_wins_and_the_older_one_says_so():
    model = network()
    free = free_for(model)
    old = iter(free.replay(batches()))
    next(old)
    count = sum(1 for x, y in free.replay(batches()) if free.step(loss_of(model, x, y)) is None)
    assert count == 12
    with pytest.raises(RuntimeError, match="replaced by a newer one"):
        next(old)
    assert in_ball(free)


def test_an_older_replay_that_ends_leaves_the_newest_alone():
    model = network()
    free = free_for(model)
    old, replay = iter(free.replay(batches())), iter(free.replay(batches()))
    next(old)
    x, y = next(replay)
    old.close()
    free.step(loss_of(model, x, y))
    next(replay)


def test_two_objects_side_by_side_do_not_meet():
    models = [network(), network()]
    frees = [free_for(models[0]), free_for(models[1])]
    alone = network()
    single = free_for(alone)
    for x, y in single.replay(batches()):
        single.step(loss_of(alone, x, y))
    for pairs in zip(frees[0].replay(batches()), frees[1].replay(batches()), strict=True):
        for model, free, (x, y) in zip(models, frees, pairs, strict=True):
            free.step(loss_of(model, x, y))
    assert torch.equal(frees[0].delta, single.delta)
    assert torch.equal(frees[1].delta, single.delta)


def test_a_loader_that_raises_leaves_a_usable_object():
    def broken():
        yield from batches((4,))
        raise OSError("disk")

    model = network()
    free = free_for(model)
    with pytest.raises(OSError, match="disk"):
        for x, y in free.replay(broken()):
            free.step(loss_of(model, x, y))
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))


def test_a_new_replay_takes_in_what_the_last_one_had_left():
    model = network()
    free = FreeAdversarial(eps=0.1)
    for x, y in free.replay(batches()):
        loss_of(model, x, y).backward()
        break
    assert (free.delta == 0).all()
    next(iter(free.replay(batches())))
    assert (free.delta != 0).any()


@pytest.mark.filterwarnings("ignore:the batches that were taken ahead")
@given(
    calls=st.lists(
        st.sampled_from(
            ["next", "next", "backward", "backward", "step", "break", "error", "save", "load"]
        ),
        max_size=40,
    ),
    accumulate=st.integers(1, 2),
)
def test_any_order_of_calls_ends_right_or_in_a_clear_error(calls, accumulate):
    model = network()
    m = 3
    free = free_for(model, replays=m, accumulate=accumulate, eps=0.1)
    loader = batches((4, 4, 2))
    replay = iter(free.replay(loader))
    current, state, yields, used = None, None, 0, False
    made = ascents(free)
    for call in calls:
        try:
            if call == "next":
                current, used = next(replay), False
                yields += 1
                x, _ = current
                assert free.clean.sub(x.detach()).abs().max() <= 0.1 + 1e-6
                assert x.detach().min() >= 0
                assert x.detach().max() <= 1
            elif call in ("backward", "step") and current is not None and not used:
                loss = loss_of(model, *current)
                loss.backward() if call == "backward" else free.step(loss)
                used = True
            elif call == "break":
                replay.close()
                replay, current = iter(free.replay(loader)), None
            elif call == "error":
                del replay  # as the iterator of a loop whose body has raised
                replay, current = iter(free.replay(loader)), None
            elif call == "save":
                state = free.state_dict()
            elif call == "load" and state is not None:
                free.load_state_dict(state)
                replay, current = iter(free.replay(loader)), None
        except StopIteration:
            replay, current = iter(free.replay(loader)), None
        except RuntimeError as error:
            assert any(p in str(error) for p in ("received no gradient", "call it once inside"))
            if "call it once" not in str(error):
                replay, current = iter(free.replay(loader)), None
        assert in_ball(free)
        assert len(made) <= yields
    for before, grad, after in made:
        assert torch.equal(after, (before + 0.1 * grad.sign()).clamp(-0.1, 0.1))


def test_a_replay_shows_the_attributes_of_its_loader_beside_its_own():
    loader = torch.utils.data.DataLoader([torch.rand(3)] * 4, batch_size=2)
    replay = FreeAdversarial(eps=0.1).replay(loader)
    assert {"batch_size", "dataset", "__len__"} <= {*dir(replay)}
