"""What can be read and assigned while a run goes on: `turn`, `eps`, `step_size`; gradients beside `step`."""

import copy
import itertools

import pytest
import torch

from free_adv import FreeAdversarial
from tests.helpers import free_for, in_ball, loss_of, train, weights
from tests.reference import batches, network

M = 3


def turns(free, loader, stop=None, skip=None):
    """For each batch its number and `turn`."""
    seen = []
    for i, (x, number) in enumerate(free.replay(loader)):
        seen.append((int(number), free.turn))
        if i == skip:
            free.skip()
            continue
        x.sum().backward()
        if i + 1 == stop:
            break
    return seen


def numbered(count):
    return [(torch.rand(2, 3), torch.tensor(i)) for i in range(count)]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_turn_is_the_replay_of_the_minibatch_in_hand(window, accumulate):
    free = FreeAdversarial(eps=0.1, replays=M, window=window, accumulate=accumulate)
    assert free.turn is None
    for number in range(5):
        assert [t for n, t in turns(free, numbered(5)) if n == number] == [*range(M)]


def test_turn_is_right_after_a_skip_and_in_a_run_that_goes_on():
    free = FreeAdversarial(eps=0.1, replays=M, window=2)
    seen = turns(free, numbered(4), skip=2)  # the first minibatch in its second replay
    assert seen == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)] + [
        (n, t) for t in range(M) for n in (2, 3)
    ]
    for stop in range(1, 4 * M):
        source, fresh = iter(numbered(4)), FreeAdversarial(eps=0.1, replays=M)
        seen = turns(fresh, source, stop)
        other = FreeAdversarial(eps=0.1, replays=M)
        other.load_state_dict(fresh.state_dict())
        assert other.turn is None
        seen += turns(other, source)
        assert seen == [(n, t) for n in range(4) for t in range(M)]


@pytest.mark.parametrize("own", [False, True], ids=["step", "own backward"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_counts_from_the_next_replay_on_and_delta_is_clipped_into_the_new_ball(norm, own):
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    free = FreeAdversarial(sgd, eps=0.1, replays=M, norm=norm)
    assert free.step_size == 0.1
    radii = itertools.cycle((0.1, 0.05, 0.02, 0.2))
    for x, y in free.replay(batches()):
        assert free.threat.distance(free.clean - x.detach()).max() <= free.eps * (1 + 1e-5)
        loss = loss_of(model, x, y)
        loss.backward() if own else free.step(loss)
        free.eps = next(radii)
        assert free.eps == free.threat.eps == free.step_size
        assert in_ball(free)
    with pytest.raises(ValueError, match="eps must be positive"):
        free.eps = -0.1
    free.step_size = 0.01
    free.eps = 0.1
    assert free.step_size == 0.01
    free.step_size = None
    assert free.step_size == 0.1
    with pytest.raises(ValueError, match="step_size must be positive"):
        free.step_size = 0


@pytest.mark.parametrize(
    ("name", "cure"),
    {
        "threat": "assign eps, or make a new",
        "optimizer": r"make a new .*optimizer=.* and go on with new.load_state_dict",
        "scaler": r"make a new .*scaler=.* and go on with new.load_state_dict",
        "replays": r"make a new FreeAdversarial\(..., replays=...\)$",
        "turn": "it can only be read",
        "delta": "it can only be read",
        "epsilon": "there is no such attribute, only eps, step_size, ascents and noise",
    }.items(),
)
def test_what_cannot_be_assigned_is_refused_with_the_cure(name, cure):
    free = FreeAdversarial(eps=0.1)
    with pytest.raises(AttributeError, match=f"{name} cannot be assigned: {cure}"):
        setattr(free, name, 1)


def test_a_new_object_goes_on_for_another_optimizer_whose_weights_begin_without_old_gradients():
    model, other = network(), network()
    train(other, free_for(other, replays=M), batches((4, 4)))
    source, free = iter(batches((4, 4))), free_for(model, replays=M)
    for i, (x, y) in enumerate(free.replay(source)):
        free.step(loss_of(model, x, y))
        if i == 1:
            break
    new = free_for(model, replays=M)  # where a real one has other weights, or another rule
    new.load_state_dict(free.state_dict())
    assert all(p.grad is not None for p in model.parameters())
    train(model, new, source)
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_of_another_backward_pass_counts(accumulate):
    """As R1's, or a penalty's: in full, also between micro-batches."""
    sizes = (4, 4) if accumulate == 1 else (4, 2)
    results = []
    for apart in (False, True):
        model = network(torch.float64)
        free = free_for(model, replays=M, accumulate=accumulate)
        for x, y in free.replay(batches(sizes, dtype=torch.float64)):
            penalty = sum(p.square().sum() for p in model.parameters())
            if apart:
                penalty.backward()
                free.step(loss_of(model, x, y))
            else:
                share = len(x) / sum(sizes) if accumulate == 2 else 1.0
                free.step(loss_of(model, x, y) + penalty / share)
        results.append(weights(model))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


def test_gradients_before_the_loop_do_not_count_and_those_of_a_step_can_be_read():
    models = []
    for dirty in (False, True):
        model = network()
        free = free_for(model, replays=M)
        if dirty:
            sum(p.sum() for p in model.parameters()).backward()
        for x, y in free.replay(batches()):
            assert all(p.grad is None for p in model.parameters())
            free.step(loss_of(model, x, y))
            assert all(p.grad is not None for p in model.parameters())
        models.append(weights(model))
    assert torch.equal(*models)


def test_gradients_of_micro_batches_that_were_skipped_or_left_do_not_count():
    model, other = network(), network()
    free, plain = free_for(model, accumulate=2), free_for(other, accumulate=2)
    for x, y in free.replay(batches((4, 4))):
        free.step(loss_of(model, x, y))
        free.skip()
    for x, y in free.replay(batches((4, 4))):
        free.step(loss_of(model, x, y))
        break
    free.load_state_dict({**free.state_dict(), "minibatches": None, "done": 0})
    for m, f in ((model, free), (other, plain)):
        for x, y in f.replay(batches((4, 4))):
            f.step(loss_of(m, x, y))
    assert torch.equal(weights(model), weights(other))


def test_a_loop_of_its_own_may_gather_gradients_over_updates():
    model, other = network(), network()
    free = FreeAdversarial(torch.optim.SGD(model.parameters(), 0.1), eps=0.1, replays=2)
    plain = FreeAdversarial(eps=0.1, replays=2)
    for m, f in ((model, free), (other, plain)):
        for _ in range(2):
            for x, y in f.replay(batches((4, 4, 4))):
                loss_of(m, x, y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_state_brings_the_eps_and_the_step_that_it_was_saved_with():
    model = network()
    free = free_for(model)
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))
    free.eps, free.step_size = 0.05, 0.01
    state = copy.deepcopy(free.state_dict())
    other = free_for(network())
    other.load_state_dict(state)
    assert (other.eps, other.step_size, other.threat) == (0.05, 0.01, free.threat)
    assert in_ball(other)


def test_a_report_between_two_backward_passes_of_a_batch_takes_nothing_in():
    results = []
    for looks in (False, True):
        model = network(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        free = FreeAdversarial(eps=0.1, replays=M)
        for x, y in free.replay(batches((8, 8), dtype=torch.float64)):
            sgd.zero_grad()
            for cut in (slice(0, 4), slice(4, 8)):
                (loss_of(model, x[cut], y[cut]) / 2).backward(retain_graph=True)
                if looks:
                    free.report()
            sgd.step()
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_subclass_may_have_attributes_of_its_own():
    class Mine(FreeAdversarial):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.log = []

    free = Mine(eps=0.1)
    free.log.append(1)
    with pytest.raises(AttributeError, match="replays cannot be assigned"):
        free.replays = 2
