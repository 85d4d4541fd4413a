"""PGD against an independent implementation; what an evaluation reports and leaves untouched."""

import re
import sys
import warnings

import eagerpy as ep
import foolbox
import pyautoattack
import pytest
import torch
from torch import nn

from free_adv import ThreatModel, evaluate, pgd
from tests.reference import batches, network


def batch_norm_network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(150, 4))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("normalised", [False, True])
def test_pgd_agrees_with_foolbox(norm, normalised):
    mean, std = ((0.4, 0.6), (0.2, 0.3)) if normalised else (None, None)
    threat = ThreatModel(0.1 if norm == "linf" else 0.7, norm, mean=mean, std=std)
    model = network(torch.float64)
    x, y = batches((16,), torch.float64)[0]
    inputs = threat.from_pixels(x, x.dtype)
    ours = pgd(model, inputs, y, threat, steps=12, step_size=threat.eps / 4, random_start=False)

    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=threat.eps / 4, steps=12, random_start=False)
    preprocessing = {"mean": mean, "std": std, "axis": -3} if normalised else None
    if normalised:
        preprocessing = {**preprocessing, "mean": torch.tensor(mean), "std": torch.tensor(std)}
        preprocessing = {k: v.double() if k != "axis" else v for k, v in preprocessing.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = foolbox.PyTorchModel(
            model.eval(), (0, 1), device="cpu", preprocessing=preprocessing
        )
        _, clipped, _ = attack(theirs, x, y, epsilons=threat.eps)
    torch.testing.assert_close(threat.to_pixels(ours), clipped, atol=1e-6, rtol=0)
    assert not torch.equal(ours, inputs)


def test_restarts_keep_the_worst_of_their_starts():
    model, (x, y) = network(), batches((64,))[0]
    arguments = {"threat": ThreatModel(0.1), "steps": 1, "step_size": 0.001}
    generator = torch.Generator().manual_seed(1)
    single = [pgd(model, x, y, **arguments, generator=generator) for _ in range(4)]
    survives = [model(x_adv).argmax(1) == y for x_adv in single]
    generator.manual_seed(1)
    together = pgd(model, x, y, **arguments, restarts=4, generator=generator)
    expected = torch.stack(survives).all(0)
    assert torch.equal(model(together).argmax(1) == y, expected)
    losses = [nn.functional.cross_entropy(model(x_adv), y, reduction="none") for x_adv in single]
    worst = torch.stack(losses).max(0).values[expected]
    assert not torch.equal(losses[-1][expected], worst)  # the last start alone is not the worst
    kept = nn.functional.cross_entropy(model(together), y, reduction="none")[expected]
    torch.testing.assert_close(kept, worst)


def of_two_classes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 2))  # its margin has one direction


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("dtype", "samples"),
    [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 1)],
)
def test_sure_answers_take_nothing_from_the_cross_entropy(dtype, norm, samples):
    net, (x, _) = of_two_classes(), batches((16,))[0]
    y, threat = net(x).argmax(1), ThreatModel(0.03 if norm == "linf" else 0.3, norm)
    settings = {"steps": 4, "samples": samples, "random_start": False}
    unsure = pgd(net, x, y, threat, **settings)

    def sure(x):
        return (net(x) * 64).to(dtype)

    assert (sure(x).softmax(1).amax(1) == 1).float().mean() > 0.5
    torch.testing.assert_close(pgd(sure, x, y, threat, **settings), unsure, atol=1e-5, rtol=0)


def test_of_several_passes_the_mean_is_that_of_the_cross_entropy():
    (x, y), calls = batches((16,))[0], []
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(50, 4)) for _ in range(2)]

    def model(x):  # one answer is right and sure, which counts for little
        calls.append(x)
        z = nets[len(calls) % 2](x)
        return z + 4 * nn.functional.one_hot(y, 4) * (len(calls) % 2)

    def ce(z, y):
        return nn.functional.cross_entropy(z, y, reduction="none")

    found = [pgd(model, x, y, ThreatModel(0.1), samples=2, loss=loss) for loss in ("ce", ce)]
    torch.testing.assert_close(*found)
    assert (found[0] == pgd(nets[1], x, y, ThreatModel(0.1))).float().mean() < 0.95


class Margin(foolbox.attacks.LinfPGD):
    """Foolbox's PGD on the margin of the logits."""

    def get_loss_fn(self, model, labels):
        def loss(inputs):
            logits = model(inputs).raw
            own = torch.nn.functional.one_hot(labels.raw, 4).bool()
            margin = logits.masked_fill(own, -1e9).max(1).values - logits[own]
            return ep.astensor(margin.sum())

        return loss


def test_the_margin_loss_agrees_with_foolbox():
    model, (x, y) = network(torch.float64).eval(), batches((16,), torch.float64)[0]
    steps = {"steps": 12, "random_start": False}
    ours = pgd(model, x, y, ThreatModel(0.1), step_size=0.025, loss="cw", **steps)
    theirs = foolbox.PyTorchModel(model, (0, 1), device="cpu")
    _, clipped, _ = Margin(abs_stepsize=0.025, **steps)(theirs, x, y, epsilons=0.1)
    torch.testing.assert_close(ours, clipped, atol=1e-6, rtol=0)
    other = pgd(model, x, y, ThreatModel(0.1), step_size=0.025, **steps)
    assert not torch.equal(ours, other)


def test_restarts_spend_nothing_on_images_that_are_already_fooled():
    model, (x, y) = network(), batches((64,))[0]
    seen = []

    def counted(x):
        seen.append(len(x))
        return model(x)

    pgd(counted, x, y, ThreatModel(0.1), steps=1, restarts=4)
    assert seen[0] == 64
    assert seen[2] == sum(model(pgd(model, x, y, ThreatModel(0.1), steps=1)).argmax(1) == y)
    assert sorted(seen, reverse=True) == seen
    seen.clear()
    always = ThreatModel(1.0)  # black or white: whatever it takes
    wrong = (model(x).argmax(1) + 1) % 4
    pgd(counted, x, wrong, always, steps=1, restarts=4)
    assert seen == [64, 64]


def test_only_images_that_the_model_has_right_are_attacked():
    model = network()
    x, y = batches((64,))[0]
    seen = []

    def attack(model, x, y):
        seen.append((x, y))
        return x

    result = evaluate(
        model, [(x, y), (x, (model(x).argmax(1) + 1) % 4)], ThreatModel(0.1), attack=attack
    )
    right = model(x).argmax(1) == y
    assert len(seen) == 1  # of the second batch there was none
    assert torch.equal(seen[0][0], x[right])
    assert torch.equal(seen[0][1], y[right])
    assert result.count == 128


def test_the_step_size_of_an_evaluation_is_that_of_pgd():
    model, (x, y) = network(), batches()[0]
    found = []

    def ours(model, x, y):
        generator = torch.Generator().manual_seed(0)
        settings = {"steps": 2, "step_size": 0.01, "generator": generator}
        found.append(pgd(model, x, y, ThreatModel(0.1), **settings))
        return found[0]

    settings = {"steps": 2, "step_size": 0.01, "progress": False}
    one = evaluate(model, [(x, y)], ThreatModel(0.1), **settings)
    two = evaluate(model, [(x, y)], ThreatModel(0.1), attack=ours, progress=False)
    whole = evaluate(model, [(x, y)], ThreatModel(0.1), steps=2, progress=False)
    assert one.robust == two.robust
    assert whole.robust < one.robust


def test_an_evaluation_is_in_full_precision_unless_it_is_asked_for_another():
    model, types = network(), []
    model[0].register_forward_hook(lambda module, args, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = evaluate(model, batches(), ThreatModel(0.1), steps=1, progress=False)
    assert set(types) == {torch.float32}
    assert "float" not in str(result)
    types.clear()
    settings = {"steps": 1, "autocast": torch.bfloat16, "progress": False}
    result = evaluate(model, batches(), ThreatModel(0.1), **settings)
    assert set(types) == {torch.bfloat16}
    assert "bfloat16" in str(result)


def test_the_rows_of_several_evaluations_are_a_table():
    settings = {"progress": False}
    rows = [
        evaluate(network(), batches(), ThreatModel(eps), **settings, **attack)
        for eps in (8 / 255, 0.1)
        for attack in (
            {"steps": 1},
            {"steps": 10, "restarts": 2, "step_size": 2 / 255, "loss": "cw"},
            {"attack": keep},
        )
    ]
    lines = [str(row) for row in rows]
    name = re.sub(r"\s+", " ", lines[1][26:51] + lines[1].split("\n", 1)[1])
    assert name.strip() == "PGD (CW loss) steps=10 restarts=2 step_size=2/255"
    assert {len(line.split("\n")[0]) for line in lines} == {80}
    assert max(len(part) for line in lines for part in line.split("\n")) == 80
    assert len({line.index("linf") for line in lines}) == 1


def keep(model, x, y):
    return x


def helpful(model, x, y):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
    return (x - 0.1 * grad.sign()).clamp(0, 1)


def test_an_image_that_the_model_had_wrong_is_never_counted_as_robust():
    result = evaluate(network(), batches(), ThreatModel(0.1), attack=helpful, progress=False)
    assert 0 < result.robust == result.clean < 1


def test_the_same_call_gives_the_same_examples_and_a_generator_new_ones():
    model, (x, y) = network(), batches()[0]
    threat = ThreatModel(0.1)
    assert torch.equal(pgd(model, x, y, threat, steps=1), pgd(model, x, y, threat, steps=1))
    g = torch.Generator().manual_seed(3)
    first, second = (pgd(model, x, y, threat, steps=1, generator=g) for _ in range(2))
    assert not torch.equal(first, second)


def careless(model, x, y):
    """An attack that does what attacks should not: gradients on weights, draws from the global state."""
    nn.functional.cross_entropy(model(x), y).backward()
    return (x + 0.05 * torch.rand_like(x)).clamp(0, 1)


@pytest.mark.parametrize("attack", ["pgd", None, careless])
def test_the_model_is_left_as_it_was_found(attack):
    model = batch_norm_network()
    model[3].eval()  # a mode of its own in the middle of a model in training
    x, y = batches((8,))[0]
    nn.functional.cross_entropy(model(x), y).backward()
    modes = [m.training for m in model.modules()]
    grads = [p.grad.clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():  # an attack needs gradients even where the caller has none
        if attack == "pgd":
            pgd(model, x, y, ThreatModel(0.1), steps=2, restarts=2)
        else:
            evaluate(model, [(x, y)], ThreatModel(0.1), steps=2, attack=attack, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_mode_comes_back_after_an_attack_that_raises():
    model = batch_norm_network()

    def broken(model, x, y):
        raise OSError("no attack today")

    with pytest.raises(OSError, match="today"):
        evaluate(model, batches(), ThreatModel(0.1), attack=broken, progress=False)
    assert all(m.training for m in model.modules())


def test_the_result_counts_images_and_names_the_attack():
    model = network()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in batches())
    threat = ThreatModel(8 / 255)
    result = evaluate(model, batches(), threat, steps=3, restarts=2)
    assert result.count == 19
    assert result.clean == right / 19
    assert result.robust <= result.clean
    for phrase in ("PGD steps=3 restarts=2", "linf eps=8/255", "19 images", f"{right / 19:.2%}"):
        assert phrase in str(result)
    assert "\n" not in str(result)
    assert result == evaluate(model, batches(), threat, steps=3, restarts=2, progress=False)


def too_far(model, x, y):
    return (x + 0.3).clamp(0, 1)


def out_of_bounds(model, x, y):
    return x + 0.1


def test_an_answer_that_is_no_number_is_a_wrong_answer():
    def broken(x):
        return torch.full((len(x), 4), torch.nan)

    x, y = batches((8,))[0]
    result = evaluate(broken, [(x, y * 0)], ThreatModel(0.1), steps=1, progress=False)
    assert result.clean == result.robust == 0


def test_a_start_that_ends_in_no_number_does_not_spoil_the_others():
    model, x = network(), batches((64,))[0][0]
    calls = []

    def at_first_broken(x):
        calls.append(x)
        return model(x) * (torch.nan if len(calls) <= 2 else 1)

    x = x[model(x).argmax(1) == 0]  # the class that argmax makes of no number
    assert len(x)
    arguments = {
        "threat": ThreatModel(1e-4),
        "steps": 1,
        "restarts": 3,
    }  # too small to fool anything
    with pytest.warns(UserWarning, match=f"of {len(x)} of {len(x)} samples is zero or not finite"):
        found = pgd(at_first_broken, x, torch.zeros(len(x), dtype=torch.long), **arguments)
    assert (found - x).flatten(1).abs().amax(1).min() > 0.5e-4


def test_autoattack_says_where_there_are_fewer_than_four_classes():
    x, settings = batches((6,))[0][0], {"attack": "autoattack", "progress": False}
    few = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    with pytest.raises(ValueError, match="needs at least 4 classes, got 3; use PGD"):
        evaluate(few, [(x, few(x).argmax(1))], ThreatModel(0.1), **settings)


def test_an_attack_that_leaves_the_threat_model_is_refused():
    with pytest.raises(ValueError, match=r"too_far moved an input by 0.3 in linf, but eps is 0.1"):
        evaluate(network(), batches(), ThreatModel(0.1), attack=too_far, progress=False)
    with pytest.raises(ValueError, match=r"out_of_bounds left bounds \(0.0, 1.0\)"):
        evaluate(network(), batches(), ThreatModel(0.1), attack=out_of_bounds, progress=False)


def outside(norm):
    """Images of which some pixels lie a little outside the bounds, as rounding and overshoot leave them."""
    x = batches((16,))[0][0].clone()
    x[:, :, 0, 0], x[:, :, 0, 1] = 1.15, -2e-4
    return x, ThreatModel(0.1 if norm == "linf" else 0.4, norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_attack_that_brings_strays_back_is_not_refused_and_judged_inside_the_ball(
    norm, share, dtype
):
    (x, threat), model, seen = outside(norm), network(), []
    x = x.to(dtype)

    def clamps(model, x, y):
        inner = x.float().clamp(0, 1)
        delta = torch.ones_like(inner)
        threat.project(delta)
        return (inner - share * delta).clamp(0, 1).to(dtype)

    def judge(x):
        seen.append(x)
        return model(x.float())

    y = model(x.float()).argmax(1)
    settings = {"attack": clamps, "progress": False}
    result = evaluate(judge, [(x, y)], threat, **settings)
    assert result.clean == 1
    far = threat.distance(threat.displacement(x.float(), seen[-1].float()))
    assert far.max() <= threat.eps * (1 + 1e-5)
    assert far.max() > 0.9 * threat.eps or norm == "l2"


def test_autoattack_on_strays_is_not_refused():
    x, _ = outside("linf")
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 4))
    y = model(x).argmax(1)
    threat = ThreatModel(0.5)
    assert evaluate(model, [(x, y)], threat, attack="autoattack", progress=False).robust == 0


@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 0.02), pytest.param("l2", 0.1, marks=pytest.mark.slow)]
)
def test_autoattack_agrees_with_pyautoattack_in_the_units_of_the_loader(norm, eps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 10))
    x = torch.rand(12, 2, 5, 5)
    y = model(x).argmax(1)
    adversary = pyautoattack.AutoAttack(model, norm=norm.title(), eps=eps, seed=0, device="cpu")
    found, _ = adversary.run_standard_evaluation(x, y, batch_size=12)
    expected = (model(found).argmax(1) == y).float().mean().item()
    assert 0 < expected < 1

    normalised = nn.Sequential(Denormalise(), *model)
    threat = ThreatModel(eps, norm, mean=0.5, std=0.25)
    x = ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
    loader = [(x, y)]
    result = evaluate(normalised, loader, threat, attack="autoattack", progress=False)
    assert "AutoAttack standard" in str(result)
    assert result.clean == 1
    assert result.robust == pytest.approx(expected)


class Denormalise(nn.Module):
    """Its gradient comes in the layout that a convolution in channels_last gives."""

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return x * 0.25 + 0.5


def test_what_is_missing_for_an_evaluation_is_named(monkeypatch):
    model, threat = network(), ThreatModel(0.1)
    with pytest.raises(ValueError, match="loader is empty"):
        evaluate(model, [], threat, progress=False)
    with pytest.raises(ValueError, match=r"must yield \(x, y\), got a dict"):
        evaluate(model, [{"x": 1}], threat, progress=False)
    with pytest.raises(ValueError, match=r"must yield \(x, y\), got a tuple of 3"):
        evaluate(model, [(1, 2, 3)], threat, progress=False)
    with pytest.raises(ValueError, match="'autoattack', callable, or a list of these, got 'fgsm'"):
        evaluate(model, batches(), threat, attack="fgsm")
    with pytest.raises(ValueError, match="loss must be 'ce' or 'cw', got 'dlr'"):
        evaluate(model, batches(), threat, loss="dlr", progress=False)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        evaluate(model, batches(), threat, steps=0, progress=False)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"pip install 'free-adv\[eval\]'"):
        evaluate(model, batches(), threat, attack="autoattack")
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert evaluate(model, batches(), threat, steps=1).count == 19


@pytest.mark.parametrize("last", range(8))
def test_the_images_that_fill_up_a_batch_are_no_further_starts(last):
    model, (x, y) = network(), batches((512,))[0]
    right = (model(x).argmax(1) == y).nonzero()[:, 0].roll(last)[:65]
    x, y = x[right], y[right]
    threat, start = ThreatModel(0.8), {"steps": 1, "step_size": 1e-3}
    loader = list(zip(x.split(64), y.split(64), strict=True))
    result = evaluate(model, loader, threat, progress=False, **start)
    # The same draws by hand: a full batch, then an eighth of one, which holds one image only.
    start["generator"], stands = torch.Generator().manual_seed(0), []
    for rows in (torch.arange(64), torch.full((8,), 64)):
        moved = pgd(model, x[rows], y[rows], threat, **start)
        stands.append(model(moved).argmax(1) == y[rows])
    assert torch.equal(result.robust_mask, torch.cat(stands)[:65])
