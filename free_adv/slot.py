"""One batch that was yielded: what moved it, and the gradients that it waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from free_adv.perturbation import Perturbation, Rows


class Slot:
    """One batch that was yielded.

    Attributes:
        leaves: For the rows of delta that moved it, the tensor that gets their gradient. With `at` there
            is none until that module has run, and one for each shape of its output.
    """

    def __init__(self) -> None:
        self.leaves: dict[Rows, Tensor] = {}

    @property
    def waiting(self) -> bool:
        """Whether a gradient is still to come."""
        return not self.leaves or any(leaf.grad is None for leaf in self.leaves.values())

    def perturb(self, perturbation: Perturbation, x: Tensor, rows: Rows) -> Tensor:
        """`x` moved by delta; the gradient at the moved tensor arrives here, and at `x` if it wants it."""
        with torch.no_grad():
            moved = perturbation.perturb(x, rows)
        leaf = self.leaves.setdefault(rows, moved.detach().requires_grad_())
        with torch.enable_grad():
            result: Tensor = _Tap.apply(leaf, moved, x)
        return result

    def ascend(self, perturbation: Perturbation) -> None:
        """Move delta along the gradients that have arrived."""
        for rows, leaf in self.leaves.items():
            if leaf.grad is not None:
                perturbation.ascend(rows, leaf.grad)
        self.forget()  # the loop's last loss still holds the leaves

    def forget(self) -> None:
        """Drop the gradients that have arrived."""
        for leaf in self.leaves.values():
            leaf.grad = None


class _Tap(torch.autograd.Function):
    """Makes `moved` a non-leaf whose gradient arrives on `leaf` and at `source`, without a copy.

    It may then be changed in place, as Mixup and normalisation do, which a leaf may not.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, moved: Tensor, source: Tensor) -> Tensor:
        ctx.mark_dirty(moved)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        return grad, None, grad if ctx.needs_input_grad[2] else None
