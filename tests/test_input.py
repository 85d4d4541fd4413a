"""Batches of every shape, precision and layout, batches that must be refused, and no end of shapes."""

import warnings

import psutil
import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import free_for
from tests.internals import SHAPES
from tests.reference import batches, network

EPS = 0.1


def train(free, *inputs):
    """Two replays of each input, with a known gradient of ones."""
    given = []
    for x in free.replay(list(inputs)):
        given.append(x.detach())
        x.float().sum().backward()
    free.state_dict()  # takes the last gradient in
    return given


GOOD = torch.linspace(0, 1, 4 * 3 * 6 * 6).reshape(4, 3, 6, 6)
LAYOUTS = {
    "channels last": GOOD.contiguous(memory_format=torch.channels_last),
    "transposed": GOOD.transpose(2, 3),
    "a step of two": torch.stack((GOOD, GOOD), -1)[..., 1],
    "expanded": GOOD[:1].expand(4, 3, 6, 6),
    "a view of shared memory": torch.cat((GOOD, GOOD)).share_memory_()[2:6],
    "a leaf that wants a gradient": GOOD.clone().requires_grad_(),
    "with a graph": GOOD.clone().requires_grad_() * 1,
    "three dimensions of a volume": GOOD[:, :, None],
    "features": GOOD.flatten(1),
    "one number a sample": GOOD[:, 0, 0, 0],
    "no sample": GOOD[:0],
    "no pixel": GOOD[:, :0],
}
with torch.inference_mode():
    LAYOUTS["made in inference mode"] = GOOD.clone()


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_dense_batch_of_floats_trains_and_stays_as_it_was(name):
    x = LAYOUTS[name]
    clean = x.detach().clone()
    free = FreeAdversarial(eps=EPS, replays=2)
    first, second = train(free, x)
    assert torch.equal(first, clean)
    assert torch.equal(second, (clean + EPS).clamp(max=1))
    assert first.shape == second.shape == x.shape
    assert torch.equal(x, clean)
    assert x.grad is None if x.is_leaf else True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_delta_goes_on_from_precision_to_precision_and_double_has_its_own(dtype):
    free = FreeAdversarial(eps=EPS, replays=2)
    train(free, GOOD)
    first, _ = train(free, GOOD.to(dtype))
    assert first.dtype == dtype
    start = 0 if dtype == torch.float64 else EPS
    wide = GOOD.to(dtype).to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(first, (wide + start).clamp(max=1).to(dtype))
    assert len(free.state_dict()["delta"]) == (2 if dtype == torch.float64 else 1)


def test_batches_may_change_in_everything_from_one_to_the_next():
    free = FreeAdversarial(eps=EPS, replays=2)
    given = train(free, *LAYOUTS.values(), GOOD.half(), GOOD.double(), GOOD)
    assert len(given) == 2 * (len(LAYOUTS) + 3)
    assert all(d.abs().max() <= EPS + 1e-7 for d in free.state_dict()["delta"] if d.numel())


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors may change
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
FORMS = {
    "integers": (GOOD.long(), TypeError, "floating point, got a torch.int64 tensor of shape"),
    "bytes": ((GOOD * 255).byte(), TypeError, "x.float\\(\\) / 255"),
    "booleans": (GOOD > 0.5, TypeError, "floating point, got a torch.bool tensor"),
    "complex numbers": (GOOD + 0j, TypeError, "floating point, got a torch.complex64 tensor"),
    "sparse": (
        GOOD.to_sparse(),
        TypeError,
        "dense tensor, .* layout torch.sparse_coo; call to_dense",
    ),
    "nested": (NESTED, TypeError, "dense tensor, got a nested tensor; call .*to_padded_tensor"),
    "no batch dimension": (torch.tensor(0.5), ValueError, r"batch dimension, .*x\[None\]"),
}
VALUES = {
    "NaN": (GOOD.where(GOOD != 1, torch.nan), ValueError, "not finite, .* look for NaN"),
    "infinity": (GOOD.where(GOOD != 1, torch.inf), ValueError, "not finite"),
    "0..255": (GOOD * 255, ValueError, "divide them by 255"),
    "normalised": ((GOOD - 0.5) / 0.2, ValueError, "pass its mean= and std="),
}


# Values are looked at when a shape is new only: for each look the host waits for the GPU.
@pytest.mark.parametrize(
    ("name", "seen"),
    [*((name, False) for name in [*FORMS, *VALUES]), *((name, True) for name in FORMS)],
)
def test_what_cannot_be_an_input_is_refused_and_nothing_is_lost(name, seen):
    x, error, phrase = {**FORMS, **VALUES}[name]
    free = FreeAdversarial(eps=EPS, replays=2)
    train(free, GOOD[:, :2], *([GOOD] if seen else []))
    before = free.state_dict()["delta"]
    with pytest.raises(error, match=phrase):
        train(free, x)
    after = free.state_dict()
    assert after["minibatches"] is None
    assert all(map(torch.equal, before, after["delta"]))
    assert len(train(free, GOOD)) == 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_in_a_shape_that_was_seen_leave_delta_finite_and_in_the_ball(bad, norm):
    model = network()
    free = free_for(model, replays=2, norm=norm)
    loader = batches((4, 4))
    loader[1][0][:, 0, 0] = bad
    for x, y in free.replay(loader):
        free.step(functional.cross_entropy(model(x), y))
    (delta,) = free.state_dict()["delta"]
    assert delta.isfinite().all()
    assert free.threat.distance(delta).max() <= EPS + 1e-6


def test_inference_mode_that_is_entered_between_two_replays_is_refused():
    replay = iter(FreeAdversarial(eps=EPS).replay([GOOD]))
    next(replay).sum().backward()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        next(replay)


# Shapes without end.


def test_the_shapes_last_in_use_keep_their_delta_and_the_others_begin_anew():
    free = FreeAdversarial(eps=EPS, replays=1)
    inputs = [torch.full((2, width), 0.5) for width in range(1, SHAPES + 2)]
    train(free, *inputs[:SHAPES])
    train(free, inputs[0])  # in use again: the second is now the oldest
    train(free, inputs[SHAPES])
    train(free, inputs[SHAPES])
    (first,) = train(free, inputs[0])
    (second,) = train(free, inputs[1])
    assert torch.equal(first, inputs[0] + EPS)
    assert torch.equal(second, inputs[1])


def test_the_shapes_of_one_group_are_kept_however_many():
    count = SHAPES + 4
    free = FreeAdversarial(eps=EPS, replays=2, accumulate=count)
    inputs = [torch.full((2, width), 0.5) for width in range(1, count + 1)]
    given = train(free, *inputs)
    assert all(map(torch.equal, given[:count], inputs))
    assert all(torch.equal(x, clean + EPS) for x, clean in zip(given[count:], inputs, strict=True))


def test_a_resumed_run_forgets_the_same_shapes():
    inputs = [torch.full((2, width), 0.5) for width in [*range(1, SHAPES + 1), 1, 40]]
    later = [torch.full((2, width), 0.5) for width in range(1, SHAPES + 1)]
    free = FreeAdversarial(eps=EPS, replays=1)
    train(free, *inputs)
    again = FreeAdversarial(eps=EPS, replays=1)
    again.load_state_dict(free.state_dict())
    for mine, theirs in zip(train(free, *later), train(again, *later), strict=True):
        assert torch.equal(mine, theirs)


def test_there_is_no_latest_delta_once_its_shape_is_forgotten():
    free = FreeAdversarial(eps=EPS, replays=1, accumulate=SHAPES + 2)
    train(free, torch.full((2, 99), 0.5))
    new = [torch.full((2, width), 0.5) for width in range(1, SHAPES + 2)]
    for _ in range(2):  # each time the last batch of a group is refused
        with pytest.raises(ValueError, match="outside bounds"):
            train(free, *new, torch.full((2, 98), 9.0))
    assert free.delta is free.clean is None


def test_memory_stays_bounded_over_a_thousand_shapes():
    free = FreeAdversarial(eps=EPS, replays=2)
    shapes = (torch.full((1, 50_000 + extra), 0.5) for extra in range(1_000))  # 200 MB of delta
    process = psutil.Process()
    for i, x in enumerate(free.replay(shapes)):
        x.sum().backward()
        if i == 100:
            before = process.memory_info().rss
    assert i == 2 * 1_000 - 1
    assert process.memory_info().rss - before < 2**26
    assert len(free.state_dict()["delta"]) == SHAPES
