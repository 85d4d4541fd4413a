"""Misuse is refused, with what was wrong and its cure."""

import warnings

import pytest
import torch
from torch.nn import functional
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader, Subset, TensorDataset

from free_adv import FreeAdversarial, ThreatModel, evaluate, pgd
from tests.helpers import advance, free_for, loss_of, weights
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
    assert next(iter(free.replay(batches())))[0].requires_grad  # nothing is left of it


def test_a_state_that_is_loaded_in_inference_mode_can_be_trained_on():
    model = network()
    free = free_for(model)
    x, y = next(iter(free.replay(batches())))
    free.step(loss_of(model, x, y))
    state = free.state_dict()
    with torch.inference_mode():
        free.load_state_dict(state)
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))


def test_the_clean_batches_of_a_loader_that_has_a_next_are_not_given_for_a_replays():
    class Loader(list):
        def next(self):
            return self[0]

    replay = FreeAdversarial(eps=0.1).replay(Loader(batches()))
    with pytest.raises(AttributeError, match=r"no next\(\): iterate it"):
        replay.next()
    assert replay.append  # another attribute of the loader's own


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
        with pytest.raises(
            RuntimeError, match=r"leave out loss.backward\(\), or the second call"
        ) as told:
            free.step(loss)
        assert "a term of the loss that depends on the batch is added to the loss" in str(
            told.value
        )
    micro = free_for(model, accumulate=2)
    x, y = next(iter(micro.replay(batches((4, 4)))))
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match=r"leave out loss.backward\(\), or the second call"):
        micro.step(loss)
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
        ({"max_grad_norm": 0}, ValueError, "got 0; None does not clip"),
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


def test_an_optimizer_that_steps_again_after_step_is_told_once():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    free = FreeAdversarial(optimizer, eps=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x, y in free.replay(batches()):
            free.step(loss_of(model, x, y))
            optimizer.step()
    assert [str(w.message)[:47] for w in told] == [
        "the optimizer steps again after free.step(loss)"
    ]
    assert told[0].filename == __file__  # beyond torch's own frames


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_that_steps_where_it_should_is_not_told(accumulate):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other = torch.optim.SGD(network().parameters(), 0.1)
    free = FreeAdversarial(optimizer, eps=0.1, accumulate=accumulate)
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))
        other.step()
    for x, y in free.replay(batches()):  # a loop with a backward pass of its own
        loss_of(model, x, y).backward()
        if free.last:
            optimizer.step()
            optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("shared", [True, False], ids=["one optimizer", "two of shared weights"])
def test_two_objects_that_step_in_turn_are_not_told_and_have_gradients_of_their_own(shared):
    model, twin = network(torch.float64), network(torch.float64)

    def optimizers(model):
        one = torch.optim.SGD(model.parameters(), 0.1)
        return one, one if shared else torch.optim.SGD(model.parameters(), 0.2)

    settings = {"eps": 0.1, "replays": 1, "start": "zero"}  # natural training
    one, two = (FreeAdversarial(optimizer, **settings) for optimizer in optimizers(model))
    pairs = batches(dtype=torch.float64), batches(dtype=torch.float64)[::-1]
    for (x, y), (x2, y2) in zip(one.replay(pairs[0]), two.replay(pairs[1]), strict=True):
        one.step(loss_of(model, x, y))
        two.step(loss_of(model, x2, y2))

    for all_of in zip(*pairs, strict=True):
        for (x, y), optimizer in zip(all_of, optimizers(twin), strict=True):
            optimizer.zero_grad()
            loss_of(twin, x, y).backward()
            optimizer.step()
    assert torch.equal(weights(model), weights(twin))


def test_gradients_made_between_the_steps_of_two_objects_count_for_the_second():
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, other = (torch.optim.SGD(net.parameters(), 0.1) for net in (model, twin))
    settings = {"eps": 0.1, "replays": 1, "start": "zero"}
    one, two = (FreeAdversarial(optimizer, **settings) for _ in range(2))
    ((x, y), (x2, y2)) = batches((8, 8), torch.float64)
    for (a, b), (a2, b2) in zip(one.replay([(x, y)]), two.replay([(x2, y2)]), strict=True):
        one.step(loss_of(model, a, b))
        model[0].weight.square().sum().backward()
        two.step(loss_of(model, a2, b2))

    loss_of(twin, x, y).backward()
    other.step()
    other.zero_grad()
    twin[0].weight.square().sum().backward()
    loss_of(twin, x2, y2).backward()
    other.step()
    assert torch.equal(weights(model), weights(twin))


def test_optimizers_are_watched_in_the_first_updates_and_no_longer():
    for own in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        free = FreeAdversarial(None if own else optimizer, eps=0.1)
        others, watched = {*_global_optimizer_pre_hooks}, []
        for _ in range(2):
            for x, y in free.replay(batches((4, 4))):
                watched.append(len({*_global_optimizer_pre_hooks} - others))
                advance(model, free, x, y, optimizer if own else None)
        assert watched == [1] * 4 + [0] * 12


@pytest.mark.parametrize("own", [False, True])
def test_other_hooks_of_optimizers_run_as_ever(own):
    seen = []
    handles = [register_optimizer_step_pre_hook(lambda *_: seen.append(1)) for _ in range(2)]
    try:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        free = FreeAdversarial(optimizer, eps=0.1)
        for i, (x, y) in enumerate(free.replay(batches((4, 4)))):
            if i == 0:  # behind the library's
                last = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
                handles.append(last)
            advance(model, free, x, y, optimizer if own else None)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 3 * 8


def images():
    return TensorDataset(torch.rand(12, *batches()[0][0].shape[1:]), torch.arange(12) % 4)


def stopped_after(replays):
    model = network()
    free = free_for(model)
    for i, (x, y) in enumerate(free.replay(DataLoader(images(), 4))):
        free.step(loss_of(model, x, y))
        if i + 1 == replays:
            return free.state_dict()


def gone_on(state, loader):
    model = network()
    free = free_for(model)
    free.load_state_dict(state)
    count = 0
    for x, y in free.replay(loader):
        free.step(loss_of(model, x, y))
        count += 1
    return count


def test_a_state_of_mid_epoch_and_a_shuffled_loader_that_begins_again_are_told():
    for replays, left in ((3, 1), (4, 0)):
        match = f"epoch: {left} replays that were left come first"
        with pytest.warns(UserWarning, match=match) as told:
            assert (
                gone_on(stopped_after(replays), DataLoader(images(), 4, shuffle=True)) == 12 + left
            )
        assert told[0].filename == __file__


def test_a_state_of_mid_epoch_is_not_told_where_the_loader_may_go_on():
    state = stopped_after(3)
    assert gone_on(state, DataLoader(Subset(images(), range(4, 12)), 4)) == 9
    assert gone_on(state, []) == 1


def test_evaluate_and_pgd_say_what_a_threat_model_is():
    model, (x, y) = network(), batches()[0]
    for threat in (8 / 255, free_for(model)):
        with pytest.raises(
            TypeError, match=r"such as free.threat or ThreatModel\(eps=8/255\), got"
        ):
            evaluate(model, [(x, y)], threat)
        with pytest.raises(TypeError, match="threat must be a ThreatModel"):
            pgd(model, x, y, threat)


def test_evaluate_refuses_a_replay_of_its_loader():
    model = network()
    free = free_for(model)
    with pytest.raises(ValueError, match="loader is a replay, made for training"):
        evaluate(model, free.replay(batches()), free.threat)


def test_a_row_tells_of_bounds_that_are_not_those_of_images():
    model, (x, y) = network(), batches()[0]
    rows = {
        bounds: str(evaluate(model, [(x * scale, y)], ThreatModel(0.1, bounds=bounds), steps=1))
        for bounds, scale in (((0, 1), 1), ((0, 255), 255), (None, 1))
    }
    assert "bounds" not in rows[0, 1]
    assert rows[0, 255].endswith("\n" + " " * 27 + "bounds=(0.0, 255.0)")
    assert rows[None].endswith("bounds=None")


def test_mean_and_std_that_are_not_the_loaders_are_told_apart_from_those_forgotten():
    x = (torch.rand(4, *batches()[0][0].shape[1:]) - 0.5) / 0.1
    free = FreeAdversarial(eps=0.1, mean=0.5, std=0.3)
    with pytest.raises(ValueError, match=r"undoing mean and std.*those of the loader's Normalize"):
        next(iter(free.replay([(x, torch.arange(4))])))
    with pytest.raises(ValueError, match="If the loader normalises, pass its mean= and std="):
        next(iter(FreeAdversarial(eps=0.1).replay([(x, torch.arange(4))])))


def test_two_replays_of_one_object_side_by_side_are_told_to_be_two_objects():
    model = network()
    free = free_for(model)
    with pytest.raises(RuntimeError, match="make an object for each"):
        for (x, y), (x2, y2) in zip(free.replay(batches()), free.replay(batches()), strict=True):
            (loss_of(model, x, y) + loss_of(model, x2, y2)).backward()


def test_a_warning_points_at_the_line_outside_the_package():
    model, x = network(), torch.rand(40, *batches()[0][0].shape[1:])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluate(model, [(x, torch.arange(40) % 4)], ThreatModel(0.1, mean=0.5, std=0.5), steps=1)
        next(iter(FreeAdversarial(eps=0.1, mean=0.5, std=0.5).replay([(x, torch.arange(40))])))
    assert [w.filename for w in told] == [__file__] * 2
