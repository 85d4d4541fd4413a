"""Misuse is refused, with what was wrong and its cure."""

import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import free_for, loss_of
from tests.reference import batches, network


def detached(free, model, x, y):
    free.step(loss_of(model, x.detach(), y))


def no_grad(free, model, x, y):
    with torch.no_grad():
        loss = loss_of(model, x, y)
    free.step(loss)


def no_backward(free, model, x, y):
    loss_of(model, x, y)


def own_detached(free, model, x, y):
    loss_of(model, x.detach(), y).backward()


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (detached, "the input received no gradient from this loss"),
        (no_grad, "the loss has no graph"),
        (no_backward, "replay 1 of 4 received no gradient"),
        (own_detached, "replay 1 of 4 received no gradient"),
    ],
)
def test_a_replay_without_a_gradient_is_refused_and_the_weights_are_as_they_were(body, where):
    model = network()
    free = free_for(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=where) as caught:
        for x, y in free.replay(batches()):
            body(free, model, x, y)
    for phrase in (
        "free.step(loss)",
        "torch.no_grad()",
        "x.detach()",
        "free.replay(wrapper)",
        "accumulate=",
    ):
        assert phrase in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))


def test_a_consumer_that_looks_ahead_is_refused():
    free = FreeAdversarial(eps=0.1)
    replay = iter(free.replay(batches()))
    next(replay)
    with pytest.raises(RuntimeError, match="replay 1 of 4 received no gradient"):
        next(replay)


def test_iterating_in_inference_mode_is_refused():
    free = FreeAdversarial(eps=0.1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        next(iter(free.replay(batches())))


def test_step_out_of_order_says_what_was_expected():
    model = network()
    loss = loss_of(model, *batches()[0])
    with pytest.raises(RuntimeError, match=r"needs an optimizer: FreeAdversarial\(optimizer"):
        FreeAdversarial(eps=0.1).step(loss)
    free = free_for(model)
    with pytest.raises(RuntimeError, match="call it once inside"):
        free.step(loss)
    for x, y in free.replay(batches((4,))):
        free.step(loss_of(model, x, y))
        with pytest.raises(RuntimeError, match="call it once inside"):
            free.step(loss)
    with pytest.raises(RuntimeError, match="call it once inside"):
        free.step(loss)


def test_a_loss_that_is_no_scalar_tensor_is_refused_and_can_be_put_right():
    model = network()
    free = free_for(model)
    for x, y in free.replay(batches((4,))):
        with pytest.raises(TypeError, match="loss must be a tensor, got float"):
            free.step(0.5)
        with pytest.raises(ValueError, match=r"shape \(4,\).*mean\(\)"):
            free.step(functional.cross_entropy(model(x), y, reduction="none"))
        free.step(loss_of(model, x, y))


@pytest.mark.parametrize(
    ("arguments", "error", "phrase"),
    [
        ({"eps": 8}, ValueError, "did you mean eps=8/255"),
        ({"replays": 0}, ValueError, "replays must be at least 1, got 0"),
        ({"replays": 2.5}, TypeError, "replays must be a whole number, got float 2.5"),
        ({"replays": True}, TypeError, "replays must be a whole number, got bool"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"step_size": 0}, ValueError, "step_size must be positive"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be positive and finite, got -1"),
        ({"start": "reset"}, ValueError, "start must be 'carry', 'zero' or 'uniform', got 'reset'"),
        ({"scaler": True}, TypeError, "GradScaler, got bool"),
        ({"key": None}, TypeError, "key must be an index, a name, "),
        ({"key": ()}, TypeError, "key must be an index"),
        (
            {"optimizer": network()},
            TypeError,
            "optimizer must be a torch optimizer or several, got",
        ),
        ({"optimizer": []}, ValueError, "optimizer is an empty list"),
        ({"optimizer": 3}, TypeError, "got int"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, phrase):
    with pytest.raises(error, match=phrase):
        FreeAdversarial(**{"eps": 0.1, **arguments})


@pytest.mark.parametrize(
    ("batch", "key", "error", "phrases"),
    [
        ({"pixel_values": torch.rand(2, 3), "labels": torch.zeros(2, dtype=torch.long)}, 0, ValueError,
         ["no key=0", "it is a dict", "perhaps key='pixel_values'"]),
        ({"a": 1}, "image", ValueError, ["no key='image'", "'a': int", "with key="]),
        ((torch.rand(2, 3),), 3, ValueError, ["no key=3", "perhaps key=0"]),
        (torch.rand(2, 3), 1, ValueError, ["no key=1", "it is a Tensor"]),
        (({"patches": torch.rand(2, 3), "valid": torch.ones(2)}, 1), "x", ValueError,
         ["no key='x'", r"perhaps key=\(0, 'patches'\)"]),
        ((torch.rand(2, 3),), (0, 1), ValueError, [r"no key=\(0, 1\)"]),
        (([1.0, 2.0], 1), 0, TypeError, ["must be a tensor, got list"]),
        ((torch.ones(2, 3, dtype=torch.uint8),), 0, TypeError, ["torch.uint8"]),
        ((torch.rand(2, 3) * 255,), 0, ValueError, ["divide them by 255"]),
        (((torch.rand(2, 3) - 0.5) / 0.2,), 0, ValueError, ["mean= and std="]),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_right_is_refused_with_its_cure(batch, key, error, phrases):
    free = FreeAdversarial(eps=0.1, key=key)
    with pytest.raises(error) as caught:
        next(iter(free.replay([batch])))
    for phrase in phrases:
        caught.match(phrase)


def test_what_is_no_loader_is_refused():
    free = FreeAdversarial(eps=0.1)
    with pytest.raises(TypeError, match="loader must be iterable, got int"):
        free.replay(3)
    with pytest.raises(ValueError, match="replay already"):
        free.replay(free.replay([]))
