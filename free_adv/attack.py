"""Projected gradient descent, the attack that robust accuracy is measured with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from free_adv.checks import count, positive
from free_adv.threat import ThreatModel

Model = Callable[[Tensor], Tensor]


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial examples by projected gradient descent (Madry et al. 2018, arXiv 1706.06083).

    Each step moves along the steepest ascent of the loss inside the threat model, and projects onto the
    ball and the bounds. The model runs in evaluation mode and is left as it was found: its mode,
    parameter gradients, batch-norm statistics, and the global random state.

    Args:
        model: Maps a batch to logits of shape (N, classes).
        x: Inputs in the loader's units (normalised if `threat` has `mean` and `std`), shape (N, ...).
        y: Class indices, shape (N,).
        threat: The threat model, in pixel units.
        steps: Gradient steps of each restart.
        step_size: Length of a step in pixel units. None means `2.5 * eps / steps`, enough to cross the ball.
        restarts: How many starts are tried; of each sample the first example that fools the model is
            kept, and no other start tried, else that with the largest loss.
        loss: What ascends: "ce", the cross-entropy, or "cw", the margin `max_{j != y} z_j - z_y` of the logits
            (Carlini & Wagner 2017, arXiv 1608.04644).
        random_start: Start from a uniform draw from the ball; otherwise from `x` itself.
        generator: Source of the random starts. None draws the same ones at each call, from
            `torch.initial_seed()`. Give training its own generator.

    Returns:
        The adversarial inputs, in the units, shape and dtype of `x`.

    Raises:
        ValueError: A value is out of range, or `x` lies outside the bounds.
        TypeError: `x` is not a floating-point tensor.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
        >>> x_adv = pgd(model, x, y, ThreatModel(8 / 255), steps=10)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    steps, restarts = count("steps", steps), count("restarts", restarts)
    size = 2.5 * threat.eps / steps if step_size is None else positive("step_size", step_size)
    if loss not in LOSSES:
        raise ValueError(f"loss must be 'ce' or 'cw', got {loss!r}")
    threat.check(x)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(torch.initial_seed())
    x = x.detach()
    best, worst = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
    left = torch.arange(len(x), device=x.device)  # those that no start has fooled
    with undisturbed(model, x.device):
        for _ in range(restarts):
            delta = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if random_start:
                threat.randomise(delta, generator)
            rest, labels = (x, y) if len(left) == len(x) else (x[left], y[left])
            x_adv = threat.perturb(rest, delta[left])
            for _ in range(steps):
                x_adv.requires_grad_()
                (grad,) = torch.autograd.grad(LOSSES[loss](model(x_adv), labels).sum(), x_adv)
                x_adv = x_adv.detach()
                delta = threat.displacement(rest, x_adv)  # after the bounds
                threat.ascend(delta, grad, size)
                x_adv = threat.perturb(rest, delta)
            if restarts == 1:
                return x_adv
            with torch.no_grad():
                logits = model(x_adv)
            found = LOSSES[loss](logits, labels).to(worst.dtype).nan_to_num(nan=-torch.inf)
            fooled = logits.argmax(1) != labels
            better = fooled | (found > worst[left])
            best[left[better]] = x_adv[better]
            worst[left] = torch.maximum(found, worst[left])
            left = left[~fooled]
            if not len(left):
                break
    return best


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    rivals = logits.scatter(1, y[:, None], -torch.inf)
    return rivals.max(1).values - logits.gather(1, y[:, None])[:, 0]


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


LOSSES = {"ce": _cross_entropy, "cw": _margin}


@contextlib.contextmanager
def undisturbed(model: Any, device: torch.device) -> Iterator[None]:
    """Run a model in evaluation mode; leave modes, parameter gradients and random state as they were."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    grads = [p.grad for p in parameters]
    training = [module.training for module in modules]
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.enable_grad(),
    ):
        try:
            for module in modules:
                module.training = False
            for parameter in parameters:  # an attack's backward() would add to them
                parameter.grad = None
            yield
        finally:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            for module, mode in zip(modules, training, strict=True):
                module.training = mode
