"""Checks of arguments, with messages that name the argument, the value and the cure."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Start = Literal["carry", "zero", "uniform"]
Loss = Literal["ce", "cw"]  # of PGD

STRAYS = 0.1  # share of a batch that may lie outside the bounds (RandomErasing's noise, rounding)
FAR = 4.0  # how many widths of the bounds even a stray value may be away

CURES = """\
Each batch that replay() yields needs one backward pass through its input. Look for:
- no backward pass before the next batch: call free.step(loss) or loss.backward() for every batch;
- a forward pass under torch.no_grad(): move it out, and validate on the loader itself, not on its replay;
- an input cut off from its graph (x.detach(), x.data, torch.tensor(x), Variable(x)): give the model x itself;
- gradients asked for by torch.autograd.grad(loss, x): hand them on with x.backward(gx), or use loss.backward();
- a loop that prefetches, or a wrapper round the replay that takes batches ahead: wrap it the other way,
  free.replay(wrapper), or replay inside the step, `for batch in free.replay([batch])`;
- a cycle round the replay: free.replay(itertools.cycle(loader));
- a batch left out on purpose, such as one that did not fit into memory: call free.skip() there;
- several batches per optimizer step: pass FreeAdversarial(..., accumulate=<that number>);
- a host that copies or cuts the batch: perturb inside the model, FreeAdversarial(..., at=<its first layer>);
- with at=module: a forward pass without that module, by a copy of it, with it in eval mode, after the
  loop was left, compiled before FreeAdversarial was made (torch._dynamo.reset() once), or a call whose
  output the loss does not use (make that one under torch.no_grad())."""

LATE = """\
this batch's time is over: delta has moved on, and a gradient would be lost. Look for:
- a cycle or a cache round the replay: wrap it the other way, free.replay(itertools.cycle(loader));
- two replays of one FreeAdversarial side by side, as in zip(): make an object for each;
- a batch or an output that is kept for a later loss: keep x.detach()."""


def warn(text: str) -> None:
    """Warn at the line outside this package, and outside of torch, from which it was called."""
    level, frame = 1, sys._getframe()
    inner = ("free_adv.", "torch.")
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(inner):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def describe(x: Tensor) -> str:
    """Shape, dtype and device of a tensor, for messages."""
    return f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}"


def positive(name: str, value: Any) -> float:
    """`value` as a float, if it is a positive finite number."""
    number = _number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return number


def as_device(value: Any) -> torch.device:
    """The argument `device`, as `Tensor.to` takes it."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise type(error)(
            f"device must be what Tensor.to takes, such as 'cuda' or 0, got {value!r}"
        ) from error


def choice(name: str, value: Any, kind: Any) -> None:
    """Refuse what is none of the values of a `Literal`."""
    if value not in get_args(kind):
        *others, last = map(repr, get_args(kind))
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def count(name: str, value: Any) -> int:
    """`value` as an int, if it is a whole number of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return operator.index(value)


def scalar(name: str, value: Any) -> None:
    """Refuse what is not a tensor with one element and a graph."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name} must be a scalar, got {describe(value)}; take its mean()")
    if not value.requires_grad:
        raise RuntimeError(f"the {name} has no graph to go backward through.\n{CURES}")


def dense(x: Tensor, channels: int) -> None:
    """Refuse what is not a dense floating-point batch with so many channels, where 1 stands for any number."""
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"{describe(x)}, layout {x.layout}"
        raise TypeError(
            f"the input must be a dense tensor, got {kind}; call to_dense() or to_padded_tensor() first"
        )
    what = describe(x)
    if not x.is_floating_point():
        raise TypeError(
            f"the input must be floating point, got {what}; convert it before the replay "
            "(images: x.float() / 255, or ToDtype(torch.float32, scale=True) in the transform)"
        )
    if x.ndim == 0:
        raise ValueError(f"the input needs a batch dimension, got {what}; batch it as x[None]")
    if channels > 1 and (x.ndim < 2 or channels != x.shape[1]):
        raise ValueError(
            f"mean and std have {channels} entries, but the channels (dimension 1) of the "
            f"input differ: {what}; pass one entry per channel, or one number each for all"
        )


def inside(
    pixels: Tensor, bounds: tuple[float, float] | None, what: str, normalised: bool = False
) -> tuple[float, float]:
    """Refuse pixels that are not finite, or that as a whole are not what `bounds` says; their range."""
    low, high = (float(v) for v in pixels.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(
            f"the input holds values that are not finite, {what}; look for NaN or infinity in the data"
        )
    if bounds is None:
        return low, high
    lowest, highest = bounds
    width = highest - lowest
    slack = 1e-2 * width  # half precision rounds, and mean and std are often rounded too
    outside = ((pixels < lowest - slack) | (pixels > highest + slack)).float().mean().item()
    if outside > STRAYS or low < lowest - FAR * width or high > highest + FAR * width:
        named, cure = "", "If the loader normalises, pass its mean= and std="
        if normalised:
            named, cure = (
                "undoing mean and std, ",
                "See that they are those of the loader's Normalize",
            )
        raise ValueError(
            f"the input lies outside bounds {bounds}: {named}{what} has {outside:.1%} of its values outside, "
            f"observed range {low:.3g} to {high:.3g}. {cure}; "
            "if pixels are 0..255, divide them by 255; for any other range pass bounds=(lowest, highest), with "
            "eps in the same units; bounds=None is for input that has no range"
        )
    return low, high


def doubt(
    x: Tensor, seen: tuple[float, float], bounds: tuple[float, float] | None, eps: float
) -> None:
    """Warn of what is odd about the range of a batch, as the loader gave it and as `seen` in pixel units."""
    (low, high), (first, last) = seen, (float(v) for v in x.aminmax())
    range_ = f"the input's values run from {low:.3g} to {high:.3g} in pixel units"
    odd = ""
    if bounds and (first, last) != seen and bounds[0] <= first < last <= bounds[1]:
        odd = (
            f"mean and std are given, but the batch as the loader gives it runs from {first:.3g} to {last:.3g}, "
            f"inside bounds {bounds}, as images do before normalisation: leave out mean and std, or normalise"
        )
    elif bounds and 0 < high - low < (bounds[1] - bounds[0]) / 10:
        odd = (
            f"{range_}, less than a tenth of bounds {bounds}: look whether images are divided by 255 twice, or "
            "bounds are those of 0..255 for images in [0, 1]"
        )
    elif 0 < high - low < eps:
        odd = f"{range_}, and eps={eps:g} is more than that: give eps in the units of the input"
    if odd:
        warn(odd)


def masked(still: int, samples: int, what: str, when: str) -> str:
    """What to say of samples that have no gradient."""
    return (
        f"the input gradient of {still} of {samples} samples is {what} {when}, so that they are not "
        "moved: a model may look robust that is not. Look for a layer that rounds, probabilities in place of "
        "logits, float16 without a GradScaler; in an evaluation try loss='cw', attack='autoattack' or float32"
    )


def vanishing(grad: Tensor) -> None:
    """Tell of a gradient that is zero for half of the samples; in float16 a tenth of their entries is enough."""
    if grad.numel() and grad.device.type != "meta":
        half = grad.dtype == torch.float16  # where what is too small becomes zero
        zeros = (grad.detach().reshape(len(grad), -1) == 0).float().mean(1)
        still = int((zeros >= (0.1 if half else 1)).sum())
        if still >= len(grad) / 2:
            what = "zero in a tenth of its entries or more" if half else "zero"
            warn(masked(still, len(grad), what, "in this replay"))


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """One number or several as a tuple of finite floats."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    several = several and getattr(value, "ndim", 1) > 0  # a tensor or an array may be one number
    result = tuple(_number(name, v) for v in (value if several else (value,)))
    if not result or not all(map(math.isfinite, result)):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return result


def _number(name: str, value: Any) -> float:
    if getattr(value, "ndim", None) == 0:  # of a tensor or an array
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    return float(value)
