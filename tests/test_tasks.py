"""More than classifiers, and models that draw random numbers: `loss=`, `correct=`, `samples=`."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from free_adv import ThreatModel, evaluate, pgd

EPS = 8 / 255
THREAT = ThreatModel(EPS)


def images(n=20, seed=1):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


X = images()


def linear(outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, outputs))


def judged(model, y, x=X, threat=THREAT, size=8, **arguments):
    pieces = y.split(size) if isinstance(y, torch.Tensor) else y
    loader = list(zip(x.split(size), pieces, strict=True))
    return evaluate(model, loader, threat, **{"steps": 5, "progress": False, **arguments})


# A map of logits: 3 classes at each of 64 places, closed form.


class Segmenter(nn.Module):
    """Each place by its own pixel alone, so that the worst perturbation of a place is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 1).double()

    def forward(self, x):
        return {"out": self.conv(x.double())}


def of_places(output, y):
    """The largest margin to another class, summed over places."""
    z = output["out"]
    own = z.gather(1, y[:, None])
    return (z.scatter(1, y[:, None], -torch.inf) - own).amax(1).flatten(1).mean(1)


def pixel_accuracy(output, y):
    return (output["out"].argmax(1) == y).flatten(1).double().mean(1)


def places_that_stand(net, x, y):
    """Whether each place stands every perturbation of linf, inside bounds."""
    w = net.conv.weight[:, :, 0, 0]
    z, x = net(x)["out"], x.double()
    up, down = (1 - x).clamp(max=EPS), x.clamp(max=EPS)
    stands = torch.ones_like(y, dtype=torch.bool)
    for other in range(3):
        d = w[other] - w[y]  # (N, H, W, channels)
        d = d.movedim(-1, 1)
        gain = torch.where(d > 0, d * up, -d * down).sum(1)
        margin = z[:, other] - z.gather(1, y[:, None])[:, 0]
        stands &= (other == y) | (margin + gain < 0)
    return stands


def test_a_segmenter_is_attacked_and_judged_by_the_share_of_its_places():
    net = Segmenter()
    with torch.no_grad():
        y = net(X)["out"].argmax(1)
        y[:, 0, 0] = (y[:, 0, 0] + 1) % 3  # one place of 64 is wrong
        truth = (places_that_stand(net, X, y) & (net(X)["out"].argmax(1) == y)).double()
    result = judged(net, y, loss=of_places, correct=pixel_accuracy, restarts=2, steps=10)
    assert result.clean == pytest.approx(63 / 64)
    shares = truth.flatten(1).mean(1)
    assert torch.equal(result.clean_mask, torch.full((20,), 63 / 64, dtype=torch.float64))
    assert (result.robust_mask >= shares - 1e-9).all()
    assert result.robust == pytest.approx(shares.mean().item(), abs=0.02)
    assert result.robust == pytest.approx(result.robust_mask.mean().item())
    assert result.attack == "PGD (of_places) steps=10 restarts=2"


def test_robust_is_the_mean_of_the_lowest_share_of_each_image_over_all_attacks():
    net, calls = linear(), []
    shares = torch.rand(3, 20, dtype=torch.float64)  # clean, after one attack, after two
    shares[0, 3] = 0  # never attacked

    def attack(model, x, y):
        calls.append(len(x))
        return x

    def correct(output, y):
        return shares[len(calls), y]

    y = torch.arange(20)
    result = judged(net, y, size=20, attack=[attack, attack], correct=correct)
    assert calls == [19, 19]
    torch.testing.assert_close(result.clean_mask, shares[0])
    torch.testing.assert_close(result.robust_mask, shares.amin(0))
    assert result.clean == pytest.approx(shares[0].mean().item())
    assert result.robust == pytest.approx(shares.amin(0).mean().item())
    steps = [shares[:2].amin(0).mean().item(), shares.amin(0).mean().item()]
    assert list(result.standing.values()) == pytest.approx(steps)


def test_restarts_of_a_loss_of_ones_own_keep_the_largest():
    net = linear(2)

    def loss(output, y):
        return (output - y).square().mean(1)

    y, g = torch.rand(20, 2), torch.Generator().manual_seed(1)
    settings = {"steps": 1, "step_size": 1e-4, "loss": loss}
    single = [pgd(net, X, y, THREAT, generator=g, **settings) for _ in range(3)]
    losses = torch.stack([loss(net(x), y) for x in single])
    g.manual_seed(1)
    found = pgd(net, X, y, THREAT, generator=g, restarts=3, **settings)
    torch.testing.assert_close(loss(net(found), y), losses.amax(0))
    assert len(losses.argmax(0).unique()) == 3


def test_a_loss_of_ones_own_for_a_classifier_is_that_of_the_same_name():
    net = linear()
    y = net(X).argmax(1)

    def ce(z, y):
        return functional.cross_entropy(z, y, reduction="none")

    assert torch.equal(pgd(net, X, y, THREAT, loss=ce), pgd(net, X, y, THREAT))
    one, two = judged(net, y, loss=ce), judged(net, y)
    assert (one.clean, one.robust) == (two.clean, two.robust)
    assert one.clean_mask.dtype == torch.bool


def test_right_may_be_another_question_to_the_same_logits():
    net = linear()
    y = net(X).argsort(1, descending=True)[:, 2]  # the third best

    def top3(z, y):
        return (z.topk(3).indices == y[:, None]).any(1)

    result = judged(net, y, correct=top3)
    assert result.clean == 1
    assert result.clean_mask.dtype == torch.bool
    assert result.robust < 1
    assert judged(net, y).clean == 0


class Detector(nn.Module):
    """Boxes in training, a list of dicts in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.net = linear(4)

    def forward(self, x):
        return [{"boxes": b[None], "scores": b[:1].sigmoid()} for b in self.net(x)]


def of_boxes(output, y):
    wrong = [functional.l1_loss(o["boxes"], t["boxes"]) for o, t in zip(output, y, strict=True)]
    return torch.stack(wrong)


def near(output, y):
    return of_boxes(output, y) < 0.05


def targets(net):
    with torch.no_grad():
        return [{"boxes": o["boxes"], "labels": torch.ones(1)} for o in net(X)]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_detector_with_a_list_of_targets_is_attacked_and_judged(kind):
    net = Detector()
    y = targets(net)
    pieces = [kind(y[i : i + 8]) for i in range(0, 20, 8)]
    result = judged(net, pieces, loss=of_boxes, correct=near, restarts=2)
    assert (result.count, result.clean) == (20, 1)
    assert result.robust < 1
    moved = pgd(net, X, y, THREAT, loss=of_boxes, restarts=2)
    assert (of_boxes(net(moved), y) > 0).all()


def test_targets_may_be_a_dict_of_columns():
    net = linear(4)

    def loss(output, y):
        return (output - y["boxes"]).abs().mean(1) * y["weight"]

    def correct(output, y):
        return loss(output, y) < 0.05

    boxes = net(X).detach()
    pieces = [
        {"boxes": boxes[i : i + 8], "weight": torch.ones(len(boxes[i : i + 8]))}
        for i in range(0, 20, 8)
    ]
    result = judged(net, pieces, loss=loss, correct=correct, restarts=2)
    assert result.clean == 1
    assert result.robust < 1
    with pytest.raises(ValueError, match="y must have one entry for each of 20 samples"):
        pgd(net, X, [boxes, torch.ones(20)], THREAT, loss=loss)


def test_soft_labels_with_a_loss_alone_are_refused_with_what_is_missing():
    def loss(z, y):
        return functional.cross_entropy(z, y, reduction="none")

    soft = functional.one_hot(linear()(X).argmax(1), 10).float()
    with pytest.raises(ValueError, match=r"soft labels take y.argmax\(1\).*loss= and correct="):
        judged(linear(), soft, loss=loss)
    assert judged(linear(), soft, loss=loss, correct=lambda z, y: z.argmax(1) == y.argmax(1)).clean


def test_targets_may_be_an_array():
    net = linear(1)
    y = net(X).detach()[:, 0].numpy()

    def loss(output, y):
        return (output[:, 0] - y).abs()

    result = judged(
        net, [y[:8], y[8:16], y[16:]], loss=loss, correct=lambda o, y: loss(o, y) < 0.01
    )
    assert result.clean == 1
    assert result.robust < 1


def of(value):
    return lambda output, y: value


WRONG = {
    "a mean": (
        {"loss": of(torch.tensor(0.0))},
        r"loss must return one value for each of 8 samples",
    ),
    "a loss of torch": ({"loss": functional.cross_entropy}, 'reduction="none"'),
    "every place": ({"loss": of(torch.zeros(8, 4))}, r"values.flatten\(1\).mean\(1\)"),
    "a column": ({"correct": of(torch.zeros(8, 1))}, "correct must return one value for each of 8"),
    "a list": ({"correct": of([True] * 8)}, "got a list"),
    "an error": ({"correct": of(torch.full((8,), 3.5))}, r"got 3.5 to 3.5.*within a tolerance"),
    "no number": ({"correct": of(torch.full((8,), torch.nan))}, "or shares from 0 to 1"),
    "no callable": ({"correct": "iou"}, "correct must be a callable"),
    "AutoAttack": ({"attack": "autoattack", "correct": near}, "'autoattack' is for classifiers"),
    "AutoAttack's loss": (
        {"attack": "autoattack", "loss": near},
        "'autoattack' is for classifiers",
    ),
    "AutoAttack, random": ({"attack": "autoattack", "samples": 2}, "version='rand'"),
    "no samples": ({"samples": 0}, "samples must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_loss_or_judgement_is_refused_with_its_cure(name):
    settings, phrase = WRONG[name]
    net = linear()
    y = net(X[:16]).argmax(1)
    with pytest.raises((TypeError, ValueError), match=phrase):
        judged(net, y, X[:16], **settings)


@pytest.mark.parametrize(
    "cut", [lambda z: z.detach(), lambda z: torch.tensor(z.tolist())], ids=["detach", "list"]
)
def test_a_loss_without_a_gradient_is_refused_with_its_cure(cut):
    net = linear()
    y = net(X).argmax(1)
    with pytest.raises(RuntimeError, match=r"no gradient from the loss to the input.*detach"):
        pgd(net, X, y, THREAT, loss=lambda z, y: cut(z).sum(1))
    with pytest.raises(RuntimeError, match="no gradient from the loss to the input"):
        pgd(lambda x: net(x.detach()), X, y, THREAT)


# Models that draw random numbers.


class Noisy(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.net, self.size = linear(), size

    def forward(self, x):
        return self.net(x + self.size * torch.randn_like(x))


class Ties(nn.Module):
    """All classes are alike but for the last digits."""

    def forward(self, x):
        return 1 + 1e-6 * torch.rand(len(x), 10)


class Gone(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()

    def forward(self, x):
        return self.net(functional.dropout(x, 0.3))


RANDOM = {"noise": Noisy(1.0), "a little": Noisy(1e-3), "ties": Ties(), "dropout": Gone()}


@pytest.mark.parametrize("name", RANDOM)
def test_a_model_that_answers_differently_twice_is_told_once(name):
    y = torch.arange(20) % 10
    with pytest.warns(UserWarning, match=r"the model is random.*pass samples=") as told:
        judged(RANDOM[name], y, restarts=2, attack=lambda model, x, y: x)
    assert len(told) == 1


def test_a_random_detector_is_told_too():
    net = Detector()
    y = targets(net)

    def model(x):
        return net(x + 1e-2 * torch.randn_like(x))

    with pytest.warns(UserWarning, match="the model is random"):
        judged(model, [y[:8], y[8:16], y[16:]], loss=of_boxes, correct=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_draws_nothing_is_not_told(dtype):
    net = linear().to(dtype)
    x = X.to(dtype)
    judged(net, net(x).argmax(1), x)

    calls = []

    def rounded(x):  # another kernel at each call
        calls.append(x)
        return net(x) * (1 + (len(calls) % 2) * torch.finfo(dtype).eps)

    judged(rounded, net(x).argmax(1), x)
    judged(lambda x: net(x) * torch.nan, torch.zeros(20), x, attack=lambda m, x, y: x, correct=none)


def none(output, y):
    return torch.zeros(len(y), dtype=torch.bool)


def by_itself(**settings):
    torch.manual_seed(0)
    front = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, **settings), nn.ReLU()
    return nn.Sequential(*front, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


@pytest.mark.parametrize("kind", ["logits", "a dict", "a list"])
def test_a_model_that_looks_at_the_other_images_of_a_batch_is_told_once(kind):
    def answers(net):
        return lambda x: {"logits": net(x), "a dict": {"out": net(x)}, "a list": [*net(x)]}[kind]

    def correct(output, y):
        z = output["out"] if kind == "a dict" else output
        return (torch.stack([*z]) - y).abs().amax(1) < 1e-3

    def judge(net, x=X):
        z = net(x).detach()
        settings = {"size": 20, "attack": lambda model, x, y: x}
        if kind == "logits":
            return judged(answers(net), z.argmax(1), x, **settings)
        return judged(answers(net), z, x, correct=correct, **settings)

    with pytest.warns(UserWarning, match="depend on the other images of a batch") as told:
        judge(by_itself(track_running_stats=False))
    assert len(told) == 1
    judge(by_itself())
    judge(by_itself(track_running_stats=False), X[:1])  # beside none


# torch hides this warning of its own compiler where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_that_rounds_otherwise_is_not_taken_for_random():
    torch._dynamo.reset()
    net = linear()

    def backend(graph, inputs):
        return lambda *args: [out * (1 + 0.02 * (out > 0)) for out in graph(*args)]

    y = net(X).argmax(1)
    keep = {"size": 20, "attack": lambda model, x, y: x}
    assert judged(torch.compile(net, backend=backend), y, **keep).clean == 1
    noisy = torch.compile(Noisy(1.0), backend="eager")
    with pytest.warns(UserWarning, match="the model is random"):
        judged(noisy, y, **keep)


def test_only_an_evaluation_asks_again_and_beside_other_images():
    net, calls = linear(), []

    def model(x):
        calls.append(len(x))
        return net(x)

    y = net(X).argmax(1)
    pgd(model, X, y, THREAT, steps=3)
    assert len(calls) == 3
    calls.clear()
    judged(model, y, size=20, attack=lambda model, x, y: x)
    assert calls == [20] * 4  # clean, again, beside others, after the attack


def test_samples_average_gradients_and_answers():
    net = Noisy(0.3)
    y = net.net(X).argmax(1)
    calls = []

    def model(x):
        calls.append(x.requires_grad)
        return net(x)

    pgd(model, X, y, THREAT, steps=3, samples=5, restarts=2)
    assert calls.count(True) == 2 * 3 * 5
    assert calls.count(False) == 2 * 5
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = judged(model, y, size=20, samples=5, attack=lambda model, x, y: x)
    assert calls == [False] * 10
    assert "samples" not in str(result)
    assert "samples=5" in judged(net, y, samples=5).attack


def test_the_gradient_of_more_samples_is_nearer_to_that_of_the_expectation():
    net = linear()
    y = net(X).argmax(1)

    def masked(x):  # its expectation is net
        return net(x * 2 * (torch.rand_like(x) < 0.5))

    settings = {"steps": 1, "step_size": EPS, "random_start": False, "loss": margin}
    exact = pgd(net, X, y, THREAT, **settings)
    torch.manual_seed(0)
    agree = [
        (pgd(masked, X, y, THREAT, samples=k, **settings) == exact).double().mean()
        for k in (1, 200)
    ]
    assert agree[0] < 0.9 < agree[1]


def margin(z, y):
    """Against a class that noise does not choose."""
    return z.gather(1, (y[:, None] + 1) % 10)[:, 0] - z.gather(1, y[:, None])[:, 0]


def test_most_answers_decide_over_a_random_model():
    net, calls = linear(), []

    def moody(x):  # wrong each third time
        calls.append(x)
        return net(x) * (-1 if len(calls) % 3 == 0 else 1)

    y = net(X).argmax(1)
    result = judged(moody, y, size=20, samples=3, attack=lambda model, x, y: x)
    assert (result.clean, result.robust) == (1, 1)

    def shares(z, y):
        return (z.argmax(1) == y).float()

    result = judged(moody, y, size=20, samples=3, correct=shares, attack=lambda model, x, y: x)
    assert result.clean == pytest.approx(2 / 3)
