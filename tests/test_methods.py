"""The methods that the experiments compare do what their names say."""

import contextlib
import copy

import methods
import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial, ThreatModel, pgd
from tests.helpers import with_batch_norm
from tests.reference import batches, free_training, network

EPS, M = 0.1, 3
THREAT = ThreatModel(EPS)


def loader(low=0.0, high=1.0):
    return [(low + (high - low) * x, y) for x, y in batches((6, 6, 4), torch.float64)]


def train(method, source, model=None):
    """What the network is given at each update, and the weights that it ends with."""
    model = model or network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    free = FreeAdversarial(eps=EPS, replays=M)
    starts = torch.Generator().manual_seed(5)
    settings = THREAT, free, M, starts, contextlib.nullcontext
    seen = []
    for x, y in methods.batches(method, source, model, *settings):
        seen.append(x.detach().clone())
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return seen, [p.detach().clone() for p in model.parameters()]


def same(a, b, **tolerance):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, **{"atol": 0, "rtol": 0} | tolerance)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_makes_its_updates_with_each_batch_inside_the_ball_and_the_box(method):
    source = loader()
    updates = methods.updates_per_batch(method, M)
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


def test_fgsm_takes_one_step_of_five_quarters_of_eps_from_a_random_start():
    x, y = loader()[0]
    starts = torch.Generator().manual_seed(5)
    settings = {"steps": 1, "step_size": 1.25 * EPS, "generator": starts}
    expected = pgd(network(torch.float64), x, y, THREAT, **settings)
    same(train("fgsm-rs", [(x, y)])[0], [expected])


@pytest.mark.parametrize("method", ["pgd", "pgd-plain", "fgsm-rs"])
def test_an_attack_leaves_no_trace_in_the_model(method):
    model = with_batch_norm()
    before = copy.deepcopy(model.state_dict())
    free = FreeAdversarial(eps=EPS, replays=M)
    settings = THREAT, free, M, torch.Generator(), contextlib.nullcontext
    next(iter(methods.batches(method, loader(), model, *settings)))
    assert model.training
    assert model[0].training
    assert all(p.grad is None for p in model.parameters())
    same(model.state_dict().values(), before.values())


def test_an_attack_runs_the_model_in_the_precision_of_the_training():
    class Autocast(contextlib.nullcontext):
        entered = 0

        def __enter__(self):
            Autocast.entered += 1

    free = FreeAdversarial(eps=EPS, replays=M)
    settings = network(torch.float64), THREAT, free, M, torch.Generator(), Autocast
    list(methods.batches("pgd", loader(), *settings))
    assert Autocast.entered == 3


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_goes_through_its_loader_again_in_each_epoch(method):
    model, free = network(torch.float64), FreeAdversarial(eps=EPS, replays=M)
    settings = THREAT, free, M, torch.Generator(), contextlib.nullcontext
    source = methods.batches(method, loader(), model, *settings)
    lengths = []
    for _ in range(2):
        lengths.append(0)
        for x, y in source:
            functional.cross_entropy(model(x), y).backward()
            lengths[-1] += 1
    assert lengths == [methods.updates_per_batch(method, M) * 3] * 2
