"""`free.report()`: numbers of the replays, against the same computed here."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.reference import batches, network
from tests.test_cost import Operators

EPS = 0.1


def cosine(delta, grad, std):
    """Mean over samples with an angle, in pixel units."""
    values = []
    for d, g in zip(delta, grad, strict=True):
        d, g = d.double(), g.double() / std
        if d.norm() * g.norm() > 0:
            values.append((d.flatten() @ g.flatten() / (d.norm() * g.norm())).item())
    return values


def share_at_the_edge(delta, norm):
    sizes = delta.flatten(1).norm(dim=1) if norm == "l2" else delta.abs()
    return (sizes >= EPS * (1 - 1e-4)).double().flatten().tolist()


def mean(values):
    return sum(values) / len(values) if values else math.nan


SETTINGS = {
    "linf": {},
    "l2": {"norm": "l2"},
    "normalised": {"mean": (0.4, 0.5), "std": (0.2, 0.3)},
    "normalised, l2": {"mean": (0.4, 0.5), "std": (0.2, 0.3), "norm": "l2"},
    "a window": {"window": 2},
    "micro-batches": {"accumulate": 2},
    "a window of micro-batches": {"window": 2, "accumulate": 2},
    "at": {"at": True},
    "half precision": {"half": True},
}


@pytest.mark.parametrize("own", [False, True], ids=["step", "own backward"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_report_is_what_one_computes_from_delta_and_gradients(name, own):
    settings = dict(SETTINGS[name])
    half, at = settings.pop("half", False), settings.pop("at", False)
    norm, m = settings.get("norm", "linf"), 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), network())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    place = {"at": model[0], "bounds": (0, 1)} if at else {}
    free = FreeAdversarial(None if own else optimizer, eps=EPS, replays=m, **settings, **place)
    assert free.report()["updates"] == 0  # from now on
    std = torch.tensor(settings.get("std", (1.0, 1.0))).double().view(2, 1, 1)
    width, group = settings.get("window", 1), settings.get("accumulate", 1)
    loader = [(free.threat.from_pixels(x, x.dtype), y) for x, y in batches((4,) * 4)]
    loader = [(x.bfloat16() if half else x, y) for x, y in loader]
    alignment, edge, losses = ([[] for _ in range(m)] for _ in range(3))
    for i, (x, y) in enumerate(free.replay(loader)):
        turn = i % (m * width * group) // (width * group)
        seen = []
        x = model[0](x)
        x.register_hook(seen.append)
        delta = free.delta
        loss = functional.cross_entropy(model[1](x.float()), y)
        if own:
            loss.backward()
        else:
            free.step(loss)
        alignment[turn] += cosine(delta, seen[0], std)
        edge[turn] += share_at_the_edge(delta, norm)
        losses[turn].append(loss.item())
    report = free.report()
    for key, expected in (("alignment", alignment), ("edge", edge)):
        assert report[key] == pytest.approx([mean(v) for v in expected], abs=1e-6, nan_ok=True)
    assert report["updates"] == 4 // group * m
    assert report["skipped"] == 0
    if own:
        assert all(map(math.isnan, report["loss"]))
    else:
        assert report["loss"] == pytest.approx([mean(v) for v in losses], rel=1e-5)
    empty = free.report()
    assert empty["updates"] == 0
    assert all(math.isnan(v) for key in ("alignment", "edge", "loss") for v in empty[key])


def test_several_inputs_count_together():
    one, two = (x for x, _ in batches((4, 4)))
    free = FreeAdversarial(eps=EPS, replays=2, key=[0, 1])
    free.report()
    for i, (a, b) in enumerate(free.replay([(one, two)])):
        (a.sum() - b.sum() if i == 0 else a.sum() + b.sum()).backward()
    report = free.report()
    assert report["alignment"][1] == pytest.approx(0, abs=1e-7)  # +1 and -1
    assert report["edge"] == [0, 1]


def test_it_costs_nothing_before_it_is_asked_for_and_reads_nothing_in_the_loop():
    names = []
    for asked in (False, False, True):
        free = FreeAdversarial(eps=EPS, replays=2)
        if asked:
            free.report()
        replay = iter(free.replay(batches((4,) * 3)))
        for _ in range(3):
            next(replay)[0].sum().backward()
        with Operators() as operators:
            for x, _ in replay:
                x.sum().backward()
        names.append(operators.names)
    assert names[0] == names[1]
    assert len(names[2]) > len(names[0])
    assert not {"_local_scalar_dense", "is_nonzero"} & set(names[2])


def test_minibatches_that_were_skipped_are_counted():
    free = FreeAdversarial(eps=EPS, replays=3)
    free.report()
    for i, (x, _) in enumerate(free.replay(batches((4, 4)))):
        if i == 1:
            free.skip()
        else:
            x.sum().backward()
    report = free.report()
    assert report["skipped"] == 1
    assert report["updates"] == 4


def test_a_step_that_fails_and_is_tried_again_counts_once():
    class Sgd(torch.optim.SGD):
        broken = True

        def step(self):
            if self.broken:
                raise InterruptedError
            super().step()

    model = network()
    optimizer = Sgd(model.parameters(), 0.1)
    free = FreeAdversarial(optimizer, eps=EPS, replays=1)
    free.report()
    for x, y in free.replay(batches((4,))):
        with pytest.raises(InterruptedError):
            free.step(2 * functional.cross_entropy(model(x), y))
        optimizer.broken = False
        free.step(loss := functional.cross_entropy(model(x), y))
    assert free.report()["loss"] == pytest.approx([loss.item()])
