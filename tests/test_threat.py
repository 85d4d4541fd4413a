"""The geometry: steps, projections, bounds and what is refused."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from free_adv import ThreatModel
from tests.internals import balls

shapes = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)
norms = st.sampled_from(["linf", "l2"])
scales = st.sampled_from([1e-30, 1e-12, 1e-3, 1.0, 1e6, 1e25])


def length(threat, delta):
    return max(threat.distance(delta).tolist(), default=0.0) if delta.numel() else 0.0


@given(shape=shapes, norm=norms, scale=scales, eps=st.floats(1e-4, 1), seed=st.integers(0, 99))
def test_every_ascent_ends_inside_the_ball(shape, norm, scale, eps, seed):
    torch.manual_seed(seed)
    threat = ThreatModel(eps, norm)
    delta = torch.zeros(shape)
    threat.randomise(delta)
    assert length(threat, delta) <= eps * (1 + 1e-5)
    for grad in (
        torch.randn(shape) * scale,
        torch.full(shape, math.nan),
        torch.full(shape, math.inf),
    ):
        threat.ascend(delta, grad, 2 * eps)
        assert delta.isfinite().all()
        assert length(threat, delta) <= eps * (1 + 1e-5)


@given(
    shape=shapes,
    norm=norms,
    normalised=st.booleans(),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), None]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_perturbed_input_stays_in_the_box_and_near_the_clean_one(
    shape, norm, normalised, bounds, dtype, seed
):
    torch.manual_seed(seed)
    low, high = bounds or (0.0, 1.0)
    eps = 0.3 * (high - low)
    scale = {"mean": (low + high) / 3, "std": (high - low) / 5} if normalised else {}
    if normalised and len(shape) < 2:
        return
    threat = ThreatModel(eps, norm, bounds, **scale)
    pixels = torch.rand(shape, dtype=dtype) * (high - low) + low
    x = threat.from_pixels(pixels, dtype)
    delta = torch.zeros(shape, dtype=dtype)
    threat.randomise(delta)
    moved = threat.perturb(x, delta)
    assert (moved.dtype, moved.shape) == (x.dtype, x.shape)
    tolerance = 1e-4 * (high - low)
    if bounds and moved.numel():
        assert threat.to_pixels(moved).min() >= low - tolerance
        assert threat.to_pixels(moved).max() <= high + tolerance
    assert length(threat, threat.displacement(x, moved)) <= eps + tolerance


def test_the_linf_step_is_the_sign_and_the_l2_step_the_normalised_gradient():
    grad = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    delta = torch.zeros(2, 2)
    ThreatModel(1.0).ascend(delta, grad, 0.25)
    assert delta.tolist() == [[0.25, -0.25], [0.0, 0.0]]
    delta = torch.zeros(2, 2)
    ThreatModel(1.0, "l2").ascend(delta, grad, 0.5)
    torch.testing.assert_close(delta, torch.tensor([[0.3, -0.4], [0.0, 0.0]]))
    ThreatModel(1.0, "l2").ascend(delta, grad, 10.0)
    torch.testing.assert_close(delta, torch.tensor([[0.6, -0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("factor", [1e-25, 1e-6, 65536.0, 1e20])
def test_the_scale_of_the_loss_does_not_change_the_step(norm, factor):
    grad = torch.randn(4, 3, 5, 5)
    one, two = torch.zeros_like(grad), torch.zeros_like(grad)
    ThreatModel(0.5, norm).ascend(one, grad, 0.5)
    ThreatModel(0.5, norm).ascend(two, grad * factor, 0.5)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_entries_that_are_not_finite_move_nothing_and_the_others_still_do(norm):
    grad = torch.tensor([[1.0, math.nan], [math.inf, -1.0], [math.nan, -math.inf]])
    delta = torch.zeros(3, 2)
    ThreatModel(0.5, norm).ascend(delta, grad, 0.5)
    assert delta.tolist() == [[0.5, 0.0], [0.0, -0.5], [0.0, 0.0]]


def test_a_uniform_draw_fills_the_l2_ball():
    delta = torch.empty(4000, 3)
    threat = ThreatModel(2.0, "l2", bounds=None)
    threat.randomise(delta, torch.Generator().manual_seed(0))
    inner = (threat.distance(delta) < 2 * 0.5 ** (1 / 3)).float().mean()
    assert 0.47 < inner < 0.53
    assert delta.mean(0).abs().max() < 0.06


def test_stray_pixels_are_never_moved_by_more_than_eps_nor_into_the_box():
    x = torch.tensor([[-0.4, 1.3, 0.5, 0.0, 1.0]])
    threat = ThreatModel(0.1)
    for sign in (-1, 1):
        moved = threat.perturb(x, torch.full_like(x, sign * 0.1))
        assert (moved - x).abs().max() <= 0.1 + 1e-6
    down, up = (threat.perturb(x, torch.full_like(x, s * 0.1)) for s in (-1, 1))
    torch.testing.assert_close(down, torch.tensor([[-0.4, 1.2, 0.4, 0.0, 0.9]]))
    torch.testing.assert_close(up, torch.tensor([[-0.3, 1.3, 0.6, 0.1, 1.0]]))


def test_noise_of_random_erasing_is_let_pass():
    x = (torch.rand(32, 3, 32, 32) - 0.5) / 0.5
    x[:, :, :18, :18] = torch.randn(32, 3, 18, 18)
    ThreatModel(0.1, mean=0.5, std=0.5).check(x)


def test_a_half_precision_sum_is_formed_in_float32_and_cast_last():
    x = torch.full((1, 4), 0.5, dtype=torch.bfloat16)
    delta = torch.full((1, 4), 0.0030)
    expected = (x.float() + delta).to(torch.bfloat16)
    assert torch.equal(ThreatModel(0.1).perturb(x, delta), expected)


def test_threat_models_compare_by_value_and_cannot_change():
    one = ThreatModel(8 / 255, mean=[0.5, 0.4], std=torch.tensor([0.25, 0.5]))
    two = ThreatModel(
        np.float64(8 / 255), "linf", [0, 1], (0.5, 0.4000000059604645), np.array([0.25, 0.5])
    )
    assert one == ThreatModel(8 / 255, mean=(0.5, 0.4), std=(0.25, 0.5))
    assert hash(one) == hash(ThreatModel(8 / 255, mean=(0.5, 0.4), std=(0.25, 0.5)))
    assert one != two
    with pytest.raises(AttributeError):
        one.eps = 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "phrase"),
    [
        ({"eps": 0}, ValueError, "eps must be positive and finite, got 0"),
        ({"eps": -0.1}, ValueError, "eps must be positive and finite, got -0.1"),
        ({"eps": math.nan}, ValueError, "eps must be positive and finite, got nan"),
        ({"eps": math.inf}, ValueError, "eps must be positive and finite, got inf"),
        ({"eps": 8}, ValueError, "did you mean eps=8/255?"),
        ({"eps": "8/255"}, TypeError, "eps must be a number, got str '8/255'"),
        ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ({"eps": True}, TypeError, "eps must be a number, got bool"),
        ({"norm": "Linf"}, ValueError, "norm must be 'linf' or 'l2', got 'Linf'"),
        ({"norm": 2}, ValueError, "norm must be 'linf' or 'l2', got 2"),
        ({"mean": 0.5}, ValueError, "mean and std belong together, got mean=0.5, std=None"),
        ({"std": 0.5}, ValueError, "mean and std belong together"),
        ({"mean": 0.5, "std": 0}, ValueError, "std must be positive, got 0"),
        ({"mean": 0.5, "std": (0.2, -0.2)}, ValueError, "std must be positive"),
        ({"mean": (0.5, 0.5), "std": (1, 1, 1)}, ValueError, "one entry per channel, got 2 and 3"),
        ({"mean": "imagenet", "std": 1}, TypeError, "mean must be a number, got str 'imagenet'"),
        ({"mean": (), "std": 1}, ValueError, r"mean must be finite, got \(\)"),
        ({"bounds": (1, 0)}, ValueError, r"lowest < highest, got \(1, 0\)"),
        ({"bounds": (0, math.nan)}, ValueError, "bounds must be finite"),
        ({"bounds": 1}, ValueError, "bounds must be"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, error, phrase):
    with pytest.raises(error, match=phrase):
        ThreatModel(**{"eps": 0.1, **arguments})


NORMALISED = (torch.linspace(0, 1, 768).reshape(4, 3, 8, 8) - 0.4478) / 0.225


@pytest.mark.parametrize(
    ("x", "threat", "error", "phrases"),
    [
        (NORMALISED, {}, ValueError, ["outside bounds", "observed range -1.99 to 2.45", "mean= and std="]),
        (torch.rand(4, 3, 8, 8) * 255, {}, ValueError, ["observed range", "divide them by 255"]),
        (torch.eye(40)[None, None] * 255, {}, ValueError, ["outside bounds"]),
        (torch.ones(2, 3, dtype=torch.uint8), {}, TypeError, ["torch.uint8", r"x.float\(\) / 255"]),
        (torch.ones(2, 3, dtype=torch.complex64), {}, TypeError, ["complex64"]),
        (torch.tensor(0.5), {}, ValueError, ["batch dimension", r"x\[None\]"]),
        (torch.full((2, 3), math.nan), {}, ValueError, ["not finite", r"shape \(2, 3\)"]),
        (torch.rand(2, 3, 8, 8), {"mean": (0, 0), "std": (1, 1)}, ValueError, ["2 entries", "channels"]),
        (torch.rand(4, 8) * 3 - 1, {"bounds": (-1, 1)}, ValueError, [r"bounds \(-1.0, 1.0\)"]),
    ],
    ids=[
        "normalised", "0..255", "sparse 0..255", "uint8", "complex", "no batch", "NaN", "channels",
        "wrong range",
    ],
)  # fmt: skip
def test_an_input_that_cannot_be_right_is_refused_with_its_cure(x, threat, error, phrases):
    for phrase in phrases:
        with pytest.raises(error, match=phrase):
            ThreatModel(0.1, **threat).check(x)


MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.4)
FORMS = {  # of mean and std, the shape of a batch, and which of its dimensions the channels are
    "flat": (lambda v: v, (2, 3, 4, 4), 1),
    "a tensor": (torch.tensor, (2, 3, 4, 4), 1),
    "an array": (np.array, (2, 3, 4, 4), 1),
    "(C, 1, 1)": (lambda v: torch.tensor(v)[:, None, None], (2, 3, 4, 4), 1),
    "(1, C, 1, 1)": (lambda v: torch.tensor(v)[None, :, None, None], (2, 3, 4, 4), 1),
    "nested lists": (lambda v: [[[x]] for x in v], (2, 3, 4, 4), 1),
    "an array of three dimensions": (lambda v: np.array(v).reshape(3, 1, 1), (2, 3, 4, 4), 1),
    "video": (lambda v: torch.tensor(v)[:, None, None], (2, 8, 3, 4, 4), 2),
    "video of three frames": (lambda v: torch.tensor(v)[:, None, None], (2, 3, 3, 4, 4), 2),
    "video, channels first": (lambda v: torch.tensor(v)[:, None, None, None], (2, 3, 8, 4, 4), 1),
    "channels last": (torch.tensor, (2, 3), 1),
    "tables": (lambda v: torch.tensor(v)[None], (2, 3), 1),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("form", "shape", "where"), FORMS.values(), ids=FORMS)
def test_mean_and_std_broadcast_as_in_torch_and_a_flat_one_is_of_dimension_1(
    form, shape, where, norm
):
    torch.manual_seed(0)
    view = [1] * len(shape)
    view[where] = 3
    mean, std = (torch.tensor(v).view(view) for v in (MEAN, STD))
    threat = ThreatModel(0.02, norm, mean=form(MEAN), std=form(STD))
    plain = ThreatModel(0.02, norm)
    raw, grad = torch.rand(shape), torch.randn(shape)
    x = (raw - mean) / std
    threat.check(x)
    torch.testing.assert_close(threat.to_pixels(x), raw)
    torch.testing.assert_close(threat.from_pixels(raw, x.dtype), x)
    deltas = torch.zeros(2, *shape).unbind()
    threat.ascend(deltas[0], grad * std, 0.02)  # the gradient at what the loader gives
    plain.ascend(deltas[1], grad, 0.02)
    torch.testing.assert_close(*deltas)
    moved = threat.perturb(x, deltas[0])
    torch.testing.assert_close(threat.to_pixels(moved), plain.perturb(raw, deltas[1]))
    assert threat == ThreatModel(0.02, norm, mean=form(MEAN), std=form(STD))
    assert hash(threat) == hash(ThreatModel(0.02, norm, mean=form(MEAN), std=form(STD)))


@pytest.mark.parametrize(
    ("mean", "shape", "phrases"),
    [
        (torch.zeros(3, 1, 1), (2, 4, 8, 8), ["shape (3, 1, 1) do not broadcast over a sample"]),
        (torch.zeros(3, 1, 1), (2, 3), ["shape (3, 1, 1) do not broadcast over a sample"]),
        (torch.zeros(2, 3, 1, 1), (2, 3, 8, 8), ["do not broadcast", "flat list"]),
        ([0.0] * 3, (2, 8, 3, 4, 4), ["3 entries", "for video", "shape (C, 1, 1)"]),
        ([0.0] * 3, (2, 8, 4, 4), ["3 entries", "one entry per channel"]),
    ],
    ids=["channels", "too few dimensions", "by sample", "a flat one for video", "a flat one"],
)
def test_mean_and_std_that_do_not_fit_are_refused_with_the_cure(mean, shape, phrases):
    std = torch.ones_like(torch.as_tensor(mean))
    with pytest.raises(ValueError, match="mean and std") as error:
        ThreatModel(0.1, mean=mean, std=std).check(torch.rand(shape))
    assert all(phrase in str(error.value) for phrase in phrases)


def test_mean_and_std_of_two_forms_are_refused():
    with pytest.raises(ValueError, match=r"got 3 and shape \(3, 1, 1\)"):
        ThreatModel(0.1, mean=MEAN, std=torch.ones(3, 1, 1))
    assert ThreatModel(0.1, mean=0, std=torch.ones(3, 1, 1)).mean == (((0.0,),),) * 3
    assert (
        ThreatModel(0.1, mean=torch.zeros(3, 1, 1), std=torch.ones(1, 1, 1)).std == (((1.0,),),) * 3
    )
    wide = ThreatModel(0.1, mean=torch.zeros(3, 1, 1), std=torch.ones(1, 3, 1, 1))
    assert wide.mean == ((((0.0,),),) * 3,)
    assert ThreatModel(0.1, mean=[np.array(0.5)] * 2, std=1).mean == (0.5, 0.5)


def test_every_norm_has_its_rules():
    assert balls().keys() == set(get_args(get_type_hints(ThreatModel)["norm"]))


@given(norm=norms, eps=st.floats(1e-3, 1), seed=st.integers(0, 99))
def test_a_projection_leaves_what_is_inside_and_brings_the_rest_to_the_edge(norm, eps, seed):
    torch.manual_seed(seed)
    threat = ThreatModel(eps, norm)
    delta = torch.randn(5, 7) * torch.tensor([1e-3, 0.1, 1, 10, 1e3])[:, None] * eps
    before = delta.clone()
    threat.project(delta)
    far = threat.distance(before)
    assert torch.equal(delta[far <= eps * 0.999], before[far <= eps * 0.999])
    torch.testing.assert_close(
        threat.distance(delta)[far > eps], torch.full_like(far[far > eps], eps)
    )
