"""An evaluation under way: a stream of images, of which each attack leaves fewer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler

from free_adv.batch import rebuilt
from free_adv.checks import describe
from free_adv.checks import inside as within_bounds
from free_adv.evaluation.attack import Descent
from free_adv.evaluation.foreign import inside
from free_adv.evaluation.subject import Subject, within
from free_adv.evaluation.task import Task, apart, as_input, form, joined, rows
from free_adv.hints import warn
from free_adv.threat import ThreatModel

Attack = Callable[[Any, Tensor, Any], Tensor]


@dataclass
class Images:
    """Some images on their way; their numbers and the starts that are behind them are on the CPU."""

    x: Tensor
    y: Any
    number: Tensor
    start: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(*(rows(column, index) for column in vars(self).values()))

    def __add__(self, other: Images) -> Images:
        return Images(*map(joined, vars(self).values(), vars(other).values()))


@dataclass
class Stage:
    """One attack on the images that all before it have left.

    Attributes:
        attack: PGD, or what maps a model, inputs and labels to adversarial inputs.
        label: Under which its result stands.
        lost: How much of the images it has taken: for a classifier, how many it has fooled.
    """

    attack: Attack | Descent
    label: str
    lost: float = 0.0

    @property
    def starts(self) -> int:
        """How often it tries."""
        return self.attack.restarts if isinstance(self.attack, Descent) else 1


class Share:
    """A rank's share of the images, without those that are repeated so that all shares are as long as one another."""

    def __init__(self, loader: Any) -> None:
        self.images = 0  # in the dataset; 0 if it does not say
        self.most: int | None = None
        self.accelerates: Any = None
        for inner in within(loader, DataLoader):
            if hasattr(inner.dataset, "__len__"):
                self.images = self.images or len(inner.dataset)
            if hasattr(inner, "end_of_dataloader"):
                even = getattr(inner.batch_sampler, "even_batches", True)
                self.accelerates = inner if even else None
        samplers = [*within(loader, DistributedSampler)]
        if len(samplers) == 1:
            (sampler,) = samplers
            images, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
            self.most = min(len(sampler), len(range(sampler.rank, images, ranks)))

    def fresh(self, seen: int, size: int) -> int:
        """How many images of the next batch are no repeats; `seen` have been before."""
        if self.most is not None:
            return max(0, min(size, self.most - seen))
        last = self.accelerates  # whose last batches hold so many images together, then repeats
        if last is not None and last.end_of_dataloader and last.remainder > 0:
            return int(max(0, min(size, last.remainder - distributed.get_rank() * size)))
        return size

    def summed(self, totals: list[float], place: torch.device) -> list[float]:
        """Totals of all ranks, of which the first is how many images they have; tell if these are too many."""
        where = "cpu" if distributed.get_backend() in ("gloo", "mpi", "undefined") else place
        sums = torch.tensor([*totals, self.images], dtype=torch.float64, device=where)
        distributed.all_reduce(sums)
        count, *others, together = sums.tolist()
        if 0 < self.images < count != together:
            warn(
                f"the ranks' shares hold {count:.0f} images together, their dataset {self.images}: some count twice, "
                "with which a loader makes shares equal. Give each rank its part of the dataset, "
                "Subset(data, range(rank, len(data), ranks)), or a DataLoader with a DistributedSampler, as it is"
            )
        return [count, *others]


class Run:
    """A model, what it is asked and attacked with, and what came of each image.

    Attributes:
        clean: How far the model has each image right, from 0 to 1, on the CPU.
        worst: The same under all attacks so far.
        whole: Whether an image is either right or wrong.
        size: Of a batch: that of the first one.
    """

    def __init__(
        self,
        subject: Subject,
        threat: ThreatModel,
        task: Task,
        autocast: torch.dtype | None,
        bar: Any,
    ) -> None:
        self.subject, self.threat, self.task, self.autocast = subject, threat, task, autocast
        self.bar = bar
        self.clean = self.worst = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.size, self.whole = 0, True
        self.device = subject.device  # that of the last batch

    def right(self, loader: Iterable[Any], device: Any, share: Share | None) -> Iterator[Images]:
        """The images that are right before any attack; no image of a share counts twice."""
        for batch in loader:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                several = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
                raise ValueError(
                    f"the loader must yield (x, y), got a {type(batch).__name__}{several}; "
                    "for other batches pass a generator, ((b['image'], b['label']) for b in loader)"
                )
            x = as_input(batch[0]) if device is None else as_input(batch[0]).to(device)
            self.threat.check(x, values=not self.size, doubts=True)
            if not len(x):
                continue
            if self.size and self.threat.bounds:  # a loader may mix images of 0..1 and of 0..255
                pixels, (lowest, highest) = self.threat.to_pixels(x), self.threat.bounds
                if ((pixels - lowest) / (highest - lowest) - 0.5).abs().max() > 2:
                    normalised = self.threat.std is not None
                    within_bounds(pixels, self.threat.bounds, describe(x), normalised)
            y, seen = self.task.truth(batch[1], len(x), x.device), len(self.clean)
            outputs = [*self.answers(x)]
            degree = self.degree(outputs, y)
            if not self.size and self.task.samples == 1:
                self.ask_again(x, y, outputs[0], degree)
            self.size, self.device = self.size or len(x), x.device
            degree = degree if share is None else degree[: share.fresh(seen, len(x))]
            self.clean, self.worst = (torch.cat([t, degree]) for t in (self.clean, self.worst))
            index = degree.nonzero()[:, 0]
            yield Images(rows(x, index), rows(y, index), index + seen, torch.zeros_like(index))
            self.bar.update()

    def ask_again(self, x: Tensor, y: Any, output: Any, degree: Tensor) -> None:
        """Tell of a model that answers differently twice, or differently beside other images."""
        fine = [torch.finfo(t).eps for t in (x.dtype, self.autocast) if t is not None]
        rounding = max(1e-4, 8 * max(*fine, 2**-10 if x.is_cuda else 0.0))  # of TF32
        for _ in range(1 + self.subject.eager):  # compiled code is compared with itself
            before, was = output, degree
            (output,) = self.answers(x)
            degree = self.degree([output], y)
            far, other = apart(before, output), int(((degree - was).abs() > 1e-3).sum())
            if far <= rounding and not other:
                break
        else:
            warn(
                f"the model is random: between two passes over the first batch its outputs differ by {far:.2g} of their "
                f"range, and {other} of {len(x)} images are judged otherwise. Each attack and each start then finds "
                "some wrong by chance: pass samples= (20, say), to attack and to judge by so many passes"
            )
            return
        few = torch.arange(len(x) - 1, -1, -1, device="cpu") // 8  # in a batch as large
        (beside,) = self.answers(rows(x, few))
        other = int(((self.degree([beside], rows(y, few)) - degree[few]).abs() > 1e-3).sum())
        known = isinstance(output, Tensor) and output.ndim and len(output) == len(x)
        far = apart(rows(output, few), beside, output) if known else 0.0
        if far > max(1e-2, rounding) or (other and not known):  # else ties of half precision
            warn(
                "the model's answers depend on the other images of a batch, as those of BatchNorm without running "
                f"statistics do, or of activations whose scale is the batch's: with an eighth of the first batch, repeated, its outputs differ by {far:.2g} of their "
                f"range, and {other} of {len(x)} images are judged otherwise. An attack puts images together anew, so "
                "that some are wrong by that alone: give such layers statistics of their own, or the loader "
                "batch_size=1"
            )

    def through(self, stage: Stage, images: Iterator[Images]) -> Iterator[Images]:
        """The images that stand an attack, from as many starts as it tries."""
        waiting: Images | None = None
        for new in images:
            new.start.zero_()
            if waiting and any(
                form(a) != form(b) for a, b in ((waiting.x, new.x), (waiting.y, new.y))
            ):
                yield from self.rest(stage, waiting)  # batches are of one shape
                waiting = None
            waiting = waiting + new if waiting else new
            while len(waiting) >= self.size:
                index = torch.arange(len(waiting), device="cpu")
                batch, waiting = waiting[index[: self.size]], waiting[index[self.size :]]
                batch = self.standing(stage, batch)
                batch.start += 1
                yield batch[batch.start == stage.starts]
                waiting += batch[batch.start < stage.starts]
        if waiting:
            yield from self.rest(stage, waiting)

    def rest(self, stage: Stage, images: Images) -> Iterator[Images]:
        """What is no full batch; of PGD all starts at once, in full batches and eighths of one, filled up."""
        if not isinstance(stage.attack, Descent):
            yield self.standing(stage, images)
            return
        start = images.start + torch.arange(stage.starts, device="cpu")[:, None]
        which, start = (start < stage.starts).nonzero()[:, 1], start[start < stage.starts]
        while (stands := self.worst[images.number[which]] > 0).any():
            which, start = which[stands], start[stands]
            n = self.size if len(which) >= self.size else -(-self.size // 8)
            filled = torch.arange(n, device="cpu") % len(which)
            batch = images[which[filled]]
            batch.start = start[filled]
            self.standing(stage, batch, len(which))
            which, start = which[n:], start[n:]
        yield images[self.worst[images.number] > 0]

    def standing(self, stage: Stage, images: Images, count: int | None = None) -> Images:
        """The images of a batch that stand an attack from one start each; what is behind `count` fills up only."""
        self.bar.set_postfix_str(stage.label)
        x, y = images.x, images.y
        with self.precision(x):
            if isinstance(stage.attack, Descent):
                delta, start = stage.attack.start(x), images.start.to(x.device)
                x_adv = stage.attack.climb(self.subject, x, y, delta, start)
            else:
                x_adv = stage.attack(self.subject.model, x.clone(), rebuilt(y))
                x_adv = inside(self.threat, x, x_adv, stage.label)
                self.subject.still()
        before = self.worst.sum()
        degree = self.degree(self.answers(x_adv), y)[:count]
        self.worst.scatter_reduce_(0, images.number[:count], degree, "amin")
        stage.lost += float(before - self.worst.sum())
        return images[self.worst[images.number] > 0]

    def answers(self, x: Tensor) -> Iterator[Any]:
        """What the model says of a batch, as often as it is asked."""
        for _ in range(self.task.samples):
            with torch.no_grad(), self.precision(x):
                output = self.subject(x)
            yield output

    def degree(self, outputs: Iterable[Any], y: Any) -> Tensor:
        """How far each image is right, on the CPU."""
        right = self.task.right(outputs, y)
        self.whole = self.whole and right.dtype == torch.bool
        return right.cpu().double()

    def precision(self, x: Tensor) -> torch.autocast:
        """The context in which the model runs."""
        return torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None)
