"""Image folders and tar shards whose position in training is one number, so that a resumed job sees what it would have.

The batches of a job are numbered through all its epochs. Which images are in a batch and how they are augmented follows
from the seed and that number alone, so a loader can begin at any of them without decoding those before.
"""

import itertools
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

BUFFER = 1000  # encoded images of a shard stream that are shuffled


def seed_of(*numbers: int) -> int:
    """One seed from several numbers; neighbours do not get neighbouring seeds."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1)[0])


def transforms(size: int, resize: int) -> tuple[v2.Compose, v2.Compose]:
    """From an image to bytes of shape (3, size, size): for training, and for evaluation."""
    train = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    return v2.Compose(train), v2.Compose([v2.Resize(resize), v2.CenterCrop(size), v2.PILToTensor()])


def class_folders(argument: str, folder: Path, transform: v2.Compose | None = None) -> ImageFolder:
    """The images of a folder with a folder for each class.

    Raises:
        SystemExit: There is nothing to read, and which `argument` says so.
    """
    if not folder.is_dir():
        raise SystemExit(f"{argument}: there is no folder {folder}")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise SystemExit(
            f"{argument}: {folder} has no folders; it needs one for each class, with its images"
        )
    found = ImageFolder(folder, transform, allow_empty=True)
    filled = set(found.targets)
    if empty := [name for name, label in found.class_to_idx.items() if label not in filled]:
        names = ", ".join(empty[:5]) + (" and others" if len(empty) > 5 else "")
        raise SystemExit(
            f"{argument}: no images in {folder} for {names}; put some there, or remove the folder"
        )
    return found


@dataclass(frozen=True)
class Plan:
    """Which batches a rank reads: from number `first` to `stop`, `epoch` of them to an epoch."""

    size: int
    epoch: int
    first: int
    stop: int
    rank: int
    ranks: int
    seed: int

    def position(self, number: int) -> int:
        """Where in its epoch, counted in images, this rank's part of a batch begins."""
        return (number % self.epoch * self.ranks + self.rank) * self.size


class Images:
    """The images to train on and to evaluate on.

    Args:
        data: A folder with a folder for each class in train/ and val/, or the tar shards to train on, in braces.
        val: The folder of classes to evaluate on; None for val/ in `data`.
        count: How many images the shards hold.
        size: Pixels a side.
        resize: The shorter side before the centre crop.

    Raises:
        SystemExit: They do not fit together.
    """

    def __init__(
        self, data: str, val: str | None, count: int | None, size: int, resize: int
    ) -> None:
        self.augment, centre = transforms(size, resize)
        self.shards: list[str] = []
        if data.endswith(".tar"):
            from webdataset.shardlists import expand_urls

            if not (val and count):
                sys.exit(f"--data {data}: shards need --val FOLDER and --images COUNT")
            self.shards, self.count = list(expand_urls(data)), count
            missing = [url for url in self.shards if "://" not in url and not Path(url).is_file()]
            if missing:
                sys.exit(
                    f"--data {data}: there is no file {missing[0]}, the first of {len(missing)}"
                )
            self.val = class_folders(f"--val {val}", Path(val), centre)
            return
        self.folder = class_folders(f"--data {data}", Path(data) / "train")
        where = (f"--val {val}", Path(val)) if val else (f"--data {data}", Path(data) / "val")
        self.val = class_folders(*where, centre)
        if self.folder.classes != self.val.classes:
            only = sorted({*self.folder.classes} ^ {*self.val.classes})[:5]
            sys.exit(
                f"{where[0]}: {self.folder.root} and {self.val.root} have different classes; "
                f"in one of them only: {', '.join(only)}"
            )
        self.count = len(self.folder)

    def __len__(self) -> int:
        return self.count

    def demand(self, readers: int) -> None:
        """Make sure that there is a shard for each worker of each rank."""
        if self.shards and len(self.shards) < readers:
            sys.exit(
                f"{len(self.shards)} shards are too few for {readers} workers on all ranks: "
                "take fewer --workers, or cut the data into more shards"
            )

    def training(self, plan: Plan) -> dict[str, Any]:
        """What a DataLoader needs to read the batches of a plan."""
        if self.shards:
            shards = Shards(self.shards, self.augment, plan)
            return {"dataset": shards, "batch_size": plan.size}
        folder = Folder(self.folder, self.augment, plan.seed)
        return {"dataset": folder, "batch_sampler": Order(self.count, plan)}


class Folder(Dataset):
    """The images of an ImageFolder; an index is (epoch, index of the image)."""

    def __init__(self, folder: ImageFolder, transform: v2.Compose, seed: int) -> None:
        self.folder, self.transform, self.seed = folder, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        image, label = self.folder[key[1]]
        return _augment(self.transform, image, self.seed, *key), label


class Order:
    """A batch sampler of a Folder: each epoch is a permutation of its own."""

    def __init__(self, images: int, plan: Plan) -> None:
        self.images, self.plan = images, plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, current, order = self.plan, None, []
        for number in range(plan.first, plan.stop):
            if (epoch := number // plan.epoch) != current:
                generator = torch.Generator().manual_seed(seed_of(plan.seed, epoch))
                current, order = epoch, torch.randperm(self.images, generator=generator).tolist()
            start = plan.position(number)
            yield [(epoch, index) for index in order[start : start + plan.size]]


class Shards(IterableDataset):
    """The images of tar shards, in the format of webdataset: an image and its class number as `cls`.

    Every worker of every rank reads shards of its own, as often as it takes to fill its batches of the epoch: with
    uneven shards some images come twice in an epoch and others not at all.
    """

    def __init__(self, urls: list[str], transform: v2.Compose, plan: Plan) -> None:
        self.urls, self.transform, self.plan = urls, transform, plan

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        plan, current = self.plan, None
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples: Iterator[dict[str, Any]] = iter(())
        # The loader takes a batch of each worker in turn, beginning with the first.
        for number in range(plan.first + worker, plan.stop, workers):
            if (epoch := number // plan.epoch) != current:
                stream, begin = number % workers, epoch * plan.epoch
                before = len(range(begin + (stream - begin) % workers, number, workers))
                samples = self._stream(epoch, stream, workers)
                samples = itertools.islice(samples, before * plan.size, None)  # not decoded yet
                current = epoch
            start = plan.position(number)
            for place, sample in enumerate(itertools.islice(samples, plan.size), start):
                image = Image.open(BytesIO(_first(sample))).convert("RGB")
                yield _augment(self.transform, image, plan.seed, epoch, place), int(sample["cls"])

    def _stream(self, epoch: int, stream: int, streams: int) -> Iterator[dict[str, Any]]:
        import webdataset

        plan, urls = self.plan, sorted(self.urls)
        random.Random(seed_of(plan.seed, epoch)).shuffle(urls)
        mine = urls[plan.rank + plan.ranks * stream :: plan.ranks * streams]
        seed = seed_of(plan.seed, epoch, plan.rank, stream)
        split = {"nodesplitter": None, "workersplitter": None, "shardshuffle": False}
        raw = webdataset.WebDataset(mine, seed=seed, **split)
        return iter(raw.shuffle(BUFFER, initial=BUFFER, seed=seed).repeat())


def _first(sample: dict[str, Any]) -> bytes:
    return next(sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample)


def _augment(transform: v2.Compose, image: Image.Image, *numbers: int) -> Tensor:
    """Augmentation draws from torch's global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*numbers))
        return transform(image)


def ignore_signals(_: int) -> None:
    """For workers: Ctrl-C and SIGTERM may go to all processes, and the job needs its loader to finish an update."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Feed:
    """A loader of bytes, whose batches it gives as floats in [0, 1] on a device.

    Attributes:
        waited: Seconds in which the loader was waited for.
    """

    def __init__(self, loader: DataLoader, device: torch.device, layout: torch.memory_format):
        self.loader, self.device, self.layout, self.waited = loader, device, layout, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = time.perf_counter()
        for batch in self.loader:
            self.waited += time.perf_counter() - start
            x, y = (t.to(self.device, non_blocking=True) for t in batch)
            yield x.to(torch.float32, memory_format=self.layout) / 255, y
            start = time.perf_counter()
