"""The networks and the augmentation that the CIFAR examples share."""

import nets
import pytest
import torch


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.17),
        ("preactresnet18", 11.17),
        ("wrn-16-4", 2.75),
        ("wrn-28-10", 36.48),
        ("wrn-34-10", 46.16),
        ("resnet50", 23.53),
    ],
)
def test_a_network_has_the_parameters_that_the_literature_gives_it(name, millions):
    with torch.device("meta"):
        model = nets.create(name, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "wrn-10-1"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_network_keeps_the_resolution_of_small_images_until_its_second_stage(name, activation):
    model = nets.create(name, 7, activation).eval()
    sides = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: sides.append(out.shape[-1]))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert sides[:3] == [32, 32, 32]
    assert min(sides) == (8 if "wrn" in name else 4)
    kinds = {type(m) for m in model.modules()} & {torch.nn.ReLU, torch.nn.SiLU}
    assert kinds == {torch.nn.ReLU if activation == "relu" else torch.nn.SiLU}


def test_a_wide_network_of_impossible_depth_is_refused():
    with pytest.raises(ValueError, match="6 n"):
        nets.create("wrn-32-10", 10)


def test_an_augmented_image_is_a_window_of_the_padded_image_or_of_its_mirror():
    x = torch.rand(24, 3, 6, 6)
    out = nets.augment(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for image, source in zip(out, padded, strict=True):
        windows = source.unfold(1, 6, 1).unfold(2, 6, 1).permute(1, 2, 0, 3, 4)
        places = [
            (windows == image).flatten(2).all(2),
            (windows == image.flip(2)).flatten(2).all(2),
        ]
        assert sum(p.any() for p in places) == 1
        seen.add((places[1].any().item(), *sum(places).nonzero()[0].tolist()))
    assert len(seen) > 12  # each in its own way


def test_the_augmentation_is_that_of_its_generator():
    x = torch.rand(8, 3, 6, 6)
    one, two = (nets.augment(x, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(one, nets.augment(x, torch.Generator().manual_seed(0)))
    assert not torch.equal(one, two)
