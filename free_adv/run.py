"""An evaluation under way: images go through the attacks in turn, in batches of few sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler

from free_adv.checks import describe
from free_adv.model import Model, labels, logits, undisturbed
from free_adv.threat import ThreatModel

Attack = Callable[[Any, Tensor, Tensor], Tensor]


@dataclasses.dataclass
class Round:
    """One attack, and the images that wait for it, so that it sees batches of few sizes.

    Attributes:
        attack: Maps a model, inputs and labels (and the restart of each, if not foreign) to adversarial inputs.
        label: Under which its result stands; several rounds, such as restarts, may share one.
        foreign: Whether it is not of this library: it gets copies, and what it returns is checked.
        start: Which restart it is.
        waiting: Inputs, labels and numbers of the images.
        fooled: How many it has fooled.
    """

    attack: Callable[..., Tensor]
    label: str
    foreign: bool = True
    start: int = 0
    waiting: list[tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list)
    fooled: int = 0

    def take(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first images that wait."""
        parts = [torch.cat(part) for part in zip(*self.waiting, strict=True)]
        x, y, number = parts
        self.waiting = [(x[size:], y[size:], number[size:])] if len(y) > size else []
        return x[:size], y[:size], number[:size]

    def __len__(self) -> int:
        return sum(len(y) for _, y, _ in self.waiting)


class Run:
    """Images on their way through the rounds."""

    def __init__(
        self, model: Model, threat: ThreatModel, rounds: list[Round], autocast: torch.dtype | None
    ) -> None:
        self.model, self.threat, self.rounds, self.autocast = model, threat, rounds, autocast
        self.count = 0
        self.size = 0  # of a batch: that of the first one
        self.device: torch.device | None = None
        self.right = [torch.zeros(0, dtype=torch.bool)]  # by image, on the CPU
        self.standing = [torch.zeros(0, dtype=torch.long)]  # which images no attack has fooled

    def over(
        self, loader: Iterable[Any], device: Any, sharded: bool, progress: bool, name: str
    ) -> None:
        """Evaluate all batches."""
        foreign = any(r.foreign for r in self.rounds)
        place = torch.device("cpu") if device is None else torch.device(device)
        most = share(loader) if sharded else None
        self.bar = bar(loader, name, progress and not (sharded and distributed.get_rank()))
        with undisturbed(self.model, place, foreign) as self.still, self.bar:
            for batch in loader:
                if not isinstance(batch, list | tuple) or len(batch) != 2:
                    raise ValueError(
                        f"the loader must yield (x, y), got a {type(batch).__name__}; "
                        "for other batches pass a generator, ((b['image'], b['label']) for b in loader)"
                    )
                x, y = batch
                self.batch(x if device is None else x.to(device), y, most)
                self.bar.update()
            for i in range(len(self.rounds)):
                self.attack(i, everything=True)

    def batch(self, x: Tensor, y: Any, most: int | None) -> None:
        """The clean images of a batch; those that are right begin the rounds."""
        if not self.device:
            self.threat.check(x, doubts=True)
        self.device, self.size = x.device, self.size or len(x)
        answer = self.answer(x)
        y = labels(y, len(x), answer.shape[1], x.device)
        right = torch.logical_and(answer.argmax(1) == y, ~answer.isnan().any(1))
        if most is not None:  # a repeat, with which a sampler makes the shares of ranks equal
            x, y, right = (t[: max(0, most - self.count)] for t in (x, y, right))
        numbers = torch.arange(self.count, self.count + len(x), device=x.device)
        self.count += len(x)
        self.right.append(right.cpu())
        self.push(0, x[right], y[right], numbers[right])

    def push(self, i: int, x: Tensor, y: Tensor, number: Tensor) -> None:
        """Images before round `i`, or behind the last."""
        if i == len(self.rounds):
            self.standing.append(number.cpu())
            return
        waiting = self.rounds[i].waiting
        if waiting and (waiting[0][0].shape[1:], waiting[0][0].dtype) != (x.shape[1:], x.dtype):
            for k in range(i, len(self.rounds)):  # batches are of one shape
                self.attack(k, everything=True)
        if len(y):
            self.rounds[i].waiting.append((x, y, number))
        self.attack(i)

    def attack(self, i: int, everything: bool = False) -> None:
        """Round `i` for full batches, and for the rest in the end."""
        this = self.rounds[i]
        self.bar.set_postfix_str(this.label)
        while (n := len(this)) and (everything or n >= self.size):
            x, y, number = this.take(self.size)
            ends = i + 1
            if n >= self.size or this.foreign:
                stands = self.judge(this, x, y, torch.full_like(y, this.start))
            else:  # the rest makes its other starts at once, which fills batches
                later = (
                    k for k in range(i, len(self.rounds)) if self.rounds[k].label != this.label
                )
                ends = next(later, len(self.rounds))
                starts = ends - i
                start = this.start + torch.arange(starts, device=y.device).repeat_interleave(n)
                many = x.repeat(starts, *[1] * (x.ndim - 1)), y.repeat(starts)
                stands = self.padded(this, *many, start)
                stands = stands.view(starts, n).all(0)
            this.fooled += len(y) - int(stands.sum())
            self.push(ends, x[stands], y[stands], number[stands])

    def padded(self, this: Round, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """`judge` in full batches and eighths of one, the last filled up, so that there are two sizes."""
        found, eighth = [], -(-self.size // 8)
        while len(y):
            n = self.size if len(y) >= self.size else eighth
            fill = torch.arange(n, device=y.device) % len(y)
            found.append(self.judge(this, x[fill], y[fill], start[fill])[: len(y)])
            x, y, start = x[n:], y[n:], start[n:]
        return torch.cat(found)

    def judge(self, this: Round, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """Which images stand an attack."""
        with self.precision(x):
            given = (x.clone(), y.clone()) if this.foreign else (x, y, start)
            x_adv = this.attack(self.model, *given)
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
            got = describe(x_adv) if isinstance(x_adv, Tensor) else f"a {type(x_adv).__name__}"
            raise TypeError(
                f"attack {this.label} must return a tensor of the shape of x, {tuple(x.shape)}, got {got}"
            )
        x_adv = x_adv.detach().to(x.dtype)
        if this.foreign:
            refuse_outside(self.threat, x, x_adv, this.label)
        self.still()
        answer = self.answer(x_adv)
        return torch.logical_and(answer.argmax(1) == y, ~answer.isnan().any(1))

    def answer(self, x: Tensor) -> Tensor:
        """The logits of a batch."""
        with torch.no_grad(), self.precision(x):
            return logits(self.model(x), len(x))

    def precision(self, x: Tensor) -> torch.autocast:
        """The context in which the model runs."""
        return torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None)


def refuse_outside(threat: ThreatModel, x: Tensor, x_adv: Tensor, name: str) -> None:
    """Refuse adversarial inputs that the threat model does not contain: most often eps in wrong units."""
    delta = threat.displacement(x, x_adv)
    farthest = threat.distance(delta).max().item()
    slack = 1e-4 + 4 * torch.finfo(x.dtype).eps
    if not farthest <= threat.eps * (1 + slack) + slack * 1e-2:
        raise ValueError(
            f"attack {name} moved an input by {farthest:.4g} in {threat.norm}, but eps is "
            f"{threat.eps:.4g}; give it eps in pixel units and the loader's mean and std"
        )
    if not torch.allclose(threat.perturb(x, delta), x_adv, rtol=slack, atol=slack):
        cure = "give it the bounds of the threat model, in the loader's units"
        raise ValueError(f"attack {name} left bounds {threat.bounds}; {cure}")


def share(loader: Any) -> int | None:
    """How many images of a rank's share are not repeats of others; None if there is no telling."""
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", getattr(loader, "sampler", None))
    if not isinstance(loader, DataLoader) or not isinstance(sampler, DistributedSampler):
        return None
    images, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
    return min(len(sampler), len(range(sampler.rank, images, ranks)))


class NoBar(contextlib.nullcontext[None]):
    """In place of a bar."""

    def update(self, *_: str) -> None:
        """Show nothing."""

    set_postfix_str = update


def bar(loader: Any, name: str, progress: bool) -> Any:
    """A bar over the batches, where there is a terminal or a notebook to show it."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return NoBar()
    if not progress or not ("notebook" in tqdm.__module__ or sys.stderr.isatty()):
        return NoBar()
    total = len(loader) if hasattr(loader, "__len__") else None
    return tqdm(total=total, desc=name, leave=False)
