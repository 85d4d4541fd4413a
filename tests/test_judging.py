"""An evaluation that cannot mislead: what it refuses, what it leaves alone, what it tells, what it keeps."""

import copy
import functools
import math
import os
import random
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from free_adv import FreeAdversarial, ThreatModel, evaluate, pgd

EPS = 8 / 255
THREAT = ThreatModel(EPS)


def linear(classes=10, pixels=192, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


def images(n=20, seed=1, shape=(3, 8, 8)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


X, Y = images(), torch.arange(20) % 10


def judged(model, x=X, y=Y, threat=THREAT, **arguments):
    return evaluate(model, [(x, y)], threat, **{"steps": 2, "progress": False, **arguments})


# The model's answers and the labels.

NET = linear()
ANSWERS = {
    "one output": (linear(1), r"two classes or more.*torch\.cat\(\[-z, z\], 1\)"),
    "one value": (lambda x: NET(x)[:, 0], r"torch\.cat\(\[-z\[:, None\], z\[:, None\]\], 1\)"),
    "a dict": (
        lambda x: {"loss": 0, "logits": NET(x)},
        r"got a dict; pass lambda x: model\(x\)\['logits'\]",
    ),
    "a dict of another name": (lambda x: {"out": NET(x)}, r"pass lambda x: model\(x\)\['out'\]"),
    "a tuple": (lambda x: (NET(x), 0), r"got a tuple; pass lambda x: model\(x\)\[0\]"),
    "an object": (lambda x: object(), r"got a object; pass lambda x: model\(x\)\.logits"),
    "a map": (
        lambda x: x.repeat(1, 4, 1, 1),
        r"for any other task give loss= and correct= of your own",
    ),
    "another number": (lambda x: NET(x)[1:], "for 20 samples"),
    "whole numbers": (lambda x: NET(x).long(), "must return logits"),
    "classes": (lambda x: NET(x).argmax(1), r"leave out argmax\(1\)"),
    "no batch": (lambda x: NET(x)[0], r"squeeze\(\) takes the batch dimension too"),
}


@pytest.mark.parametrize("through", ["evaluate", "pgd"])
@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_no_classifiers_answer_is_refused_with_the_line_to_write(name, through):
    model, phrase = ANSWERS[name]
    with pytest.raises((TypeError, ValueError), match=phrase):
        judged(model) if through == "evaluate" else pgd(model, X, Y % 1, THREAT)


LABELS = {
    "a column": (Y[:, None], r"class indices of shape \(N,\).*y\[:, 0\]"),
    "one-hot": (functional.one_hot(Y, 10), r"y\.argmax\(1\)"),
    "soft": (torch.softmax(torch.rand(20, 10), 1), r"y\.argmax\(1\)"),
    "several each": ((torch.rand(20, 10) > 0.5).long(), "other task give loss= and correct="),
    "words": (["cat"] * 20, "class indices.*got a list of str"),
    "floats": (Y.float(), r"whole numbers.*y\.long\(\)"),
    "too large": (Y + 1, r"labels y run from 1 to 10, but the model has 10 classes, 0 to 9"),
    "negative": (Y - 1, "run from -1 to 8"),
    "too few": (Y[1:], "for 20 samples"),
    "maps": (torch.zeros(20, 8, 8).long(), "for 20 samples"),
}


@pytest.mark.parametrize("through", ["evaluate", "pgd"])
@pytest.mark.parametrize("name", LABELS)
def test_what_is_no_label_is_refused_with_the_line_to_write(name, through):
    y, phrase = LABELS[name]
    with pytest.raises((TypeError, ValueError), match=phrase):
        judged(NET, y=y) if through == "evaluate" else pgd(NET, X, y, THREAT)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8, list, tuple])
def test_whole_numbers_of_any_type_are_labels(kind):
    y = kind(Y.tolist()) if isinstance(kind, type) else Y.to(kind)
    assert judged(NET, y=y) == judged(NET)
    assert torch.equal(pgd(NET, X, y, THREAT), pgd(NET, X, Y, THREAT))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, list])
def test_whole_numbers_of_any_type_are_labels_for_correct_too(kind):
    y = kind(Y.tolist()) if isinstance(kind, type) else Y.to(kind)

    def top5(z, y):
        return (z.topk(5).indices == y[:, None]).any(1)

    assert judged(NET, y=y, correct=top5) == judged(NET, correct=top5)
    odd = Y[:, None].expand(-1, 2)  # which an attack of one's own may take
    assert judged(NET, y=odd, correct=lambda z, y: top5(z, y[:, 0]), attack=lambda m, x, y: x).clean


@pytest.mark.parametrize("through", ["evaluate", "pgd"])
def test_inputs_in_whole_numbers_are_refused_with_the_line_to_write(through):
    x = (255 * X).byte()
    with pytest.raises(TypeError, match=r"inputs x must be floating point.*x\.float\(\) / 255, or"):
        judged(NET, x) if through == "evaluate" else pgd(NET, x, Y, THREAT)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 16, 16)])
@pytest.mark.parametrize("scale", [{}, {"mean": 0.5, "std": 0.25}])
def test_a_later_batch_in_another_range_is_refused_as_the_first_would_be(shape, scale):
    threat = ThreatModel(EPS, **scale)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(8), NET)
    later = threat.from_pixels(255 * images(5, shape=shape), torch.float32)
    loader = [(threat.from_pixels(X, X.dtype), Y), (later, Y[:5])]
    with pytest.raises(ValueError, match=r"lies outside bounds.*divide them by 255"):
        evaluate(net, loader, threat, steps=1, progress=False)


def test_inputs_and_labels_with_a_graph_are_evaluated_as_those_without():
    front = nn.Sequential(nn.Flatten(), nn.Linear(192, 192))
    head, threat = linear(), ThreatModel(EPS, bounds=None)

    def loss(z, y):
        return functional.cross_entropy(z, y, reduction="none")

    def correct(z, y):
        return z.argmax(1) == y.argmax(1)

    x, y = front(X), head(front(X)).softmax(1)
    for labels, own in ((y.argmax(1), {}), (y, {"loss": loss, "correct": correct})):
        plain = judged(head, x.detach(), labels.detach(), threat, **own)
        for attack in (None, lambda model, x, y: x):
            found = judged(head, x, labels, threat, attack=attack, **own)
            assert found.clean == plain.clean == 1
            assert attack or found == plain
    leaf = X.clone().requires_grad_()
    assert judged(NET, leaf) == judged(NET)
    assert leaf.grad is None


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 8, 8), (3, 2, 4, 4)])
def test_inputs_of_any_shape_are_evaluated_and_autoattack_says_what_it_takes(shape):
    x = images(12, shape=shape)
    model = linear(4, math.prod(shape))
    y = model(x).argmax(1)
    assert judged(model, x, y).clean == 1
    if len(shape) != 3:
        with pytest.raises(ValueError, match="takes images of shape"):
            judged(model, x, y, attack="autoattack")


# Left as found.


class Live(nn.Module):
    """Dropout and batch statistics, in front of a linear layer."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.net = linear()

    def forward(self, x):
        return self.net(self.front(x))

    def features(self, x):
        return self.forward(x)


class Wrapper:
    def __init__(self, net):
        self.parts = {"net": [net]}

    def __call__(self, x):
        return self.parts["net"][0](x)


def call(net, x):
    return net(x)


GLOBAL = Live()
WRAPPERS = {
    "the module": lambda net: net,
    "a lambda": lambda net: lambda x: net(x),
    "a lambda of a dict": lambda net: lambda x: {"logits": net(x)}["logits"],
    "a partial": lambda net: functools.partial(call, net),
    "a bound method": lambda net: net.forward,
    "another method": lambda net: net.features,
    "an object": Wrapper,
    "a lambda round an object": lambda net: (lambda inner: lambda x: inner(x))(Wrapper(net)),
    "what hides it": lambda net: functools.partial(call, iter([net]).__next__()),
}


@pytest.mark.parametrize("attack", [None, "own"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_whatever_wraps_a_model_it_runs_in_evaluation_mode_and_is_left_as_it_was(name, attack):
    net = Live()
    net.front[1].eval()  # a mode of its own
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    still = Live()
    still.load_state_dict(net.state_dict())
    still.eval()
    with torch.no_grad():
        y = still(X).argmax(1)

    def own(model, x, y):
        net.train()  # and leaves it so
        net(x)
        return x

    result = judged(WRAPPERS[name](net), y=y, attack=own if attack else None)
    assert result.clean == 1
    assert attack is None or result.robust == 1
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# torch hides this warning of its own compiler where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_model_is_compiled_once_for_each_size_and_left_as_it_was(wrapped):
    torch._dynamo.reset()
    net, counter = Live(), CompileCounter()
    net.eval()
    y = net(X).argmax(1)
    net.train()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    model = (lambda x: compiled(x)) if wrapped else compiled
    loader = list(zip(X.split(5), y.split(5), strict=True))
    for _ in range(2):
        result = evaluate(model, loader, THREAT, steps=2, restarts=3, progress=False)
        assert result.clean == 1
        assert counter.frame_count <= 4  # with and without a gradient, full and small
        assert all(m.training for m in net.modules())
        assert compiled.training


def test_a_model_that_a_function_finds_by_its_global_name_is_still_too():
    y = judged(lambda x: GLOBAL(x)).clean_mask
    assert torch.equal(y, judged(lambda x: GLOBAL(x)).clean_mask)
    assert GLOBAL.front[0].num_batches_tracked == 0
    assert GLOBAL.training


def test_no_random_state_moves_not_by_the_loader_either():
    random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate()
    loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True)
    one, two = (evaluate(NET, loader, THREAT, steps=2, progress=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert one == two
    assert torch.equal(one.clean_mask, two.clean_mask)


def test_an_attack_of_the_users_gets_copies():
    x, y = X.clone(), NET(X).argmax(1)

    def attack(model, images, labels):
        images += 8 * EPS
        labels.zero_()
        return images

    with pytest.raises(ValueError, match="moved an input by"):
        judged(NET, x, y, attack=attack)
    assert torch.equal(x, X)
    assert torch.equal(y, NET(X).argmax(1))


def written_to(y):
    for column in y.values() if isinstance(y, dict) else [y] if torch.is_tensor(y) else y:
        column.zero_()


@pytest.mark.parametrize("kind", ["a tensor", "a dict", "a list"])
def test_what_a_loss_or_a_judgement_writes_to_is_a_copy(kind):
    y = {"a tensor": Y + 1, "a dict": {"y": Y + 1}, "a list": [*(Y[:, None] + 1)]}[kind]
    before = copy.deepcopy(y)

    def loss(z, y):
        written_to(y)
        return z.sum(1)

    def correct(z, y):
        written_to(y)
        return z.sum(1) != 0

    assert judged(NET, y=y, loss=loss, correct=correct).clean == 1
    torch.testing.assert_close(y, before)


@pytest.mark.parametrize("wrong", [lambda m, x, y: None, lambda m, x, y: x[:, :1]])
def test_an_attack_that_returns_something_else_is_refused(wrong):
    with pytest.raises(
        TypeError, match=r"must return a tensor of the shape of x, \(\d+, 3, 8, 8\)"
    ):
        judged(NET, y=NET(X).argmax(1), attack=wrong)


def test_inference_mode_is_refused_with_its_cure():
    for run in (lambda: judged(NET), lambda: pgd(NET, X, Y, THREAT)):
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"),
        ):
            run()


# Half precision.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_no_precision_leaves_the_ball(dtype, normalised, norm):
    scale = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)} if normalised else {}
    for eps in (1 / 255, 2 / 255, 8 / 255):
        threat = ThreatModel(eps if norm == "linf" else 8 * eps, norm=norm, **scale)
        x = threat.from_pixels(images(40), torch.float32).to(dtype)
        net = linear().to(dtype)
        y = net(x).argmax(1)
        x_adv = pgd(net, x, y, threat, steps=5)
        far = threat.distance(threat.displacement(x.double(), x_adv.double())).max()
        assert far <= threat.eps * (1 + 1e-4)
        assert not torch.equal(x_adv, x) or (eps < 1 / 200 and dtype == torch.bfloat16)
        assert judged(net, x, y, threat).clean == 1


LONGER = [pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float64)]


@pytest.mark.parametrize("dtype", [torch.float16, *LONGER], ids=str)
def test_autoattack_is_evaluated_in_every_precision(dtype):
    net, x = linear().to(dtype), images(8).to(dtype)
    result = judged(net, x, net(x).argmax(1), attack="autoattack")
    assert result.clean == 1
    assert result.robust < 1


# What is told.


class Rounds(nn.Module):
    def forward(self, x):
        return (x * 255).round() / 255


def test_gradients_that_vanish_are_told_with_their_number():
    net = nn.Sequential(Rounds(), linear())
    y = net(X).argmax(1)
    loader = list(zip(X.split(5), y.split(5), strict=True))
    with pytest.warns(UserWarning, match="of 20 of 20 samples is zero or not finite") as told:
        evaluate(net, loader, THREAT, steps=2, restarts=2, progress=False)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="of 20 of 20 samples.*loss='cw'"):
        pgd(net, X, y, THREAT)


def test_the_replay_tells_of_gradients_that_vanish_once_for_a_shape():
    net = nn.Sequential(Rounds(), linear())
    free = FreeAdversarial(torch.optim.SGD(net.parameters(), 0.1), eps=EPS, replays=3)

    def train():
        for x, y in free.replay([(X, Y)] * 3):
            free.step(functional.cross_entropy(net(x), y))

    with pytest.warns(UserWarning, match="of 20 of 20 samples is zero in this replay") as told:
        train()
    assert len(told) == 1


@pytest.mark.parametrize("how", ["half", "casts its input", "autocast", "autocast to bfloat16"])
@pytest.mark.parametrize("scaled", [False, True], ids=["no scaler", "scaler"])
def test_a_float16_loop_without_a_scaler_is_told(scaled, how):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 10),
    )
    x, y = images(64, shape=(3, 64, 64)), torch.arange(64) % 10
    net = net if how.startswith("autocast") else net.half()
    x = x.half() if how == "half" else x
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0) if scaled else None
    free = FreeAdversarial(eps=EPS, replays=2)
    dtype = torch.bfloat16 if how.endswith("bfloat16") else torch.float16

    def train():
        for a, b in free.replay([(x, y)]):
            with torch.autocast("cpu", dtype, enabled=how.startswith("autocast")):
                logits = net(a.half() if how == "casts its input" else a)
            loss = functional.cross_entropy(logits.float(), b) / 4  # as small as that of 256 images
            (scaler.scale(loss) if scaled else loss).backward()

    if scaled or dtype == torch.bfloat16:
        train()
    else:
        with pytest.warns(UserWarning, match="zero in a tenth of its entries.*GradScaler"):
            train()


def test_a_part_of_the_image_that_a_float16_loop_does_not_look_at_is_no_false_alarm():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 10),
    )
    x, y = images(64, shape=(3, 64, 64)), torch.arange(64) % 10
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    for a, b in FreeAdversarial(eps=EPS, replays=2).replay([(x, y)]):
        with torch.autocast("cpu", torch.float16):
            logits = net(a[..., :32])
        scaler.scale(functional.cross_entropy(logits.float(), b)).backward()


def test_weights_that_begin_at_zero_are_no_false_alarm():
    net = linear()
    nn.init.zeros_(net[1].weight)
    free = FreeAdversarial(torch.optim.SGD(net.parameters(), 0.1), eps=EPS, replays=2)
    for x, y in free.replay([(X, Y)]):
        free.step(functional.cross_entropy(net(x), y))
    assert (free.delta != 0).any()


ODD = {
    "divided twice": (X / 255, {}, "less than a tenth of bounds"),
    "bounds of 255": (X, {"bounds": (0, 255)}, "less than a tenth of bounds"),
    "not normalised": (X, {"mean": 0.45, "std": 0.25}, "leave out mean and std, or normalise"),
    "eps of images in [0, 1]": (255 * X, {"bounds": (0, 255)}, r"eps=0\.0313.*perhaps 8;"),
    "eps too large": (X - 0.5, {"bounds": None, "eps": 3}, "eps=3 is more than that"),
}


@pytest.mark.parametrize("name", ODD)
def test_values_that_are_odd_are_told_once_by_the_attack_the_evaluation_and_the_replay(name):
    x, settings, phrase = ODD[name]
    settings = {"eps": EPS, **settings}
    threat = ThreatModel(**settings)

    def train():
        for batch, _ in FreeAdversarial(**settings).replay([(x, Y)] * 2):
            batch.sum().backward()

    both = [(x, Y)] * 2
    for run in (
        lambda: pgd(NET, x, Y, threat),
        lambda: evaluate(NET, both, threat, steps=1, progress=False),
        train,
    ):
        with pytest.warns(UserWarning, match=phrase) as told:
            run()
        assert len(told) == 1


def test_values_that_are_as_they_should_be_are_not_told():
    threat = ThreatModel(EPS, mean=0.45, std=0.25)
    judged(NET, threat.from_pixels(X, X.dtype), threat=threat)
    judged(NET, X * 0, threat=THREAT)  # a blank batch
    judged(NET, X * 255, threat=ThreatModel(8, bounds=(0, 255)))
    judged(NET, X * 255, threat=ThreatModel(0.08, bounds=(0, 255)))  # a radius that rises
    judged(NET, X * 4095 - 1024, threat=ThreatModel(1, bounds=(-1024, 3071)))  # computed tomography
    judged(NET, X * 65535, threat=ThreatModel(16, bounds=(0, 65535)))


@pytest.mark.parametrize("count", [2, 5, 7])
def test_that_a_small_first_batch_is_rounded_otherwise_beside_others_is_not_told(count):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1))
    x = images(count)

    def squared(output, y):
        return (output[:, 0] - y).square()

    def near(output, y):
        return squared(output, y) < 1

    judged(net, x, torch.zeros(count), loss=squared, correct=near)


def test_soft_labels_are_climbed_by_their_cross_entropy_where_correct_says_what_is_right():
    y = NET(X).argmax(1)
    soft = functional.one_hot(y, 10) * 0.9 + 0.01

    def right(output, y):
        return output.argmax(1) == y.argmax(1)

    found = judged(NET, X, soft, correct=right)
    assert found.clean == 1
    assert found.robust == pytest.approx(judged(NET, X, y).robust, abs=0.1)


def test_a_later_image_that_overshoots_its_bounds_alone_is_judged_and_one_of_other_units_is_not():
    stray = X[:1] * 1.25 - 0.125
    loader = [(X[:1], Y[:1]), (stray, Y[:1])]
    assert evaluate(NET, loader, THREAT, steps=1, progress=False).count == 2
    with pytest.raises(ValueError, match="outside bounds"):
        evaluate(NET, [*loader, (X[:1] * 255, Y[:1])], THREAT, steps=1, progress=False)


# Few sizes, whole results.


@pytest.mark.parametrize("restarts", [1, 5])
@pytest.mark.parametrize("images_", [512, 500])
def test_the_model_sees_batches_of_few_sizes(restarts, images_):
    x, sizes = images(images_), set()
    y = NET(x).argmax(1)
    y = torch.where(torch.rand(images_, generator=torch.Generator().manual_seed(0)) < 0.7, y, 0)

    def model(t):
        sizes.add(len(t))
        return NET(t)

    loader = list(zip(x.split(32), y.split(32), strict=True))
    result = evaluate(model, loader, THREAT, steps=2, restarts=restarts, progress=False)
    assert len(sizes) <= 3
    assert result.count == images_


def test_masks_say_which_images_are_right_in_the_order_of_the_loader():
    x = images(300)
    y = torch.where(torch.arange(300) % 3 > 0, NET(x).argmax(1), (NET(x).argmax(1) + 1) % 10)
    threat = ThreatModel(2 / 255)
    loader = list(zip(x.split(64), y.split(64), strict=True))
    result = evaluate(NET, loader, threat, steps=10, loss="cw", progress=False)
    assert torch.equal(result.clean_mask, NET(x).argmax(1) == y)
    assert result.clean_mask.float().mean().item() == pytest.approx(result.clean)
    assert result.robust_mask.float().mean().item() == pytest.approx(result.robust)
    assert not (result.robust_mask & ~result.clean_mask).any()
    assert torch.equal(result.robust_mask, exact(NET[1], x, y, threat))


def test_of_several_attacks_the_worst_counts_and_each_says_what_it_left():
    x = images(100)
    y = NET(x).argmax(1)

    def first_half(model, x, y):
        x = x.clone()
        x[::2] = pgd(model, x[::2], y[::2], THREAT, steps=5)
        return x

    result = judged(NET, x, y, attack=[first_half, "pgd", "autoattack"])
    labels = ["first_half", "PGD steps=2 restarts=1", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(result.standing) == labels
    shares = [*result.standing.values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == result.robust < shares[0] < 1
    assert "after first_half" in str(result)
    assert max(map(len, str(result).split("\n"))) <= 80
    with pytest.raises(ValueError, match="attack is an empty list"):
        judged(NET, attack=[])


def test_attacks_of_one_name_each_have_what_they_left():
    y = NET(X).argmax(1)

    def shift(model, x, y, by):
        return (x + by).clamp(0, 1)

    twice = [functools.partial(shift, by=by) for by in (0.03, -0.03)]
    assert list(judged(NET, y=y, attack=twice).standing) == ["partial", "partial (2)"]
    result = judged(NET, y=y, attack=["pgd"] * 3)
    name = "PGD steps=2 restarts=1"
    assert list(result.standing) == [name, f"{name} (2)", f"{name} (3)"]
    assert result.attack == ", ".join([name] * 3)


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_labels_may_be_as_wide_as_the_widest_of_their_batch(kind):
    def first(y):
        return y["y"][:, 0] if kind == "dict" else y[:, 0]

    def loss(z, y):
        return functional.cross_entropy(z, first(y), reduction="none")

    def correct(z, y):
        return z.argmax(1) == first(y)

    loader = []
    for i, width in enumerate((2, 5, 5, 3)):
        x = images(9, seed=i)
        y = functional.pad(
            torch.where(torch.arange(9) > 2, NET(x).argmax(1), 0)[:, None], (0, width)
        )
        loader.append((x, {"y": y} if kind == "dict" else y))
    settings = {"steps": 2, "loss": loss, "correct": correct, "progress": False}
    padded = evaluate(NET, loader, THREAT, **settings)
    plain = [(x, first(y)) for x, y in loader]
    settings.update(loss="ce", correct=None)
    assert torch.equal(padded.clean_mask, evaluate(NET, plain, THREAT, **settings).clean_mask)
    assert 0 < padded.robust < padded.clean < 1


def test_images_of_several_shapes_go_through_one_evaluation():
    pool = nn.AdaptiveAvgPool2d(4)
    net = nn.Sequential(pool, linear(4, 48))
    loader = []
    for i in range(6):
        x = images(9, seed=i, shape=(3, 8 + 2 * (i % 3), 8))
        loader.append((x, net(x).argmax(1)))
    result = evaluate(net, loader, THREAT, steps=2, restarts=3, progress=False)
    assert result.clean == 1
    assert result.count == 54
    assert len(result.robust_mask) == 54


@pytest.mark.skipif(
    "TQDM_DISABLE" in os.environ, reason="TQDM_DISABLE is set: there is never a bar"
)
def test_there_is_no_bar_where_there_is_no_terminal(capfd, monkeypatch):
    judged(NET, progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    far = ThreatModel(0.5)  # the first attack leaves none to the slow ones
    judged(NET, y=NET(X).argmax(1), threat=far, progress=True, attack="autoattack")
    told = capfd.readouterr().err
    assert "square" in told or "apgd" in told


# A linear model has a closed form.


def exact(layer, x, y, threat, reach=None):
    """Which images stand every perturbation: for each rival class the worst case over the ball and the box.

    `reach` is how far each pixel can go up and down, where its precision has no number at the edge of the ball.
    """
    w, b = layer.weight.double(), layer.bias.double()
    x = x.double().flatten(1)
    rivals = (w[None] - w[y][:, None]).detach()  # (N, classes, pixels)
    margin = torch.einsum("ncp,np->nc", rivals, x) + (b[None] - b[y][:, None]).detach()
    up, down = (1 - x).clamp(max=threat.eps), x.clamp(max=threat.eps)
    if reach is not None:
        up, down = (r.flatten(1) for r in reach)
    gain = torch.where(rivals > 0, rivals * up[:, None], -rivals * down[:, None]).sum(2)
    if threat.norm == "l2":  # without a box, or with the box out of reach
        gain = rivals.norm(dim=2) * threat.eps
    worst = margin + gain
    worst[torch.arange(len(y)), y] = -torch.inf
    return worst.max(1).values < 0


def furthest(threat, x, pixels, sign):
    """The distance in pixel units to the last number of that precision inside a linf ball."""
    edge = threat.from_pixels(pixels + sign * threat.eps, torch.float64).to(x.dtype)
    for _ in range(3):
        distance = sign * (threat.to_pixels(edge.double()) - pixels)
        inner = torch.nextafter(edge.float(), x.float()).to(x.dtype)
        step = (edge.double() - x.double()) * (1 - 2.0 ** -(9 if x.dtype == torch.bfloat16 else 12))
        inner = (x.double() + step).to(x.dtype) if x.dtype.itemsize == 2 else inner
        edge = torch.where(distance > threat.eps * (1 + 1e-9), inner, edge)
    return (sign * (threat.to_pixels(edge.double()) - pixels)).clamp(0, threat.eps)


@settings(max_examples=int(os.environ.get("EXAMPLES", 6)))
@given(
    seed=st.integers(0, 99),
    norm=st.sampled_from(["linf", "l2"]),
    levels=st.sampled_from([2, 4, 8]),
    normalised=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_the_robust_accuracy_of_a_linear_model_is_that_of_its_closed_form(
    seed, norm, levels, normalised, dtype
):
    net = linear(seed=seed).double()
    pixels = images(400, seed=seed).double() * 0.5 + 0.25  # the box is out of reach of an l2 ball
    scale = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)} if normalised else {}
    eps = levels / 255 if norm == "linf" else levels / 40
    threat = ThreatModel(eps, norm=norm, **scale)
    x = threat.from_pixels(pixels, torch.float64).to(dtype)  # rounded, and the truth is that of x
    pixels = threat.to_pixels(x.double())
    y = net(pixels).argmax(1)

    def model(t):  # in full precision, whatever the inputs'
        return net(threat.to_pixels(t.double()))

    reach = [furthest(threat, x, pixels, sign) for sign in (1, -1)]
    truth = exact(net[1], pixels, y, threat, reach).double().mean().item()
    # Steps of a fixed length along one direction g, from a start at right angles to it, leave an angle of
    # 2 atan(exp(-2.5)) to g on the sphere of an l2 ball, a cosine of 0.987; signs reach every corner.
    reached = threat if norm == "linf" else replace(threat, eps=0.985 * eps)
    worst = exact(net[1], pixels, y, reached, reach).double().mean().item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(
            model,
            list(zip(x.split(128), y.split(128), strict=True)),
            threat,
            steps=40,
            restarts=10,
            loss="cw",
            progress=False,
        )
    assert found.clean == 1
    low = dtype == torch.bfloat16  # of whose grid an l2 ball has no closed form
    assert truth - 1e-9 <= found.robust <= worst + (0.08 if norm == "l2" and low else 0.01)
