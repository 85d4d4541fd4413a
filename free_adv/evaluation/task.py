"""What a model is asked: what its outputs and the labels mean, what to ascend, and which answers are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from free_adv.batch import move, rebuilt, tensors
from free_adv.checks import choice, count, describe

Loss = Literal["ce", "cw"]
PerSample = Callable[[Any, Any], Tensor]  # of the model's output and y, one number for each sample
OTHER = "for any other task give loss= and correct= of your own"


@dataclass(frozen=True)
class Task:
    """What ascends, and what is right; the arguments are those of `evaluate`.

    Attributes:
        ascended: Whether PGD runs at all: its own losses take class indices, whatever `correct` takes.
    """

    loss: Loss | PerSample = "ce"
    correct: PerSample | None = None
    samples: int = 1
    ascended: bool = True

    def __post_init__(self) -> None:
        count("samples", self.samples)
        if not callable(self.loss):
            choice("loss", self.loss, Loss)
        if self.correct is not None and not callable(self.correct):
            raise TypeError(f"correct must be a callable (output, y) -> (N,), got {self.correct!r}")

    def truth(self, y: Any, samples: int, device: torch.device) -> Any:
        """The labels, in a form in which rows can be taken of them."""
        soft = self.correct is not None and isinstance(y, Tensor) and y.is_floating_point()
        if not callable(self.loss) and not soft and (self.ascended or self.correct is None):
            return labels(y, samples, device)
        several = isinstance(y, list | tuple | Mapping)
        y = move(y, device) if several else torch.as_tensor(y, device=device).detach()
        columns = [*y.values()] if isinstance(y, Mapping) else [y]
        for column in columns:
            if not hasattr(column, "__len__") or len(column) != samples:
                raise ValueError(
                    f"y must have one entry for each of {samples} samples: a tensor, a list, or a dict of these, "
                    f"got a {type(column).__name__} of {len(column) if hasattr(column, '__len__') else 'no'} entries"
                )
        return y

    def ascends(self, output: Any, y: Any, rival: Tensor | None = None) -> Tensor:
        """The loss of each sample; a margin is that to the class `rival`, where there is one.

        The cross-entropy is softplus(m) of the margin m of all other classes together. Where the model is sure, the
        share of the true class in its gradient, 1 - p_y, rounds to zero, and half of the direction is lost. m has the
        same direction and order, and loses nothing; of several passes the mean is that of the cross-entropy.
        """
        if callable(self.loss):
            return per_sample("loss", self.loss(output, rebuilt(y)), count_of(y))
        z = logits(output, len(y))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if y.is_floating_point():  # shares of classes
            return functional.cross_entropy(z, y, reduction="none")
        own, others = z.gather(1, y[:, None])[:, 0], z.scatter(1, y[:, None], -torch.inf)
        if self.loss == "ce":
            margin = others.logsumexp(1) - own
            return margin if self.samples == 1 else functional.softplus(margin)
        nearest = others.argmax(1)
        rival = nearest if rival is None else torch.where(rival < 0, nearest, rival)
        return z.gather(1, rival[:, None])[:, 0] - own

    def right(self, outputs: Iterable[Any], y: Any) -> Tensor:
        """How far each sample is right: yes or no, by most of the outputs, or the mean of its shares."""
        correct, n = self.correct or classified, count_of(y)
        found = torch.stack([per_sample("correct", correct(z, rebuilt(y)), n) for z in outputs])
        if found.dtype == torch.bool:
            return found.float().mean(0) > 0.5
        share = found.detach().double().mean(0).cpu()
        if len(share) and not 0 <= share.min() <= share.max() <= 1:
            raise ValueError(
                f"correct must return True or False, or shares from 0 to 1, got {share.min():.4g} to "
                f"{share.max():.4g}; of an error, say whether it is within a tolerance"
            )
        return share


def as_input(x: Any) -> Tensor:
    """`x` without a graph, if it is what can be moved."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the inputs x must be one tensor of shape (N, ...), got a {type(x).__name__}; of a NumPy array take "
            "torch.from_numpy(x); what else the model takes is not attacked: pass lambda x: model(x, other)"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"the inputs x must be floating point, got {describe(x)}; of images take x.float() / 255, or "
            "ToDtype(torch.float32, scale=True) in the transform"
        )
    return x.detach()


def logits(output: Any, samples: int) -> Tensor:
    """What a model returned, if it is what a classifier returns: logits of shape (N, classes)."""
    if not isinstance(output, Tensor):
        take = "[0]" if isinstance(output, list | tuple) else ".logits"
        if isinstance(output, Mapping):
            take = repr([next((k for k in ("logits", *output) if k in output), "logits")])
        raise TypeError(
            f"model must return logits of shape (N, classes), got a {type(output).__name__}; "
            f"pass lambda x: model(x){take}; {OTHER}"
        )
    if not output.is_floating_point():
        raise ValueError(
            f"model must return logits of shape (N, classes), got {describe(output)}; leave out argmax(1); {OTHER}"
        )
    if output.shape in ((samples,), (samples, 1)):
        z = "z" if output.ndim == 2 else "z[:, None]"
        raise ValueError(
            f"model must return logits of two classes or more, got {describe(output)}; for one output with a "
            f"threshold at 0 write a wrapper: z = model(x); return torch.cat([-{z}, {z}], 1); {OTHER}"
        )
    if output.ndim != 2 or len(output) != samples or output.shape[1] < 2:
        cure = "squeeze() takes the batch dimension too: flatten(1)" if output.ndim < 2 else OTHER
        raise ValueError(
            f"model must return logits of shape (N, classes) for {samples} samples, got {describe(output)}; {cure}"
        )
    return output


def labels(y: Any, samples: int, device: torch.device) -> Tensor:
    """Class indices of shape (N,), as whole numbers."""
    what = "labels y must be class indices of shape (N,), got"
    try:
        y = torch.as_tensor(y, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        held = type(next(iter(y), None)).__name__ if isinstance(y, list | tuple) else "others"
        raise TypeError(f"{what} a {type(y).__name__} of {held}; {OTHER}") from error
    what = f"{what} {describe(y)}"
    if y.ndim == 2 and y.shape[1] == 1 and samples == len(y):
        raise ValueError(f"{what}; y[:, 0]")
    if y.ndim == 2:
        raise ValueError(f"{what}; of one-hot or soft labels take y.argmax(1); {OTHER}")
    if y.ndim != 1 or len(y) != samples:
        raise ValueError(f"{what} for {samples} samples; {OTHER}")
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"labels y must be whole numbers, got {describe(y)}; y.long()")
    whole: Tensor = y.long()
    return whole


def in_range(y: Tensor, classes: int) -> None:
    """Refuse labels that are none of a model's classes."""
    if len(y):
        low, high = (int(v) for v in y.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels y run from {low} to {high}, but the model has {classes} classes, 0 to {classes - 1}; "
                "leave out images without a class, and count classes from 0"
            )


def classified(output: Any, y: Any) -> Tensor:
    """Which samples are classified correctly; an answer that is no number is a wrong one."""
    z = logits(output, count_of(y))
    y = labels(y, len(z), z.device)
    in_range(y, z.shape[1])
    return torch.logical_and(z.argmax(1) == y, ~z.isnan().any(1))


def rivals(z: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The class that the margin is to: -1, the nearest at each step, for start 0, else the k-th after the nearest now."""
    order = z.detach().scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    kth = order.gather(1, start[:, None] % max(1, z.shape[1] - 1))[:, 0]
    return torch.where(start > 0, kth, -1)


def per_sample(name: str, values: Any, samples: int) -> Tensor:
    """What a callable of the user's returned, if it is one number for each sample."""
    if not isinstance(values, Tensor) or values.shape != (samples,):
        got = describe(values) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        cure = "of values for every place take their mean, values.flatten(1).mean(1)"
        if getattr(values, "ndim", None) == 0:
            cure = 'take no mean over the samples: reduction="none" in a loss of torch'
        raise ValueError(
            f"{name} must return one value for each of {samples} samples, shape ({samples},), got {got}; {cure}"
        )
    return values


def rows(column: Any, index: Tensor) -> Any:
    """Some entries of a tensor, a list, or a dict of these."""
    if isinstance(column, Tensor):
        return column[index.to(column.device)]
    if isinstance(column, Mapping):
        return {name: rows(values, index) for name, values in column.items()}
    return [column[i] for i in index.tolist()]


def joined(one: Any, other: Any) -> Any:
    """The entries of two columns, one after the other."""
    if isinstance(one, Tensor):
        return torch.cat([one, other])
    if isinstance(one, Mapping):
        return {name: joined(values, other[name]) for name, values in one.items()}
    return [*one, *other]


def form(column: Any) -> Any:
    """What two columns must have in common to be joined."""
    if isinstance(column, Tensor):
        return column.shape[1:], column.dtype
    if isinstance(column, Mapping):
        return {name: form(values) for name, values in column.items()}
    return None


def count_of(column: Any) -> int:
    """How many entries a column has."""
    return count_of(next(iter(column.values()))) if isinstance(column, Mapping) else len(column)


def apart(one: Any, other: Any, whole: Any = None) -> float:
    """How far two outputs are from one another, as a share of the range of the values of `whole`, or of the first."""
    triples = zip(
        tensors(one), tensors(other), tensors(one if whole is None else whole), strict=False
    )
    far = 0.0
    for (_, a), (_, b), (_, all_) in triples:
        if a.shape != b.shape:
            return math.inf
        if a.numel() and not a.is_complex():
            a, b = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
            same = (a == b) | (a.isnan() & b.isnan())
            off = (a - b).abs().where(~same, 0).nan_to_num(torch.inf).max().item()
            low, high = (v.item() for v in all_.detach().nan_to_num(0, 0, 0).aminmax())
            rounding = 1e-3 * max(abs(low), abs(high), 1e-30)  # the range of values that are alike
            far = max(far, off / max(high - low, rounding))
    return far
