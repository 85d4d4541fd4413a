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
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial examples by projected gradient descent (Madry et al. 2018, arXiv 1706.06083).

    Each step moves along the steepest ascent of the cross-entropy inside the threat model, and projects onto
    the ball and the bounds. The model runs in evaluation mode and is left as it was found: its mode,
    parameter gradients, batch-norm statistics, and the global random state.

    Args:
        model: Maps a batch to logits of shape (N, classes).
        x: Inputs in the loader's units (normalised if `threat` has `mean` and `std`), shape (N, ...).
        y: Class indices, shape (N,).
        threat: The threat model, in pixel units.
        steps: Gradient steps of each restart.
        step_size: Length of a step in pixel units. None means `2.5 * eps / steps`, enough to cross the ball.
        restarts: How many starts are tried; of each sample the first example that fools the model is
            kept, else that with the largest loss.
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
    threat.check(x)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(torch.initial_seed())
    x = x.detach()
    best, worst = x.clone(), None
    with undisturbed(model, x.device):
        for _ in range(restarts):
            delta = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if random_start:
                threat.randomise(delta, generator)
            x_adv = threat.perturb(x, delta)
            for _ in range(steps):
                x_adv.requires_grad_()
                loss = functional.cross_entropy(model(x_adv), y, reduction="sum")
                (grad,) = torch.autograd.grad(loss, x_adv)
                x_adv = x_adv.detach()
                delta = threat.displacement(x, x_adv)  # after the bounds
                threat.ascend(delta, grad, size)
                x_adv = threat.perturb(x, delta)
            if restarts == 1:
                return x_adv
            with torch.no_grad():
                logits = model(x_adv)
                loss = functional.cross_entropy(logits, y, reduction="none")
            loss[logits.argmax(1) != y] = torch.inf  # fooled: no later restart can do better
            better = loss > worst if worst is not None else torch.ones_like(loss, dtype=torch.bool)
            worst = loss if worst is None else torch.where(better, loss, worst)
            best[better] = x_adv[better]
    return best


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
