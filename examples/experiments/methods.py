"""The ways to train that the experiments compare: settings of `FreeAdversarial`, and two attacks of others for their cost.

The loop stays as it is, whichever it is.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from options import at_least, fraction, radius
from torch import Tensor, nn
from torch.nn import functional

from free_adv import FreeAdversarial

SETTINGS: dict[str, dict[str, Any]] = {  # `step` in radii
    "free": {},
    # A step of 1.25 eps from a random start (Wong et al. 2020).
    "fgsm-rs": {"replays": 1, "ascents": 1, "start": "uniform", "step": 1.25},
    # A step of eps from noise of up to 2 eps that no ball holds (de Jorge et al. 2022).
    "n-fgsm": {"replays": 1, "ascents": 1, "start": "zero", "noise": 2.0},
    "pgd": {"replays": 1, "ascents": 7, "start": "uniform", "step": 0.25},  # PGD-7
}
METHODS = "natural", *SETTINGS, "free-public", "pgd-plain"
ASSIGNED = {"eps": radius, "step_size": fraction, "ascents": at_least(0), "noise": fraction}
Batches = Iterable[tuple[Tensor, Tensor]]


def add_arguments(parser: argparse.ArgumentParser, replays: int, eps: str) -> None:
    """The arguments of the methods; `complete` gives those that are left out their defaults."""
    add, whole, count = parser.add_argument, at_least(1), at_least(0)
    own = "(default: that of --method)"
    add("--replays", type=whole, help=f"the paper's m (default: {replays}, or that of --method)")
    add("--window", type=whole, default=1, help="minibatches that take turns")
    add("--eps", type=radius, default=eps, help="linf radius, pixels in [0, 1]")
    add("--step-size", type=fraction, help=f"ascent step, in the units of --eps {own}")
    add("--start", choices=["carry", "zero", "uniform"], help=f"delta of a minibatch {own}")
    add("--ascents", type=count, help=f"of delta alone, before a minibatch {own}")
    add("--noise", type=fraction, help=f"beside delta, in radii {own}")
    later = "from this share of the cost on: --later 0.3 ascents=1 noise=2; may be given again"
    add(
        "--later",
        nargs="+",
        action="append",
        default=[],
        metavar=("SHARE", "NAME=VALUE"),
        help=later,
    )
    cost = "what an ascent costs, in updates: more ascents make fewer updates; 0 for as many"
    add("--ascent-cost", type=fraction, default="2/3", help=cost)


def settings_of(method: str, eps: float, replays: int) -> dict[str, Any]:
    """The arguments of `FreeAdversarial` that a method is, with the paper's m where it has none of its own."""
    usual = {"start": "carry", "ascents": 0, "noise": 0.0, "step": None}
    found = {"eps": eps, "replays": replays, **usual, **SETTINGS.get(method, {})}
    step = found.pop("step")
    return {**found, "step_size": None if step is None else step * eps}


def complete(args: argparse.Namespace, replays: int) -> None:
    """Give what was not asked for the value of its method."""
    for name, value in settings_of(args.method, args.eps, replays).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def plan(args: argparse.Namespace, updates: float) -> tuple[int, dict[int, dict[str, Any]]]:
    """How many updates a run makes, and what is assigned to `FreeAdversarial` behind which of them.

    Args:
        args: With those of `add_arguments`, complete.
        updates: How many natural training makes at that cost.

    Raises:
        SystemExit: `--later` cannot be read.
    """
    made, begin, ascents = 0.0, 0.0, args.ascents
    changes: dict[int, dict[str, Any]] = {}
    for share, *texts in [*args.later, ["1"]]:
        end = fraction(share)
        if not begin <= end <= 1:
            raise SystemExit(f"--later {share}: shares rise, from 0 to 1")
        made += (end - begin) * updates / (1 + args.ascent_cost * ascents / args.replays)
        change = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name not in ASSIGNED:
                raise SystemExit(f"--later {share} {text}: NAME=VALUE of {', '.join(ASSIGNED)}")
            change[name] = ASSIGNED[name](value)
        ascents = change.get("ascents", ascents)
        if change:
            changes.setdefault(round(made), {}).update(change)
        begin = end
    return round(made), changes


def change(free: FreeAdversarial, settings: dict[str, Any]) -> None:
    """Assign what holds from now on."""
    for name, value in settings.items():
        setattr(free, name, value)


def batches(
    method: str,
    loader: Batches,
    free: FreeAdversarial,
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager],
) -> Batches:
    """The batches that `method` trains on, in a loop that makes one update with each.

    Args:
        method: "natural"; one of `SETTINGS`; "free-public", the way of the public ImageNet implementation,
            which clamps inside the graph; "pgd-plain", PGD-7 whose steps call `loss.backward()`.
        loader: Yields images in the threat model's units, and labels.
        free: The object whose `replay` is used, with the settings of the method; it has no optimizer.
        model: Maps images to logits, for "pgd-plain".
        autocast: Makes the context in which "pgd-plain" runs it.
    """
    if method in SETTINGS:
        return free.replay(loader)
    if method == "natural":
        return loader
    return (
        _Public(loader, free) if method == "free-public" else _Plain(loader, free, model, autocast)
    )


def updates_per_batch(method: str, replays: int) -> int:
    """How many updates are made with each batch of the loader."""
    return 1 if method in ("natural", "pgd-plain") else replays


class _Public:
    """Noise is added and clamped in the graph, so that its gradient passes the clamp's."""

    def __init__(self, loader: Batches, free: FreeAdversarial) -> None:
        self.loader, self.threat, self.replays = loader, free.threat, free.replays
        self.delta: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        eps, (low, high) = self.threat.eps, self.threat.bounds
        for x, y in self.loader:
            if self.delta is None:
                self.delta = torch.zeros_like(x)
            delta = self.delta[: len(x)]
            for _ in range(self.replays):
                noise = delta.detach().requires_grad_()
                yield (x + noise).clamp(low, high), y
                delta += eps * noise.grad.sign()
                delta.clamp_(-eps, eps)


class _Plain:
    """PGD-7 by `loss.backward()`, which computes the parameters' gradients too and throws them away."""

    def __init__(
        self,
        loader: Batches,
        free: FreeAdversarial,
        model: nn.Module,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.loader, self.threat, self.model, self.autocast = loader, free.threat, model, autocast

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        eps, (low, high) = self.threat.eps, self.threat.bounds
        for x, y in self.loader:
            delta = torch.empty_like(x)
            self.threat.randomise(delta)
            for _ in range(7):
                x_adv = (x + delta).clamp(low, high).requires_grad_()
                with self.autocast():
                    loss = functional.cross_entropy(self.model(x_adv), y)
                loss.backward()
                delta = (delta + eps / 4 * x_adv.grad.sign()).clamp(-eps, eps)
            self.model.zero_grad()
            yield (x + delta).clamp(low, high), y
