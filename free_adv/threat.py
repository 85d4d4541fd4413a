"""The threat model: how far an input may be moved, in which norm, and inside which range."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from free_adv.checks import Norm, choice, dense, describe, doubt, inside, numbers, positive


@dataclass(frozen=True, init=False)
class ThreatModel:
    """The set of perturbations a model is trained and attacked with: `||delta|| <= eps`, inside `bounds`.

    `delta`, `eps` and `bounds` are in pixel units, the units of the images before any normalisation.
    Threat models are immutable and compare by value.

    Args:
        eps: Radius of the ball, in the units of `bounds`: `8/255` for images in [0, 1].
        norm: "linf" (every pixel moves by at most `eps`) or "l2" (so does the Euclidean norm of each
            sample's perturbation).
        bounds: Lowest and highest valid pixel; None for inputs without a range.
        mean: Mean that the loader has subtracted, per channel (dimension 1) or for all; None if none was.
        std: Standard deviation that the loader has divided by, given together with `mean`.

    Raises:
        ValueError: A value is out of range; the message names argument, value and cure.
        TypeError: A value is not a number.

    Example:
        >>> ThreatModel(8 / 255) == ThreatModel(8 / 255, norm="linf", bounds=(0, 1))
        True
    """

    eps: float
    norm: Norm
    bounds: tuple[float, float] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __init__(
        self,
        eps: float,
        norm: Norm = "linf",
        bounds: Iterable[float] | None = (0.0, 1.0),
        mean: float | Iterable[float] | None = None,
        std: float | Iterable[float] | None = None,
    ) -> None:
        choice("norm", norm, Norm)
        eps = positive("eps", eps)
        box = None if bounds is None else numbers("bounds", bounds)
        if box is not None and (len(box) != 2 or not box[0] < box[1]):
            raise ValueError(f"bounds must be (lowest, highest), lowest < highest, got {bounds!r}")
        if box is not None and norm == "linf" and eps > box[1] - box[0]:
            cure = f"did you mean eps={eps:g}/255?"
            raise ValueError(f"eps must not exceed the width of bounds {box}, got {eps:g}; {cure}")
        if (mean is None) != (std is None):
            raise ValueError(
                f"mean and std belong together, got mean={mean!r}, std={std!r}; "
                "pass both, as in the loader's Normalize(mean, std)"
            )
        means = None if mean is None else numbers("mean", mean)
        stds = None if std is None else numbers("std", std)
        if stds is not None and min(stds) <= 0:
            raise ValueError(f"std must be positive, got {std!r}")
        if means is not None and stds is not None:
            channels = max(len(means), len(stds))
            if {len(means), len(stds)} - {1, channels}:
                raise ValueError(
                    f"mean and std must have one entry per channel, got {len(means)} and {len(stds)}"
                )
            means, stds = (v * (channels // len(v)) for v in (means, stds))
        values = {"eps": eps, "norm": norm, "bounds": box, "mean": means, "std": stds}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_pixels(self, x: Tensor) -> Tensor:
        """`x` with the loader's normalisation undone, in float32 or float64."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        _, _, mean, std = self._units(x)
        return x if std is None else x * std + mean

    def from_pixels(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `to_pixels`, as `dtype`."""
        _, _, mean, std = self._units(pixels)
        return (pixels if std is None else (pixels - mean) / std).to(dtype)

    def perturb(self, x: Tensor, delta: Tensor) -> Tensor:
        """Move `x` by `delta` and hold it inside the bounds; values already outside stay free to come back.

        Args:
            x: A batch in the loader's units, shape (N, ...).
            delta: The perturbation in pixel units, of the same shape; float32 or float64.

        Returns:
            A new tensor in the loader's units, with `x`'s shape, dtype and layout. The sum is formed
            in `delta`'s precision and cast last.
        """
        z = x.to(delta.dtype)
        low, high, _, std = self._units(z)
        moved = z + delta if std is None else torch.addcdiv(z, delta, std)
        if low is not None:
            # A stray value of x widens the range to itself, so that nothing moves by more than eps.
            moved.clamp_(z.clamp(max=low), z.clamp(min=high))
        return moved.to(x.dtype)

    def ascend(self, delta: Tensor, grad: Tensor, step_size: float) -> None:
        """Take one step of steepest ascent from `delta`, in place, and project onto the ball.

        For linf the step is `step_size * sign(grad)`, for l2 `step_size * grad / ||grad||` per sample.
        Entries of the gradient that are not finite count as zero; a zero gradient moves nothing.

        Args:
            delta: The perturbation in pixel units, shape (N, ...).
            grad: Gradient of the loss in the loader's units, of the same shape.
            step_size: Length of the step in pixel units.
        """
        self.climb(delta, finite(grad.detach(), delta.dtype), step_size)

    def climb(self, delta: Tensor, grad: Tensor, step_size: float) -> None:
        """`ascend` for a finite gradient in delta's precision, whose memory is used up."""
        if not delta.numel():
            return
        # delta changes in one operation: an interrupt finds it in the ball.
        if self.norm == "linf":
            moved = torch.add(delta, grad.sign_(), alpha=step_size, out=grad)
            torch.clamp(moved, -self.eps, self.eps, out=delta)
            return
        std = self._units(grad)[3]
        if std is not None:
            grad.div_(std)
        # The largest entry is divided out first: squares of tiny gradients would underflow to 0.
        tiny = torch.finfo(grad.dtype).tiny
        grad.div_(_per_sample(grad, math.inf).clamp_(min=tiny))
        scale = _per_sample(grad, 2).clamp_(min=tiny**0.5).reciprocal_().mul_(step_size)
        moved = torch.addcmul(delta, grad, scale, out=grad)
        shrink = _per_sample(moved, 2).clamp_(min=tiny).reciprocal_().mul_(self.eps).clamp_(max=1)
        torch.mul(moved, shrink, out=delta)

    def randomise(self, delta: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill `delta`, shape (N, ...), with a uniform draw from the ball of each sample, in place."""
        if self.norm == "linf":
            delta.uniform_(-self.eps, self.eps, generator=generator)
            return
        noise = torch.empty_like(delta).normal_(generator=generator)
        norm = _per_sample(noise, 2).clamp(min=torch.finfo(delta.dtype).tiny)
        radius = torch.empty_like(norm).uniform_(generator=generator)
        radius.pow_(1 / max(1, delta[:1].numel())).mul_(self.eps)  # in d dimensions u^(1/d)
        torch.mul(noise, radius / norm, out=delta)

    def displacement(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """How far `x_adv` is from `x`, in pixel units; both are in the loader's units."""
        delta = x_adv.to(torch.promote_types(x_adv.dtype, torch.float32)) - x
        std = self._units(delta)[3]
        return delta if std is None else delta.mul_(std)

    def distance(self, delta: Tensor) -> Tensor:
        """Norm of each sample of `delta`, shape (N, ...), as a tensor of shape (N,)."""
        return _per_sample(delta, math.inf if self.norm == "linf" else 2).reshape(len(delta))

    def check(self, x: Tensor, values: bool = True, doubts: bool = False) -> None:
        """Refuse a batch that cannot be what this threat model describes.

        Args:
            x: A batch in the loader's units, shape (N, ...).
            values: Whether to look at the values too, and wait for them.
            doubts: Whether to warn of odd ones.

        Raises:
            TypeError, ValueError: No dense floating-point batch with as many channels as `mean`, or its
                values are not finite, or outside `bounds` but for some stray ones.
        """
        dense(x, 1 if self.mean is None else len(self.mean))
        if values and x.numel() and x.device.type != "meta":
            pixels = self.to_pixels(x.detach())
            seen = inside(pixels, self.bounds, describe(x), self.std is not None)
            if doubts and x.numel() >= 100:
                doubt(x.detach(), seen, self.bounds, self.eps if self.norm == "linf" else 0.0)

    def _units(self, x: Tensor) -> tuple[Any, Any, Any, Any]:
        """The bounds in the loader's units, mean and std, so that they broadcast over the batch `x`."""
        if self.mean is None or self.std is None:
            return *(self.bounds or (None, None)), None, None
        return _normalised(self.bounds, self.mean, self.std, x.ndim, x.dtype, x.device)


def finite(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a gradient in that precision, in which entries that are not finite are zero."""
    return grad.to(dtype).nan_to_num(0.0, 0.0, 0.0)


def _per_sample(t: Tensor, order: float) -> Tensor:
    """Norm of each sample, shaped to broadcast against `t`."""
    flat = t.flatten(1) if t.ndim > 1 else t[:, None]
    norm: Tensor = torch.linalg.vector_norm(flat, order, dim=1)
    return norm.reshape(-1, *[1] * (t.ndim - 1))


@functools.lru_cache(maxsize=64)  # made once: a copy from the host would make it wait for the GPU
@torch.inference_mode(False)
def _normalised(
    bounds: tuple[float, float] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    ndim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, Any, Tensor, Tensor]:
    """Bounds in the loader's units, mean and std, per channel: along dimension 1 of a batch."""
    tensors = (torch.tensor(v, dtype=dtype, device=device) for v in (mean, std))
    m, s = (t.reshape(-1, *[1] * max(0, ndim - 2)) for t in tensors)
    low, high = (None, None) if bounds is None else ((b - m) / s for b in bounds)
    return low, high, m, s
