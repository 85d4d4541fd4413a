"""Checks of arguments, with messages that name the argument, the value and the cure."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Start = Literal["carry", "zero", "uniform"]

STRAYS = 0.1  # share of a batch that may lie outside the bounds (RandomErasing's noise, rounding)
FAR = 4.0  # how many widths of the bounds even a stray value may be away

OFF = """\
Gradients are off here: a validation runs on the loader itself, `for x, y in loader`, not on its replay.
"""

CURES = """\
Each batch that replay() yields needs one backward pass through its input. Look for:
- no backward pass before the next batch: call free.step(loss) or loss.backward() for every batch;
- a forward pass under torch.no_grad(): move it out, and validate on the loader itself, not on its replay;
- an input cut off from its graph (x.detach(), x.data, torch.tensor(x), Variable(x)): give the model x itself;
- the next batch taken between forward and backward pass: take it behind the backward pass;
- gradients asked for by torch.autograd.grad(loss, ...), of x or of the weights: use loss.backward(), or ask for x's
  as well and hand it on with x.backward(gx);
- a loop that prefetches, or a wrapper round the replay that takes batches ahead: wrap it the other way,
  free.replay(wrapper), or replay inside the step, `for batch in free.replay([batch])`;
- a cycle round the replay: free.replay(itertools.cycle(loader));
- a batch left out on purpose, such as one that did not fit into memory: call free.skip() there;
- batches passed over by `continue` in a run that goes on: free.load_state_dict brings what is left of the minibatch
  in flight, and the loader itself has to go on behind it (torchdata's StatefulDataLoader);
- several batches per optimizer step: pass FreeAdversarial(..., accumulate=<that number>);
- a short last group of micro-batches that the loop drops: DataLoader(..., drop_last=True) and a dataset whose number
  of batches is a multiple of accumulate;
- a host that copies or cuts the batch: perturb inside the model, FreeAdversarial(..., at=<its first layer>);
- with at=module: a forward pass without that module, by a copy of it, with it in eval mode, inside a backward hook
  (only a checkpoint may run it there), after the loop was left, compiled before FreeAdversarial was made
  (torch._dynamo.reset() once), or a call whose output the loss does not use (make that one under torch.no_grad())."""

LATE = """\
this batch's time is over: delta has moved on, and a gradient would be lost. Look for:
- a cycle or a cache round the replay: wrap it the other way, free.replay(itertools.cycle(loader));
- two replays of one FreeAdversarial side by side, as in zip(): make an object for each;
- a batch or an output that is kept for a later loss: keep x.detach()."""


def describe(x: Tensor) -> str:
    """Shape, dtype and device of a tensor, for messages."""
    return f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}"


def level(name: str, value: Any) -> float:
    """`value` as a float, if it is a finite number and not negative."""
    number = _number(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return number


def positive(name: str, value: Any, cure: str = "") -> float:
    """`value` as a float, if it is a positive finite number; what to give instead ends the message."""
    number = _number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}{cure}")
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


def count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int, if it is a whole number and not too small."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return operator.index(value)


def scalar(name: str, value: Any) -> None:
    """Refuse what is not a tensor with one element and a graph."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name} must be a scalar, got {describe(value)}; take its mean()")
    if not value.requires_grad:
        raise RuntimeError(f"the {name} has no graph to go backward through.\n{CURES}")


def dense(x: Tensor, mean: tuple[Any, ...] | None = None) -> None:
    """Refuse what is not a dense floating-point batch over which such a mean broadcasts."""
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
    form = shape_of(mean)
    if len(form) == 1 and form[0] > 1 and (x.ndim < 2 or form[0] != x.shape[1]):
        cure = "pass one entry per channel, or one number each for all"
        if x.ndim == 5 and form[0] == x.shape[2]:
            cure = "for video of shape (N, frames, C, H, W) pass tensors of shape (C, 1, 1)"
        raise ValueError(
            f"mean and std have {form[0]} entries, but the channels (dimension 1) of the "
            f"input differ: {what}; {cure}"
        )
    if len(form) > 1:
        lead = (1,) * (x.ndim - len(form))
        fits = all(n in (1, of) for n, of in zip((*lead, *form), (1, *x.shape[1:]), strict=False))
        if len(form) > x.ndim or not fits:
            raise ValueError(
                f"mean and std of shape {form} do not broadcast over a sample of the input: {what}; pass a flat "
                "list of one entry per channel (dimension 1), or (C, 1, 1) where the channels are the third from last"
            )


def shape_of(value: tuple[Any, ...] | None) -> tuple[int, ...]:
    """The shape of nested tuples."""
    return (len(value), *shape_of(value[0])) if isinstance(value, tuple) else ()


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


def channels(mean: Any, std: Any) -> tuple[Any, Any]:
    """The arguments `mean` and `std` as tuples of floats of one form: flat, or nested as their dimensions are."""
    if (mean is None) != (std is None):
        raise ValueError(
            f"mean and std belong together, got mean={mean!r}, std={std!r}; "
            "pass both, as in the loader's Normalize(mean, std)"
        )
    if mean is None:
        return None, None
    tensors = []
    for name, value in (("mean", mean), ("std", std)):
        rows = value if isinstance(value, list | tuple) else ()
        several = any(isinstance(v, list | tuple) or getattr(v, "ndim", 0) for v in rows)
        if several or getattr(value, "ndim", 0) > 1:
            t = torch.as_tensor(value, dtype=torch.float64, device="cpu")
            numbers(name, t.flatten())
        else:
            t = torch.tensor(numbers(name, value), dtype=torch.float64, device="cpu")
        tensors.append(t)
    if not (tensors[1] > 0).all():
        raise ValueError(f"std must be positive, got {std!r}")
    shapes = [tuple(t.shape) for t in tensors]
    flat = {len(shape) > 1 for shape in shapes if shape != (1,)}
    try:
        means, stds = torch.broadcast_tensors(*tensors)  # type: ignore[no-untyped-call]
    except RuntimeError:
        flat = {True, False}
    if len(flat) > 1:
        had = [str(s[0]) if len(s) == 1 else f"shape {s}" for s in shapes]
        raise ValueError(f"mean and std must have one entry per channel, got {had[0]} and {had[1]}")
    return _nested(means.tolist()), _nested(stds.tolist())


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value


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
