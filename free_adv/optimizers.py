"""What `step` drives: one optimizer or several, loss scaling and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from free_adv.checks import positive
from free_adv.minibatch import CURES, Minibatch


class Optimizers:
    """All the optimizers of a training, stepped as one."""

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        max_grad_norm: float | None,
    ) -> None:
        if scaler is not None and not hasattr(scaler, "unscale_"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self.all = _optimizers(optimizer)
        self.scaler = scaler
        self.max_norm = None if max_grad_norm is None else positive("max_grad_norm", max_grad_norm)

    def demand(self) -> None:
        """Refuse to go on without an optimizer."""
        if not self.all:
            raise RuntimeError(
                "step() needs an optimizer: FreeAdversarial(optimizer, eps=...), or call "
                "loss.backward() and optimizer.step() yourself"
            )

    def train(self, minibatch: Minibatch, index: int, loss: Tensor) -> None:
        """The backward pass of the batch with that index; after the last one the weights and delta move.

        Raises:
            RuntimeError: No gradient has arrived.
        """
        ends, stepping = index == len(minibatch.batches) - 1, False
        try:
            if index == 0:
                for optimizer in self.all:
                    optimizer.zero_grad()
            if len(minibatch.batches) > 1:
                loss = loss * minibatch.share(index)
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
            if minibatch.waiting == index:
                raise RuntimeError(f"the input received no gradient from this loss.\n{CURES}")
            if ends:
                stepping = True
                self._step()
        except BaseException:  # the weights have not moved: this replay has not been made
            for slot in minibatch.slots[: index + 1]:
                slot.forget()
            if (
                stepping and self.scaler is not None
            ):  # or it takes the next gradients for unscaled ones
                self.scaler.update(self.scaler.get_scale())
            raise
        if ends:
            minibatch.take_in()

    def _step(self) -> None:
        """Unscale, clip, step, and update the scaler."""
        if self.max_norm is not None:
            if self.scaler is not None:
                for optimizer in self.all:
                    self.scaler.unscale_(optimizer)
            groups = [group for optimizer in self.all for group in optimizer.param_groups]
            parameters = [p for group in groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        for optimizer in self.all:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()


def _optimizers(optimizer: Any) -> list[Optimizer]:
    if optimizer is None:
        return []
    single = hasattr(optimizer, "step") or not isinstance(optimizer, Iterable)
    optimizers = [optimizer] if single else list(optimizer)
    if not optimizers:
        raise ValueError("optimizer is an empty list; pass None for a loop that steps by itself")
    for o in optimizers:
        if not all(hasattr(o, name) for name in ("step", "zero_grad", "param_groups")):
            raise TypeError(
                f"optimizer must be a torch optimizer or several, got {type(o).__name__}; "
                "for example torch.optim.SGD(model.parameters(), lr=0.1)"
            )
    return optimizers
