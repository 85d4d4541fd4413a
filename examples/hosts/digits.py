"""scikit-learn's handwritten digits and a small network for them, shared by the hosts' scripts, compare.py and variants.py."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset


def train_set() -> TensorDataset:
    """1,437 images of 8x8 pixels in [0, 1], with their labels."""
    return _split()[0]


def test_set() -> TensorDataset:
    """The other 360."""
    return _split()[1]


def network() -> nn.Module:
    """Three blocks of convolution, batch norm and ReLU, and a linear layer."""
    blocks: list[nn.Module] = []
    for channels, width, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1)):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        blocks.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def _split() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    parts = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = parts
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)
