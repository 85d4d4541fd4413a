"""Models of timm: every family, every mode, NaFlex batches, and timm's own mean and std."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm_models
import torch
from timm.data import resolve_model_data_config
from timm.data.naflex_dataset import NaFlexCollator, Patchify
from torch import nn
from torch.nn import functional

from free_adv import FreeAdversarial

SCRIPT = Path(__file__).parents[1] / "examples" / "hosts" / "timm_models.py"

SMALL = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_mambaout",
    "test_coatnet",
    "test_vit",
    "mobilenetv3_small_050",
    "regnetx_002",
    "efficientvit_b0",
    "fastvit_t8",
    "swin_tiny_patch4_window7_224",
    "gmlp_ti16_224",
    "levit_128s",
    "xcit_nano_12_p8_224",
]
NAFLEX = {"embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 10, "init_values": None}


@pytest.mark.parametrize("name", SMALL)
def test_every_family_goes_through_a_free_minibatch(name):
    result = timm_models.train(name, size=64)
    assert result.fault == ""
    assert result.pixels > 0.9


# torch.compile looks at the .grad of its inputs, which are no leaves, and hides the warning.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("mode", timm_models.MODES)
@pytest.mark.parametrize("name", ["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_every_mode_goes_through_a_free_minibatch(name, mode):
    result = timm_models.train(name, mode, size=64, backend="aot_eager")
    assert result.fault == ""
    assert result.supported
    assert result.pixels > 0.9


def test_a_naflex_model_takes_plain_images_too():
    result = timm_models.train("naflexvit_base_patch16_gap", size=64, **NAFLEX)
    assert result.fault == ""


def test_the_smallest_model_of_a_module_is_found():
    assert timm_models.smallest("starnet") == "starnet_s050"


@pytest.mark.slow
def test_the_example_sweeps_over_modules_and_fails_if_a_model_fails(capsys):
    command = [sys.executable, SCRIPT, "--sweep", "--only", "starnet", "--size", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1" in done.stdout

    assert not timm_models.report([("", "test_vit", "fp32"), ("", "vgg0", "fp32")], size=64)
    out = capsys.readouterr().out
    assert "RuntimeError: Unknown model (vgg0)" in out
    assert "1 of 2" in out


class Broken(nn.Module):
    """A model that a check must catch."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.scale = nn.Parameter(torch.ones(10), requires_grad=how != "frozen")
        self.loose = nn.Parameter(torch.ones(1))
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, x):
        x = x.detach() if self.how == "cut" else x
        out = x.mean((1, 2, 3))[:, None] * self.scale
        return {"infinite": out * torch.inf, "blind": out * 0}.get(self.how, out)


@pytest.mark.filterwarnings("ignore:the input gradient of", "ignore:none of the 1 weights")
@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("infinite", "the loss is not finite"),
        ("infinite", "weights are not finite"),
        ("blind", "delta does not reach eps"),
        ("frozen", "no weight has moved"),
    ],
)
def test_the_example_reports_what_is_wrong(how, fault, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: Broken(how))
    assert fault in timm_models.train("broken").fault


def test_the_example_reports_an_input_that_is_cut_off(monkeypatch, capsys):
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: Broken("cut"))
    assert not timm_models.report([("", "broken", "fp32")])
    assert "RuntimeError: the input received no gradient" in capsys.readouterr().out


class Normalized(nn.Module):
    """timm's normalisation moved from the loader into the model."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.mean, self.std = (torch.tensor(v).double()[:, None, None] for v in (mean, std))

    def forward(self, x):
        return self.model((x - self.mean) / self.std)


def tiny(name):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=10).double()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_mean_and_std_of_the_data_config_train_on_normalised_batches(name):
    raw, other = tiny(name), tiny(name)
    config = resolve_model_data_config(raw)
    mean, std = config["mean"], config["std"]
    inside = Normalized(other, mean, std)
    batches = [
        (torch.rand(2, *config["input_size"]).double(), torch.tensor([i, 3])) for i in (1, 2)
    ]
    normal = [((x - inside.mean) / inside.std, y) for x, y in batches]
    one = FreeAdversarial(torch.optim.SGD(raw.parameters(), 0.01), eps=0.1, mean=mean, std=std)
    two = FreeAdversarial(torch.optim.SGD(other.parameters(), 0.01), eps=0.1)
    for free, model, loader in ((one, raw, normal), (two, inside, batches)):
        torch.manual_seed(2)  # for stochastic depth
        for x, y in free.replay(loader):
            free.step(functional.cross_entropy(model(x), y))
    torch.testing.assert_close(one.delta, two.delta)
    for mine, theirs in zip(raw.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def naflex():
    torch.manual_seed(3)
    return timm.create_model("naflexvit_base_patch16_gap", patch_size=4, **NAFLEX).double()


def patches(fill=0.0, flat=True):
    """A batch as timm's NaFlex loader gives it: images of 3x5, 4x4 and 2x2 patches, padded to 18."""
    torch.manual_seed(4)
    patchify = Patchify(patch_size=4, flatten_patches=flat)
    images = [torch.rand(3, 4 * h, 4 * w) for h, w in ((3, 5), (4, 4), (2, 2))]
    batch, y = NaFlexCollator(max_seq_len=18)(
        [(patchify(image), i) for i, image in enumerate(images)]
    )
    batch["patches"] = ((batch["patches"].double() - 0.5) / 0.5).contiguous()
    batch["patches"][~batch["patch_valid"]] = fill
    return batch, y


def train_naflex(batch, y, flat=True, **arguments):
    """The delta after free training on one batch, whether each gradient left the pads out, the weights."""
    model = naflex()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    free = FreeAdversarial(optimizer, eps=0.1, key=(0, "patches"), **arguments)
    pads = ~batch["patch_valid"]
    for inputs, labels in free.replay([(batch, y)]):
        inputs["patches"].retain_grad()
        free.step(functional.cross_entropy(model(inputs), labels))
        grad = inputs["patches"].grad
        assert not grad[pads].any()
        assert grad[~pads].all()
    return free.delta, list(model.parameters())


@pytest.mark.parametrize("flat", [True, False])
def test_the_padding_of_a_naflex_batch_gets_no_gradient_and_no_delta(flat):
    batch, y = patches(flat=flat)
    assert batch["patches"].ndim == (3 if flat else 5)
    delta, _ = train_naflex(batch, y, mean=0.5, std=0.5)
    valid = batch["patch_valid"]
    assert valid.sum() == 15 + 16 + 4
    assert not delta[~valid].any()
    assert delta[valid].any()
    assert delta.abs().max() == pytest.approx(0.1)


def test_the_padding_of_a_naflex_batch_influences_nothing():
    zero, y = patches(fill=0.0)
    other, _ = patches(fill=0.7)
    assert not torch.equal(zero["patches"], other["patches"])
    delta, weights = train_naflex(zero, y, mean=0.5, std=0.5)
    delta2, weights2 = train_naflex(other, y, mean=0.5, std=0.5)
    torch.testing.assert_close(delta, delta2)
    torch.testing.assert_close(weights, weights2)


def test_mean_and_std_per_channel_are_refused_for_patches():
    batch, y = patches()
    with pytest.raises(ValueError, match="mean and std have 3 entries, but the channels"):
        train_naflex(batch, y, mean=(0.5,) * 3, std=(0.5,) * 3)
