"""The library is Algorithm 1 of the paper, in every kind of loop."""

import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import joined, sgd, train, weights
from tests.reference import batches, free_training, network

EPS = 8 / 255


@pytest.mark.parametrize("own_backward", [False, True], ids=["step", "own backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_step_is_bit_equal_to_the_paper(dtype, own_backward):
    m, epochs, loader = 5, 3, batches(dtype=dtype)
    twin, model = network(dtype), network(dtype)
    oracle = free_training(twin, sgd(twin), loader, eps=EPS, m=m, epochs=epochs)
    optimizer = sgd(model)
    free = FreeAdversarial(None if own_backward else optimizer, eps=EPS, replays=m)
    buffer, before, count = torch.zeros(8, 2, 5, 5, dtype=dtype), None, 0
    for _ in range(epochs):
        for x, y in free.replay(loader):
            n = len(x)
            clean = next(c for c, label in loader if label.shape == y.shape and label.equal(y))
            # The network sees the clamped sum of the clean batch and the reference's delta.
            seen = clean if before is None else (clean + before[:n]).clamp(0, 1)
            assert torch.equal(x.detach(), seen)
            loss = functional.cross_entropy(model(x), y)
            if own_backward:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            else:
                free.step(loss)
                buffer[:n] = free.delta
            before = next(oracle)
            if not own_backward:
                assert torch.equal(buffer, before)
            assert torch.equal(weights(model), weights(twin))
            count += 1
    assert count == 45
    assert torch.equal(free.state_dict()["delta"][0], before)
    assert next(oracle, None) is None


def test_black_and_white_pixels_get_perturbed():
    x = torch.cat([torch.zeros(4, 2, 5, 5), torch.ones(4, 2, 5, 5)])
    model = network()
    free = FreeAdversarial(sgd(model, 0.0), eps=EPS, replays=1)
    train(model, free, [(x, torch.arange(8) % 4)])
    assert (free.delta != 0).all()


def test_the_gradient_is_that_at_the_clamped_input():
    x, y = torch.ones(4, 2, 5, 5), torch.arange(4)
    model = network()
    free = FreeAdversarial(eps=0.1, replays=3)
    for perturbed, _ in free.replay([(x, y)]):
        held = perturbed.detach().clone().requires_grad_()
        functional.cross_entropy(model(held), y).backward()
        before = free.delta
        functional.cross_entropy(model(perturbed), y).backward()
        expected = (before + 0.1 * held.grad.sign()).clamp(-0.1, 0.1)
    assert torch.equal(free.state_dict()["delta"][0], expected)


def test_normalised_batches_train_as_raw_ones_with_the_normalisation_in_the_model():
    mean, std = (0.4, 0.6), (0.2, 0.3)
    m, s = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (mean, std))
    raw = batches(dtype=torch.float64)
    for norm in ("linf", "l2"):
        inside, outside = network(torch.float64), network(torch.float64)
        one = FreeAdversarial(sgd(inside), eps=0.1, replays=4, norm=norm)
        for x, y in one.replay(raw):
            one.step(functional.cross_entropy(inside((x - m) / s), y))
        two = FreeAdversarial(sgd(outside), eps=0.1, replays=4, norm=norm, mean=mean, std=std)
        train(outside, two, [((x - m) / s, y) for x, y in raw])
        torch.testing.assert_close(weights(outside), weights(inside), atol=1e-9, rtol=0)
        torch.testing.assert_close(two.delta, one.delta, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_micro_batches_replayed_as_a_group_equal_one_large_batch(norm):
    small = batches((8, 8, 8, 8, 3), dtype=torch.float64)
    groups = [small[:2], small[2:4], small[4:]]
    large = [tuple(torch.cat(part) for part in zip(*group, strict=True)) for group in groups]
    one, two, three = (network(torch.float64) for _ in range(3))
    arguments = {"eps": 0.1, "replays": 4, "norm": norm}
    free = FreeAdversarial(sgd(one), **arguments)
    expected = train(one, free, large, epochs=2)

    grouped = FreeAdversarial(sgd(two), accumulate=2, **arguments)
    actual = train(two, grouped, small, epochs=2)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)
    state, twin = joined(grouped), joined(free)
    torch.testing.assert_close(state, twin, atol=1e-9, rtol=0)

    # A loop of its own that divides each loss by the number of micro-batches.
    own, optimizer = FreeAdversarial(accumulate=2, **arguments), sgd(three)
    for _ in range(2):
        for i, (x, y) in enumerate(own.replay(small)):
            tail = i >= 16
            (functional.cross_entropy(three(x), y) / (1 if tail else 2)).backward()
            if tail or i % 2:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(weights(three), expected, atol=1e-9, rtol=0)


def test_unequal_micro_batches_equal_one_large_batch():
    small = batches((8, 3), dtype=torch.float64)
    large = [tuple(torch.cat(part) for part in zip(*small, strict=True))]
    one, two = network(torch.float64), network(torch.float64)
    expected = train(one, FreeAdversarial(sgd(one), eps=0.1), large)
    actual = train(two, FreeAdversarial(sgd(two), eps=0.1, accumulate=2), small)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


def test_a_consumer_that_takes_a_group_before_it_trains_gets_the_same_weights():
    small = batches((8, 8, 8, 8))
    model, other = network(), network()
    free = FreeAdversarial(sgd(model), eps=0.1, replays=3, accumulate=2)
    expected = train(model, free, small)
    ahead, optimizer = FreeAdversarial(eps=0.1, replays=3, accumulate=2), sgd(other)
    iterator = iter(ahead.replay(small))
    while group := [b for b in (next(iterator, None), next(iterator, None)) if b]:
        optimizer.zero_grad()
        for x, y in group:
            (functional.cross_entropy(other(x), y) * 0.5).backward()
        optimizer.step()
    assert torch.equal(weights(other), expected)
    assert torch.equal(ahead.delta, free.delta)


def test_the_loader_is_never_read_past_the_group():
    read = []

    def source():
        for batch in batches((4, 4, 4)):
            read.append(batch)
            yield batch

    model = network()
    free = FreeAdversarial(sgd(model), eps=0.1, replays=3, accumulate=2)
    counts = []
    for x, y in free.replay(source()):
        counts.append(len(read))
        free.step(functional.cross_entropy(model(x), y))
    assert counts == [2] * 6 + [3] * 3


@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_delta_starts_anew_at_each_minibatch_if_asked(start):
    model = network()
    free = FreeAdversarial(sgd(model), eps=0.1, replays=2, start=start, step_size=0.01)
    for i, (x, y) in enumerate(free.replay(batches())):
        if i % 2 == 0:
            assert free.delta.abs().max() <= 0.1
            assert (free.delta == 0).all() == (start == "zero")
        free.step(functional.cross_entropy(model(x), y))


def test_delta_is_carried_and_survives_a_short_last_batch():
    model = network()
    free = FreeAdversarial(sgd(model), eps=0.1, replays=2)
    train(model, free, batches((8, 8)))
    before = free.delta
    train(model, free, batches((3,)))
    assert torch.equal(free.state_dict()["delta"][0][3:], before[3:])


def test_a_buffer_that_grows_keeps_its_rows_and_starts_the_new_ones_at_zero():
    model = network()
    free = FreeAdversarial(sgd(model), eps=0.1, replays=2)
    train(model, free, batches((3,)))
    before = free.delta
    next(iter(free.replay(batches((8,)))))
    assert torch.equal(free.delta[:3], before)
    assert (before != 0).any()
    assert (free.delta[3:] == 0).all()


def test_each_resolution_has_its_own_delta_and_grows_to_its_largest_batch():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    free = FreeAdversarial(sgd(model), eps=0.1, replays=2)
    shapes = [(4, 2, 5, 5), (4, 2, 7, 7), (6, 2, 5, 5), (2, 2, 7, 7)]
    train(model, free, [(torch.rand(s), torch.zeros(s[0], dtype=torch.long)) for s in shapes])
    assert [tuple(d.shape) for d in free.state_dict()["delta"]] == [(6, 2, 5, 5), (4, 2, 7, 7)]


def test_layout_follows_the_input():
    model = network()
    loader = [(x.to(memory_format=torch.channels_last), y) for x, y in batches((4, 6))]
    free = FreeAdversarial(sgd(model), eps=0.1, replays=2)
    for x, y in free.replay(loader):
        assert x.is_contiguous(memory_format=torch.channels_last)
        free.step(functional.cross_entropy(model(x), y))
        assert free.delta.is_contiguous(memory_format=torch.channels_last)


def test_several_optimizers_step_as_one():
    one, two = network(), network()
    expected = train(one, FreeAdversarial(sgd(one), eps=0.1), batches())
    parts = [torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9) for layer in (two[0], two[3])]
    assert torch.equal(train(two, FreeAdversarial(parts, eps=0.1), batches()), expected)


def test_gradient_clipping_sees_the_weights_and_not_delta():
    one, two = network(), network()
    expected_optimizer = sgd(one)
    free = FreeAdversarial(eps=0.1)
    for x, y in free.replay(batches()):
        expected_optimizer.zero_grad()
        functional.cross_entropy(one(x), y).backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        expected_optimizer.step()
    clipped = train(two, FreeAdversarial(sgd(two), eps=0.1, max_grad_norm=0.1), batches())
    assert torch.equal(clipped, weights(one))
    unclipped = network()
    assert not torch.equal(
        train(unclipped, FreeAdversarial(sgd(unclipped), eps=0.1), batches()), clipped
    )


def test_trades_finds_the_clean_input_beside_the_perturbed_one():
    model = network()
    free = FreeAdversarial(sgd(model), eps=0.1, replays=2)
    assert free.clean is None
    assert free.delta is None
    for x, y in free.replay(loader := batches((4,))):
        assert torch.equal(free.clean, loader[0][0])
        clean, robust = model(free.clean), model(x)
        kl = functional.kl_div(robust.log_softmax(1), clean.softmax(1), reduction="batchmean")
        free.step(functional.cross_entropy(clean, y) + kl)
    assert (free.delta != 0).any()


def test_a_plain_block_drops_the_buffers_at_its_end():
    model = network()
    with FreeAdversarial(sgd(model), eps=0.1) as free:
        train(model, free, batches())
        assert free.delta is not None
    assert free.delta is None
    assert free.state_dict()["delta"] == []


def test_epochs_are_divided_by_the_replays_and_rounded_up():
    free = FreeAdversarial(eps=0.1, replays=8)
    assert [free.epochs(n) for n in (8, 15, 200)] == [1, 2, 25]
    with pytest.warns(
        UserWarning, match=r"epochs\(9\) is 2, and each costs what 8 natural ones do .* in all 16"
    ):
        assert free.epochs(9) == 2
    assert free.epochs(1) == 1  # told once
