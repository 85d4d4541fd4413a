"""A folder of JPEG files that cost what photographs cost to decode, and a loader that augments them."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms.functional import to_pil_image

HEIGHT, WIDTH = 375, 500  # the commonest size of ImageNet


def write(folder: Path, count: int) -> None:
    """Images in two classes: noise with the spectrum of photographs, whose amplitude falls as 1/f."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.fft.fftfreq(HEIGHT)[:, None], torch.fft.rfftfreq(WIDTH)
    frequency = torch.hypot(rows, columns).clamp(min=1 / WIDTH)
    for index in range(count):
        noise = torch.randn(3, *frequency.shape, generator=generator, dtype=torch.complex64)
        image = torch.fft.irfft2(noise / frequency, (HEIGHT, WIDTH))
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = (0.5 + 0.2 * image / image.std()).clamp(0, 1)
        to_pil_image(image).save(path, quality=90)


def loader(folder: Path, size: int, batch_size: int, workers: int, pin_memory: bool) -> DataLoader:
    """Crops of random size, with RandAugment."""
    steps = [transforms.RandomResizedCrop(size), transforms.RandAugment(), transforms.ToTensor()]
    return DataLoader(
        datasets.ImageFolder(folder, transforms.Compose(steps)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )
