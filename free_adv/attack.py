"""Projected gradient descent, the attack that robust accuracy is measured with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from free_adv.checks import Loss, choice, count, positive
from free_adv.hints import masked, warn
from free_adv.model import Model, labels, logits, undisturbed
from free_adv.threat import ThreatModel

FLAT = "zero or not finite", "at the first step of PGD"


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Loss = "ce",
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
        y: Class indices of shape (N,): a tensor or a list of whole numbers.
        threat: The threat model, in pixel units.
        steps: Gradient steps of each restart.
        step_size: Length of a step in pixel units. None means `2.5 * eps / steps`, enough to cross the ball.
        restarts: How many starts are tried; of each sample the first example that fools the model is
            kept, and no other start tried, else that with the largest loss.
        loss: What ascends: "ce", the cross-entropy, or "cw", the margin `max_{j != y} z_j - z_y` of the logits
            (Carlini & Wagner 2017, arXiv 1608.04644); restarts after the first take the margin to another class
            each, the nearest first (as in Gowal et al. 2019, arXiv 1910.09338).
        random_start: Start from a uniform draw from the ball; otherwise from `x` itself.
        generator: Source of the random starts. None draws the same ones at each call, from
            `torch.initial_seed()`. Give training its own generator.

    Returns:
        The adversarial inputs, in the units, shape and dtype of `x`.

    Warns:
        UserWarning: Samples whose gradient is zero or not finite at the first step, where PGD stands still.

    Raises:
        ValueError: A value is out of range, `x` lies outside the bounds, `y` are no labels, or the model does
            not return logits.
        TypeError: `x` is not a floating-point tensor, `y` are no whole numbers, the model returns no tensor.
        RuntimeError: Under `torch.inference_mode`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
        >>> x_adv = pgd(model, x, y, ThreatModel(8 / 255), steps=10)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    steps, restarts = count("steps", steps), count("restarts", restarts)
    demand(threat)
    size = 2.5 * threat.eps / steps if step_size is None else positive("step_size", step_size)
    choice("loss", loss, Loss)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(torch.initial_seed())
    x = x.detach()
    with undisturbed(model, x.device):
        threat.check(x, doubts=True)
        y = labels(y, len(x), None, x.device)
        best, worst = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        left = torch.arange(len(x), device=x.device)  # those that no start has fooled
        for restart in range(restarts):
            rest, y_rest = (x, y) if len(left) == len(x) else (x[left], y[left])
            delta = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if random_start:
                threat.randomise(delta, generator)
            rival = torch.full_like(y_rest, restart)
            x_adv, flat = climb(model, rest, y_rest, threat, delta[left], steps, size, loss, rival)
            if restart == 0 and flat:
                warn(masked(flat, len(x), *FLAT))
            if restarts == 1:
                return x_adv
            with torch.no_grad():
                answer = model(x_adv)
            found = LOSSES[loss](answer, y_rest).to(worst.dtype).nan_to_num(nan=-torch.inf)
            fooled = answer.argmax(1) != y_rest
            better = fooled | (found > worst[left])
            best[left[better]] = x_adv[better]
            worst[left] = torch.maximum(found, worst[left])
            left = left[~fooled]
            if not len(left):
                break
    return best


def climb(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    delta: Tensor,
    steps: int,
    size: float,
    loss: Loss,
    rival: Tensor,
) -> tuple[Tensor, int]:
    """PGD from one start; and how many samples had no gradient at its first step.

    With the margin loss `rival` says for each sample which class the margin is to: 0 whichever is the nearest at
    each step, k the one that is the k-th after the nearest at the start.
    """
    base, flat = x.to(delta.dtype), 0
    moved = threat.perturb(base, delta)
    for step in range(steps):
        x_adv = rounded(threat, x, moved).detach().requires_grad_()
        answer = logits(model(x_adv), len(x))
        if step == 0:
            labels(y, len(x), answer.shape[1], x.device)
            others = answer.detach().scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
            chosen = others.gather(1, rival[:, None] % max(1, answer.shape[1] - 1))
        value = LOSSES[loss](answer, y)
        if loss == "cw":
            fixed = (answer.gather(1, chosen) - answer.gather(1, y[:, None]))[:, 0]
            value = torch.where(rival > 0, fixed, value)
        (grad,) = torch.autograd.grad(value.sum(), x_adv)
        if step == 0 and len(x):
            largest = grad.reshape(len(x), -1).abs().amax(1)
            flat = len(x) - int((largest.isfinite() & (largest > 0)).sum())
        delta = threat.displacement(base, moved)  # after the bounds
        threat.ascend(delta, grad, size)
        moved = threat.perturb(base, delta)
    return rounded(threat, x, moved), flat


def demand(threat: Any) -> None:
    """Refuse what is no threat model."""
    if not isinstance(threat, ThreatModel):
        raise TypeError(
            f"threat must be a ThreatModel, such as free.threat or ThreatModel(eps=8/255), got {threat!r}"
        )


def rounded(threat: ThreatModel, x: Tensor, moved: Tensor) -> Tensor:
    """`moved` in the precision of `x`, where rounding may not leave the ball."""
    near = moved.to(x.dtype)
    if x.dtype == moved.dtype:
        return near
    base, delta = x.to(moved.dtype), threat.displacement(x, moved)
    limit: Any = threat.eps
    if threat.norm == "l2":  # rounding errs both ways: shrink what it has made a little too long
        for _ in range(3):
            far = threat.distance(threat.displacement(base, near.to(moved.dtype)))
            far = far.reshape(-1, *[1] * (x.ndim - 1))
            delta = delta * (threat.eps / far).clamp(max=1)
            near = threat.perturb(base, delta).to(x.dtype)
        limit = torch.where(far > threat.eps, delta.abs(), torch.inf)
    for back in (True, False):  # one unit of that precision towards x, else x itself
        value = near.to(moved.dtype)
        away = threat.displacement(base, value)
        unit = torch.exp2(torch.frexp(value).exponent - 1.0) * torch.finfo(x.dtype).eps
        nearer = (value - away.sign() * unit).to(x.dtype) if back else x
        near = torch.where(away.abs() > limit, nearer, near)
    return near


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    rivals = logits.scatter(1, y[:, None], -torch.inf)
    return rivals.max(1).values - logits.gather(1, y[:, None])[:, 0]


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {"ce": _cross_entropy, "cw": _margin}
