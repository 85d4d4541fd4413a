"""Mixed precision, and gradients that are not finite."""

import math

import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import free_for, in_ball, loss_of
from tests.reference import batches, network


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_delta_finite_and_in_the_ball(norm, bad):
    model = network()
    free = FreeAdversarial(eps=0.1, norm=norm, replays=3)
    for i, (x, y) in enumerate(free.replay(batches())):
        loss = loss_of(model, x, y)
        (loss * bad if i in (1, 4, 8) else loss).backward()
    assert in_ball(free)
    assert (free.state_dict()["delta"][0] != 0).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_everything_works_together_and_a_huge_loss_scale_backs_off(norm):
    mean, std = 0.4, 0.25
    data = [{"pixel_values": (x - mean) / std, "labels": y} for x, y in batches((8, 8, 8, 5))]
    model = network()
    first, last = model[0], model[3]
    optimizers = [
        torch.optim.SGD(first.parameters(), 0.05, momentum=0.9),
        torch.optim.AdamW(last.parameters(), 1e-2),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2000)
    before = [p.detach().clone() for p in model.parameters()]
    free = FreeAdversarial(
        optimizers, eps=0.1, replays=12, norm=norm, mean=mean, std=std, start="carry",
        scaler=scaler, max_grad_norm=1.0, accumulate=2, key="pixel_values", device="cpu",
    )  # fmt: skip
    for _ in range(3):
        for batch in free.replay(data):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch["pixel_values"], batch["labels"])
            free.step(loss)
            assert in_ball(free)
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_delta_is_float32_for_half_precision_input(dtype):
    model = network(dtype)
    free = free_for(model)
    for x, y in free.replay([(x.to(dtype), y) for x, y in batches()]):
        assert x.dtype == dtype
        free.step(functional.cross_entropy(model(x).float(), y))
    assert free.delta.dtype == torch.float32
    assert in_ball(free)


def test_bfloat16_autocast_trains():
    model = network()
    free = free_for(model)
    for x, y in free.replay(batches()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, y)
        free.step(loss)
    assert (free.delta != 0).any()
    assert in_ball(free)


def test_the_loss_scale_changes_neither_delta_nor_weights():
    results = []
    for scale in (1.0, 2.0**12):
        model = network()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        free = free_for(model, scaler=scaler, max_grad_norm=5.0)
        for x, y in free.replay(batches()):
            free.step(loss_of(model, x, y))
        results.append((free.delta, model[0].weight))
    torch.testing.assert_close(results[0], results[1])
