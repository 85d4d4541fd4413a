"""Projected gradient descent, the attack that robust accuracy is measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from free_adv.checks import count, positive
from free_adv.evaluation.subject import Subject
from free_adv.evaluation.task import (
    Loss,
    PerSample,
    Task,
    as_input,
    classified,
    in_range,
    logits,
    rivals,
    rows,
)
from free_adv.hints import masked, warn
from free_adv.threat import ThreatModel


def pgd(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Any,
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Loss | PerSample = "ce",
    samples: int = 1,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial examples by projected gradient descent (Madry et al. 2018, arXiv 1706.06083).

    Each step moves along the steepest ascent of the loss inside the threat model, and projects onto the
    ball and the bounds. The model runs in evaluation mode and is left as it was found: its mode,
    parameter gradients, buffers, and the global random state.

    Args:
        model: Maps a batch to logits of shape (N, classes); to anything, if `loss` is a callable.
        x: Inputs in the loader's units (normalised if `threat` has `mean` and `std`), shape (N, ...).
        y: Class indices of shape (N,): a tensor or a list of whole numbers. For a callable `loss`, what it takes:
            a tensor or a list with an entry for each sample, or a dict of these.
        threat: The threat model, in pixel units.
        steps: Gradient steps of each restart.
        step_size: Length of a step in pixel units. None means `2.5 * eps / steps`, enough to cross the ball.
        restarts: How many starts are tried; of each sample the first example that fools the model is
            kept, and no other start tried, else that with the largest loss.
        loss: What ascends: "ce", the cross-entropy (by its logarithmic odds, whose direction is the same and which no
            confidence rounds to zero), or "cw", the margin `max_{j != y} z_j - z_y` of the logits
            (Carlini & Wagner 2017, arXiv 1608.04644); restarts after the first take the margin to another class
            each, the nearest first (as in Gowal et al. 2019, arXiv 1910.09338). Or, for any task, a callable
            `(output, y) -> losses` of shape (N,), whose largest is kept of all restarts.
        samples: For a model that draws random numbers: how many passes each gradient is the mean of, and each
            decision between starts (expectation over transformation, Athalye et al. 2018, arXiv 1802.00420).
        random_start: Start from a uniform draw from the ball; otherwise from `x` itself.
        generator: Source of the random starts. None draws the same ones at each call, from
            `torch.initial_seed()`. Give training its own generator.

    Returns:
        The adversarial inputs, in the units, shape and dtype of `x`.

    Warns:
        UserWarning: Samples whose gradient is zero or not finite at the first step, where PGD stands still; weights
            that the model's own `eval()` and `train()` have changed.

    Raises:
        ValueError: A value is out of range, `x` lies outside the bounds, `y` are no labels, the model does
            not return logits, or the loss is not one number for each sample.
        TypeError: `x` is not a floating-point tensor, `y` are no whole numbers, the model returns no tensor.
        RuntimeError: Under `torch.inference_mode`, or where no gradient leads from the loss to `x`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
        >>> x_adv = pgd(model, x, y, ThreatModel(8 / 255), steps=10)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    descent = Descent(threat, Task(loss, samples=samples), steps, step_size, restarts)
    x = as_input(x)
    descent.generators[x.device] = generator or source(x.device, torch.initial_seed())
    with Subject(model, x.device) as subject:
        threat.check(x, doubts=True)
        y = descent.task.truth(y, len(x), x.device)
        best = x.clone()
        worst = torch.full((len(x),), -torch.inf, dtype=torch.float32, device=x.device)
        left = torch.arange(len(x), device=x.device)  # those that no start has fooled
        for restart in range(descent.restarts):
            delta = descent.start(x) if random_start else torch.zeros_like(wide(x))
            y_left, start = rows(y, left), torch.full_like(left, restart)
            x_adv = descent.climb(subject, x[left], y_left, delta[left], start)
            if restart == 0:
                descent.tell()
            if descent.restarts == 1:
                return x_adv
            found, fooled = descent.judge(subject, x_adv, y_left)
            better = fooled | (found > worst[left])
            best[left[better]] = x_adv[better]
            worst[left] = torch.maximum(found, worst[left])
            left = left[~fooled]
            if not len(left):
                break
    return best


@dataclass
class Descent:
    """PGD: its settings, where its starts come from, and what it has seen.

    Attributes:
        generators: Source of the starts, by device.
        still, seen: How many samples had no gradient at the first step of their first start, and of how many.
    """

    threat: ThreatModel
    task: Task
    steps: int
    step_size: float | None
    restarts: int
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)
    still: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise TypeError(
                "threat must be a ThreatModel, such as free.threat or ThreatModel(eps=8/255), got "
                f"{self.threat!r}"
            )
        self.steps, self.restarts = count("steps", self.steps), count("restarts", self.restarts)
        size = 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size
        self.size = positive("step_size", size)

    @property
    def name(self) -> str:
        """With the settings that a figure is worth nothing without."""
        loss, k = self.task.loss, self.task.samples
        kind = getattr(loss, "__name__", type(loss).__name__) if callable(loss) else "CW loss"
        name = f"PGD{f' ({kind})' * (loss != 'ce')} steps={self.steps} restarts={self.restarts}"
        size = "" if self.step_size is None else f" step_size={levels(self.step_size)}"
        return name + f" samples={k}" * (k > 1) + size

    def start(self, x: Tensor) -> Tensor:
        """A uniform draw from the ball, drawn where its generator is."""
        if x.device not in self.generators:
            self.generators[x.device] = source(x.device, 0)
        generator = self.generators[x.device]
        delta = torch.empty_like(wide(x), device=generator.device)
        self.threat.randomise(delta, generator)
        return delta.to(x.device)

    def climb(self, model: Subject, x: Tensor, y: Any, delta: Tensor, start: Tensor) -> Tensor:
        """Adversarial inputs from `delta`; `start` is the number of the start, for each sample."""
        threat, base = self.threat, wide(x)
        moved, rival = threat.perturb(base, delta), None
        for step in range(self.steps):
            x_adv = rounded(threat, x, moved).detach().requires_grad_()
            grad: Any = 0
            for _ in range(self.task.samples):
                output = model(x_adv)
                if step == 0 and not callable(self.task.loss):
                    z = logits(output, len(x))
                    in_range(y, z.shape[1])
                    if rival is None and self.task.loss == "cw":
                        rival = rivals(z, y, start)
                grad = grad + gradient(self.task.ascends(output, y, rival).sum(), x_adv)
            if step == 0 and len(x):
                largest = grad.reshape(len(x), -1).abs().amax(1)
                first = start == 0
                self.still += int((first & ~(largest.isfinite() & (largest > 0))).sum())
                self.seen += int(first.sum())
            delta = threat.displacement(base, moved)  # after the bounds
            threat.ascend(delta, grad, self.size)
            moved = threat.perturb(base, delta)
        return rounded(threat, x, moved)

    @torch.no_grad()
    def judge(self, model: Subject, x_adv: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        """The loss of each sample, and whether the model is fooled, which a loss of the user's does not say."""
        outputs = [model(x_adv) for _ in range(self.task.samples)]
        losses = torch.stack([self.task.ascends(z, y).float() for z in outputs]).mean(0)
        right = torch.ones_like(losses, dtype=torch.bool)
        if not callable(self.task.loss):
            right = torch.stack([classified(z, y).float() for z in outputs]).mean(0) > 0.5
        return torch.where(losses.isnan(), -torch.inf, losses), ~right  # nan_to_num is not XLA's

    def tell(self) -> None:
        """Warn of samples that had no gradient."""
        if self.still:
            what, when = "zero or not finite", "at the first step of PGD"
            warn(masked(self.still, self.seen, what, when))


def levels(size: float) -> str:
    """A length in pixel units as people write it, `8/255` where it is a small number of grey levels."""
    grey = round(size * 255, 6)
    return f"{grey:.0f}/255" if grey == round(grey) < 100 else f"{size:.4g}"


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    """That of a loss with respect to the input, in its precision or a higher one."""
    grad = None
    if loss.requires_grad:
        (grad,) = torch.autograd.grad(loss, x, allow_unused=True)
    if grad is None:
        raise RuntimeError(
            "there is no gradient from the loss to the input: look for detach(), torch.no_grad() or a step through "
            "NumPy in the model or in a loss= of your own"
        )
    return wide(grad)


def source(device: torch.device, seed: int) -> torch.Generator:
    """A generator for a device; of the host for one that has none."""
    try:
        generator = torch.Generator(device)
    except RuntimeError:
        generator = torch.Generator("cpu")
    return generator.manual_seed(seed)


def wide(x: Tensor) -> Tensor:
    """`x` in the precision that delta has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(threat: ThreatModel, x: Tensor, moved: Tensor) -> Tensor:
    """`moved` in the precision of `x`, where rounding may not leave the ball."""
    near = moved.to(x.dtype)
    if x.dtype == moved.dtype:
        return near
    base, delta = x.to(moved.dtype), threat.displacement(x, moved)
    limit: Any = threat.eps
    if not threat.ball.entrywise:
        # Rounding errs both ways: shrink what it has made a little too long.
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
