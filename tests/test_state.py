"""A saved state goes on exactly where it was taken."""

import io

import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.reference import batches, network


def make(replays=3, accumulate=1, **arguments):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    free = FreeAdversarial(
        optimizer, **{"eps": 0.1, "replays": replays, "accumulate": accumulate, **arguments}
    )
    return model, optimizer, free


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("between", [False, True], ids=["after step", "between yield and step"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_run_stopped_at_any_replay_goes_on_bit_equal(stop, accumulate, between):
    loader = batches((6, 6, 4))

    def run(model, optimizer, free, source, stop=None):
        for i, (x, y) in enumerate(free.replay(source)):
            if between and i == stop:
                break
            free.step(functional.cross_entropy(model(x), y))
            if not between and i + 1 == stop:
                break

    model, optimizer, free = make(accumulate=accumulate)
    run(model, optimizer, free, loader)
    expected, delta = (
        [p.detach().clone() for p in model.parameters()],
        free.state_dict()["delta"][0],
    )

    model, optimizer, free = make(accumulate=accumulate)
    source = iter(loader)
    run(model, optimizer, free, source, stop)
    if stop % accumulate and not between:
        # In mid-group the gradients of the weights are not in any state: the replay is made again.
        assert free.state_dict()["done"] == (stop // 2 if stop < 6 else stop - 6)
    states = [through_a_file(o.state_dict()) for o in (model, optimizer, free)]
    for new, state in zip(fresh := make(accumulate=accumulate), states, strict=True):
        new.load_state_dict(state)
    run(*fresh, source)
    assert all(torch.equal(a, b) for a, b in zip(fresh[0].parameters(), expected, strict=True))
    assert torch.equal(fresh[2].state_dict()["delta"][0], delta)


def test_saving_does_not_disturb_the_run():
    one, two = make(), make()
    for x, y in one[2].replay(batches()):
        one[2].step(functional.cross_entropy(one[0](x), y))
    for x, y in two[2].replay(batches()):
        two[2].state_dict()
        two[2].step(functional.cross_entropy(two[0](x), y))
        two[2].state_dict()
    assert torch.equal(one[2].delta, two[2].delta)


def test_a_state_is_a_copy():
    model, _, free = make()
    replay = iter(free.replay(batches()))
    x, y = next(replay)
    state = free.state_dict()
    before = state["delta"][0].clone()
    free.step(functional.cross_entropy(model(x), y))
    assert torch.equal(state["delta"][0], before)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"eps": 0.2}, "eps=0.1, but this object has eps=0.2"),
        ({"norm": "l2"}, "norm='linf', but this object has norm='l2'"),
        ({"replays": 4}, "replays=3, but this object has replays=4"),
        ({"mean": 0.5, "std": 0.5}, r"mean=None, but this object has mean=\(0.5,\)"),
    ],
)
def test_a_state_made_with_other_settings_is_refused(change, phrase):
    state = make()[2].state_dict()
    with pytest.raises(ValueError, match=phrase):
        make(**change)[2].load_state_dict(state)


def test_a_state_that_is_none_is_refused_and_nothing_is_changed():
    model, _, free = make()
    for x, y in free.replay(batches()):
        free.step(functional.cross_entropy(model(x), y))
    before = free.state_dict()
    with pytest.raises(ValueError, match=r"state lacks .*'delta'"):
        free.load_state_dict({})
    with pytest.raises(ValueError, match="version 2, but this release reads version 1"):
        free.load_state_dict({**before, "version": 2})
    with pytest.raises(ValueError, match="no key=0"):
        free.load_state_dict({**before, "delta": [], "minibatch": [{"x": 1}]})
    assert torch.equal(free.state_dict()["delta"][0], before["delta"][0])


def test_loading_ends_the_loop_that_runs_and_forgets_its_latest_batch():
    _, _, free = make()
    state = free.state_dict()
    replay = iter(free.replay(batches()))
    next(replay)
    free.load_state_dict(state)
    assert free.delta is free.clean is None
    with pytest.raises(RuntimeError, match="replaced by a newer one"):
        next(replay)


def test_the_minibatch_of_a_state_is_replayed_by_the_first_loop_alone():
    model, _, free = make()
    replay = iter(free.replay(batches()))
    x, y = next(replay)
    free.step(functional.cross_entropy(model(x), y))
    free.load_state_dict(free.state_dict())
    for expected in (2 + 9, 9):
        replay = free.replay(batches())
        for x, y in replay:  # a first look at it, and away
            free.step(functional.cross_entropy(model(x), y))
            break
        state = free.state_dict()
        assert state["done"] == (2 if expected == 11 else 1)
