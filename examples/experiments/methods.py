"""The ways to train that the experiments compare. Each is a loader round the loader: the loop stays as it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional

from free_adv import FreeAdversarial, ThreatModel, pgd

METHODS = "natural", "free", "pgd", "fgsm-rs", "n-fgsm", "free-public", "pgd-plain"
Batches = Iterable[tuple[Tensor, Tensor]]


def batches(
    method: str,
    loader: Batches,
    model: nn.Module,
    threat: ThreatModel,
    free: FreeAdversarial,
    replays: int,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager],
) -> Batches:
    """The batches that `method` trains on, in a loop that makes one update with each.

    Args:
        method: "natural"; "free"; "pgd", PGD-7 with steps of eps / 4; "fgsm-rs", one step of 1.25 eps from a
            uniform start (Wong et al. 2020); "n-fgsm", a step of eps from noise of up to 2 eps, not held in the
            ball (de Jorge et al. 2022); "free-public", the way of the public ImageNet implementation,
            which clamps inside the graph; "pgd-plain", PGD-7 whose steps call `loss.backward()`.
        loader: Yields images in the threat model's units, and labels.
        model: Maps them to logits.
        threat: The threat model.
        free: The object whose `replay` "free" uses; it has no optimizer.
        replays: m of "free-public".
        generator: Source of the random starts.
        autocast: Makes the context in which an attack runs the model.
    """
    if method == "free":
        return free.replay(loader)
    if method == "free-public":
        return _Public(loader, threat, replays)
    if method == "natural":
        return loader
    steps, size = (1, 1.25 * threat.eps) if method == "fgsm-rs" else (7, threat.eps / 4)
    attack = {"pgd": pgd, "fgsm-rs": pgd, "n-fgsm": _n_fgsm, "pgd-plain": _plain_pgd}[method]

    def attacked(x: Tensor, y: Tensor) -> Tensor:
        with autocast():
            return attack(model, x, y, threat, steps=steps, step_size=size, generator=generator)

    return _Attacked(loader, attacked)


def updates_per_batch(method: str, replays: int) -> int:
    """How many updates are made with each batch of the loader."""
    return replays if method.startswith("free") else 1


class _Attacked:
    """Each batch attacked as it comes."""

    def __init__(self, loader: Batches, attack: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loader, self.attack = loader, attack

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            yield self.attack(x, y), y


class _Public:
    """Noise is added and clamped in the graph, so that its gradient passes the clamp's."""

    def __init__(self, loader: Batches, threat: ThreatModel, replays: int) -> None:
        self.loader, self.threat, self.replays = loader, threat, replays
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


def _n_fgsm(model, x, y, threat, *, steps, step_size, generator) -> Tensor:
    """Noise FGSM, in the training mode of the model."""
    low, high = threat.bounds
    noise = torch.empty_like(x).uniform_(-2 * threat.eps, 2 * threat.eps, generator=generator)
    noisy = (x + noise).clamp(low, high).requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(functional.cross_entropy(model(noisy), y), noisy)
    return (noisy.detach() + threat.eps * grad.sign()).clamp(low, high)


def _plain_pgd(model, x, y, threat, *, steps, step_size, generator) -> Tensor:
    """Steps by `loss.backward()`, which computes the parameters' gradients too and throws them away."""
    delta = torch.empty_like(x)
    threat.randomise(delta, generator)
    low, high = threat.bounds
    mode = model.training
    model.eval()
    for _ in range(steps):
        x_adv = (x + delta).clamp(low, high).requires_grad_()
        functional.cross_entropy(model(x_adv), y).backward()
        delta = (x_adv.detach() + step_size * x_adv.grad.sign() - x).clamp(-threat.eps, threat.eps)
    model.zero_grad()
    model.train(mode)
    return (x + delta).clamp(low, high)
