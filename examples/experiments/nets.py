"""The networks of the CIFAR literature, and any of timm's, by name."""

import functools
import re
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[], nn.Module]
ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.ReLU,
    "leaky": functools.partial(nn.LeakyReLU, 0.1),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class Block(nn.Module):
    """Two convolutions, each after batch norm and activation (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, channels: int, width: int, stride: int, act: Activation) -> None:
        super().__init__()
        self.norm1, self.act1 = nn.BatchNorm2d(channels), act()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm2, self.act2 = nn.BatchNorm2d(width), act()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = stride == 1 and channels == width
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(out)
        return x + self.conv2(self.act2(self.norm2(self.conv1(out))))


class PreActResNet(nn.Module):
    """A residual network for 32x32 images; each stage after the first halves the sides."""

    def __init__(
        self, stem: int, widths: list[int], depth: int, classes: int, act: Activation
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1, bias=False)]
        channels = stem
        for stage, width in enumerate(widths):
            for i in range(depth):
                layers.append(Block(channels, width, 2 if stage and i == 0 else 1, act))
                channels = width
        layers += [nn.BatchNorm2d(channels), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Standardise(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def cnn(width: int, classes: int, act: Activation) -> nn.Module:
    """Four convolutions that a CPU can train: 12 million multiplications for a 32x32 image at width 32."""
    layers: list[nn.Module] = []
    channels = 3
    for out, stride in ((width, 2), (2 * width, 1), (2 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), act()]
        channels = out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def create(
    name: str, classes: int, activation: str = "relu", pretrained: bool = False
) -> nn.Module:
    """A network with random weights, or timm's pretrained ones.

    Args:
        name: "resnet18" (with a 3x3 stem), "preactresnet18", "preactresnet-<width>-<blocks>" (four stages, each twice as
            wide as the one before), "wrn-<depth>-<width>", "cnn-<width>", or any of timm's.
            What the paper calls WRN-32-10, with 5 blocks a stage, is "wrn-34-10" by the usual count.
        classes: The number of outputs.
        activation: "relu", "leaky" (slope 0.1), "silu" or "gelu"; timm's models keep their own.
        pretrained: Download timm's weights; for timm's models only.
    """
    ours = re.fullmatch(r"wrn-\d+-\d+|cnn-\d+|preactresnet(18|-\d+-\d+)|resnet18", name)
    if pretrained and ours:
        raise ValueError(f"there are no pretrained weights for {name}; use a name of timm's")
    act = ACTIVATIONS[activation]
    if wide := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, width = map(int, wide.groups())
        if (depth - 4) % 6:
            raise ValueError(f"the depth of a WRN is 6 n + 4, got {depth}; for example wrn-28-10")
        return PreActResNet(
            16, [16 * width, 32 * width, 64 * width], (depth - 4) // 6, classes, act
        )
    if small := re.fullmatch(r"cnn-(\d+)", name):
        return cnn(int(small[1]), classes, act)
    if residual := re.fullmatch(r"preactresnet-(\d+)-(\d+)", name.replace("t18", "t-64-2")):
        width, blocks = map(int, residual.groups())
        return PreActResNet(width, [width * 2**stage for stage in range(4)], blocks, classes, act)
    if name == "resnet18":
        model = timm.create_model("resnet18", num_classes=classes, act_layer=act)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model
    return timm.create_model(name, pretrained=pretrained, num_classes=classes)


def augment(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Pad, crop at random, flip half of them: images of shape (N, C, H, W), each in its own way."""
    n, _, height, width = x.shape
    device = x.device
    padded = functional.pad(x, (pad, pad, pad, pad))
    rows, columns = (
        torch.randint(2 * pad + 1, (n, 1), generator=generator).to(device) for _ in range(2)
    )
    flip = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
    ys = rows + torch.arange(height, device=device)
    along = torch.arange(width, device=device)
    xs = columns + torch.where(flip, width - 1 - along, along)
    index = torch.arange(n, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
