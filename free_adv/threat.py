"""The threat model: how far an input may be moved, in which norm, and inside which range."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from free_adv.checks import Norm, channels, choice, dense, describe, inside, numbers, positive
from free_adv.hints import doubt, frames


class Linf:
    """The ball of the maximum norm: what a norm decides stands in a class like this one, and nowhere else."""

    entrywise = True  # whether the radius limits every entry by itself, or each sample as a whole

    @staticmethod
    def size(delta: Tensor) -> Tensor:
        """What must not exceed the radius: of each entry, or of each sample, shaped to broadcast."""
        return delta.abs()

    @staticmethod
    def step(delta: Tensor, grad: Tensor, length: float) -> Tensor:
        """`delta` after the steepest step for `grad`, in whose memory it is made."""
        return torch.add(delta, grad.sign_(), alpha=length, out=grad)

    @staticmethod
    def project(moved: Tensor, eps: float, out: Tensor) -> None:
        """Write the nearest point of the ball to `out`."""
        torch.clamp(moved, -eps, eps, out=out)

    @staticmethod
    def draw(delta: Tensor, eps: float, generator: torch.Generator | None) -> None:
        """Fill `delta` with a uniform draw from the ball."""
        delta.uniform_(-eps, eps, generator=generator)


class L2:
    """The ball of the Euclidean norm of each sample; see `Linf`."""

    entrywise = False

    @staticmethod
    def size(delta: Tensor) -> Tensor:
        """See `Linf`."""
        return _per_sample(delta, 2)

    @staticmethod
    def step(delta: Tensor, grad: Tensor, length: float) -> Tensor:
        """See `Linf`."""
        # The largest entry is divided out first: squares of tiny gradients would underflow to 0.
        tiny = torch.finfo(grad.dtype).tiny
        grad.div_(_per_sample(grad, math.inf).clamp_(min=tiny))
        scale = _per_sample(grad, 2).clamp_(min=tiny**0.5).reciprocal_().mul_(length)
        return torch.addcmul(delta, grad, scale, out=grad)

    @staticmethod
    def project(moved: Tensor, eps: float, out: Tensor) -> None:
        """See `Linf`."""
        tiny = torch.finfo(moved.dtype).tiny
        shrink = _per_sample(moved, 2).clamp_(min=tiny).reciprocal_().mul_(eps).clamp_(max=1)
        torch.mul(moved, shrink, out=out)

    @staticmethod
    def draw(delta: Tensor, eps: float, generator: torch.Generator | None) -> None:
        """See `Linf`."""
        noise = torch.empty_like(delta).normal_(generator=generator)
        norm = _per_sample(noise, 2).clamp(min=torch.finfo(delta.dtype).tiny)
        radius = torch.empty_like(norm).uniform_(generator=generator)
        radius.pow_(1 / max(1, delta[:1].numel())).mul_(eps)  # in d dimensions u^(1/d)
        torch.mul(noise, radius / norm, out=delta)


BALLS: dict[Norm, type[Linf] | type[L2]] = {"linf": Linf, "l2": L2}


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
        mean: Mean that the loader has subtracted: one number for all, a flat list of one per channel (dimension 1
            of a batch), or a tensor of several dimensions that broadcasts over a sample, such as (C, 1, 1) for images
            and for video of shape (N, T, C, H, W); None if none was.
        std: Standard deviation that the loader has divided by, in the same form.

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
    mean: tuple[Any, ...] | None  # of floats, nested as its dimensions are
    std: tuple[Any, ...] | None

    def __init__(
        self,
        eps: float,
        norm: Norm = "linf",
        bounds: Iterable[float] | None = (0.0, 1.0),
        mean: float | Iterable[Any] | None = None,
        std: float | Iterable[Any] | None = None,
    ) -> None:
        choice("norm", norm, Norm)
        eps = positive("eps", eps)
        box = None if bounds is None else numbers("bounds", bounds)
        if box is not None and (len(box) != 2 or not box[0] < box[1]):
            raise ValueError(f"bounds must be (lowest, highest), lowest < highest, got {bounds!r}")
        if box is not None and BALLS[norm].entrywise and eps > box[1] - box[0]:
            cure = f"did you mean eps={eps:g}/255?"
            raise ValueError(f"eps must not exceed the width of bounds {box}, got {eps:g}; {cure}")
        means, stds = channels(mean, std)
        values = {"eps": eps, "norm": norm, "bounds": box, "mean": means, "std": stds}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def ball(self) -> type[Linf] | type[L2]:
        """What the norm decides."""
        return BALLS[self.norm]

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
        self.steepest(delta, finite(grad.detach(), delta.dtype), step_size)

    def steepest(self, delta: Tensor, grad: Tensor, step_size: float) -> None:
        """`ascend` for a finite gradient in delta's precision, whose memory is used up."""
        if not delta.numel():
            return
        std = None if self.ball.entrywise else self._units(grad)[3]  # a sign has no unit
        if std is not None:
            grad.div_(std)
        # delta changes in one operation: an interrupt finds it in the ball.
        self.ball.project(self.ball.step(delta, grad, step_size), self.eps, delta)

    def project(self, delta: Tensor) -> None:
        """Move `delta`, shape (N, ...), to the nearest point of the ball, in place."""
        self.ball.project(delta.clone(), self.eps, delta)

    def randomise(self, delta: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill `delta`, shape (N, ...), with a uniform draw from the ball of each sample, in place."""
        self.ball.draw(delta, self.eps, generator)

    def displacement(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """How far `x_adv` is from `x`, in pixel units; both are in the loader's units."""
        delta = x_adv.to(torch.promote_types(x_adv.dtype, torch.float32)) - x
        std = self._units(delta)[3]
        return delta if std is None else delta.mul_(std)

    def distance(self, delta: Tensor) -> Tensor:
        """Norm of each sample of `delta`, shape (N, ...), as a tensor of shape (N,)."""
        return _per_sample(self.ball.size(delta), math.inf).reshape(len(delta))

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
        dense(x, self.mean)
        if values and x.numel() and x.device.type != "meta":
            pixels = self.to_pixels(x.detach())
            seen = inside(pixels, self.bounds, describe(x), self.std is not None)
            frames(x, self.mean)
            if doubts and x.numel() >= 100:
                doubt(x.detach(), seen, self.bounds, self.eps if self.ball.entrywise else 0.0)

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
    mean: tuple[Any, ...],
    std: tuple[Any, ...],
    ndim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, Any, Tensor, Tensor]:
    """Bounds in the loader's units, mean and std: a flat one along dimension 1 of a batch."""
    tensors = (torch.tensor(v, dtype=dtype, device=device) for v in (mean, std))
    m, s = (t if t.ndim > 1 else t.reshape(-1, *[1] * max(0, ndim - 2)) for t in tensors)
    low, high = (None, None) if bounds is None else ((b - m) / s for b in bounds)
    return low, high, m, s
