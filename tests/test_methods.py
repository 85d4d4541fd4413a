"""The methods that the experiments compare do what their names say."""

import argparse
import contextlib

import methods
import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import with_batch_norm
from tests.reference import batches, free_training, network

EPS, M = 0.1, 3


def loader(low=0.0, high=1.0):
    return [(low + (high - low) * x, y) for x, y in batches((6, 6, 4), torch.float64)]


def prepared(method, model, autocast=contextlib.nullcontext):
    """The object of a method for a model, and what else `methods.batches` takes."""

    def objective(batch):
        with autocast():
            return functional.cross_entropy(model(batch[0]), batch[1])

    free = FreeAdversarial(objective=objective, **methods.settings_of(method, EPS, M))
    return free, model, autocast


def train(method, source, model=None):
    """What the network is given at each update, and the weights that it ends with."""
    model = model or network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(5)
    seen = []
    for x, y in methods.batches(method, source, *prepared(method, model)):
        seen.append(x.detach().clone())
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return seen, [p.detach().clone() for p in model.parameters()]


def updates_of(method):
    return methods.updates_per_batch(method, methods.settings_of(method, EPS, M)["replays"])


def same(a, b, **tolerance):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, **{"atol": 0, "rtol": 0} | tolerance)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_makes_its_updates_with_each_batch_inside_the_ball_and_the_box(method):
    source = loader()
    updates = updates_of(method)
    assert updates == (M if "free" in method else 1)
    seen, weights = train(method, source)
    assert len(seen) == updates * len(source)
    for index, x_adv in enumerate(seen):
        x, _ = source[index // updates]
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        reach = 3 * EPS if method == "n-fgsm" else EPS  # it is not held in the ball
        assert (x_adv - x).abs().max() <= reach + 1e-12
    moved = not torch.equal(seen[-1], source[-1][0])
    assert moved == (method != "natural")
    assert not torch.equal(weights[0], network(torch.float64)[0].weight)


def test_free_is_the_algorithm_of_the_paper():
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in free_training(model, optimizer, loader(), eps=EPS, m=M, epochs=1):
        pass
    same(train("free", loader())[1], [p.detach() for p in model.parameters()])


def test_the_public_way_is_free_where_no_pixel_reaches_the_bounds():
    interior = loader(0.2, 0.8)
    for ours, theirs in zip(train("free", interior), train("free-public", interior), strict=True):
        same(ours, theirs)


def test_the_public_way_loses_the_gradient_of_pixels_that_were_pushed_out_of_the_bounds():
    black = [(torch.zeros_like(x), y) for x, y in loader()]
    ours, theirs = train("free", black)[0], train("free-public", black)[0]
    # What lies below the bounds has no gradient any more, so that fewer pixels come back.
    assert (theirs[-1] > 0).double().mean() < (ours[-1] > 0).double().mean()


def test_pgd_by_plain_backward_passes_is_pgd():
    for ours, theirs in zip(train("pgd", loader()), train("pgd-plain", loader()), strict=True):
        same(ours, theirs, atol=1e-12)


def written_out(method, x, y, model):
    """The example of a method with one ascent, without the library."""
    torch.manual_seed(5)
    reach, step, ball = {"fgsm-rs": (1, 1.25, 1), "n-fgsm": (2, 1, 3)}[method]
    delta = torch.empty_like(x).uniform_(-reach * EPS, reach * EPS)
    noisy = (x + delta).clamp(0, 1).requires_grad_()
    (grad,) = torch.autograd.grad(functional.cross_entropy(model(noisy), y), noisy)
    return (x + (delta + step * EPS * grad.sign()).clamp(-ball * EPS, ball * EPS)).clamp(0, 1)


@pytest.mark.parametrize("method", ["fgsm-rs", "n-fgsm"])
def test_a_method_of_one_ascent_trains_on_its_authors_example(method):
    x, y = loader()[0]
    model = network(torch.float64)
    same(train(method, [(x, y)], model)[0], [written_out(method, x, y, network(torch.float64))])


@pytest.mark.parametrize("method", ["pgd", "pgd-plain", "fgsm-rs", "n-fgsm"])
def test_an_attack_leaves_no_gradient_in_the_model(method):
    model = with_batch_norm()
    next(iter(methods.batches(method, loader(), *prepared(method, model))))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("method", "passes"), [("pgd", 7), ("pgd-plain", 7), ("n-fgsm", 1)])
def test_an_attack_runs_the_model_in_the_precision_of_the_training(method, passes):
    class Autocast(contextlib.nullcontext):
        entered = 0

        def __enter__(self):
            Autocast.entered += 1

    next(
        iter(methods.batches(method, loader(), *prepared(method, network(torch.float64), Autocast)))
    )
    assert Autocast.entered == passes


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_goes_through_its_loader_again_in_each_epoch(method):
    model = network(torch.float64)
    source = methods.batches(method, loader(), *prepared(method, model))
    lengths = []
    for _ in range(2):
        lengths.append(0)
        for x, y in source:
            functional.cross_entropy(model(x), y).backward()
            lengths[-1] += 1
    assert lengths == [updates_of(method) * 3] * 2


def planned(*words, updates=100):
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="free")
    methods.add_arguments(parser, 4, "8/255")
    args = parser.parse_args(words)
    methods.complete(args, 4)
    return methods.plan(args, updates)


def test_updates_are_fewer_where_they_have_ascents_so_that_the_cost_is_equal():
    assert planned() == (100, {})
    assert planned("--method", "natural") == (100, {})
    assert planned("--method", "n-fgsm") == (60, {})
    assert planned("--method", "pgd") == (18, {})
    assert planned("--method", "pgd", "--ascent-cost", "0") == (100, {})
    assert planned("--ascents", "1", "--ascent-cost", "1") == (80, {})  # shared by four replays


def test_a_budget_is_spent_in_parts_of_the_cost():
    late = "--replays", "1", "--start", "zero", "--later", "0.3", "ascents=1", "noise=2"
    assert planned(*late) == (72, {30: {"ascents": 1, "noise": 2.0}})
    both = "--later", "0.3", "ascents=1", "--later", "0.3", "noise=2"
    assert planned("--replays", "1", *both)[1] == {30: {"ascents": 1, "noise": 2.0}}
    late += "--later", "0.8", "ascents=2", "eps=10/255"
    assert planned(*late)[1][60] == {"ascents": 2, "eps": 10 / 255}
    for wrong in ("2", "ascents=1"), ("0.5", "m=1"), ("0.5", "--later", "0.2", "eps=0.1"):
        with pytest.raises(SystemExit, match="--later"):
            planned("--later", *wrong)
