"""`step`: one backward pass, the optimizers, loss scaling and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from free_adv.checks import CURES, scalar
from free_adv.loop import Loop


def step(loop: Loop, loss: Tensor) -> None:
    """See `FreeAdversarial.step`."""
    if not loop.optimizers:
        raise RuntimeError(
            "step() needs an optimizer: FreeAdversarial(optimizer, eps=...), or call "
            "loss.backward() and optimizer.step() yourself"
        )
    loop.driven = True
    flight = loop.settle()
    flight.outside("step")
    index = next((i for i, visit in enumerate(flight.waiting) if visit.waits), None)
    if index is None:
        raise RuntimeError(
            "step() makes the backward pass itself, and that of this batch is made: leave out loss.backward(), or "
            "the second call of step(); a term of the loss that depends on the batch is added to the loss"
            if flight.past or flight.waiting
            else "step() expects one call for each batch of replay(): call it once inside "
            "`for x, y in free.replay(loader):` of the same object"
        )
    scalar("loss", loss)
    visit, stepping = flight.waiting[index], False
    later = [other for other in flight.waiting[index + 1 :] if other.waits]
    turn, _, micro, ends = visit.stop
    try:
        if loop.spent and micro == 0:  # of a step that has failed
            loop.clean_weights()
        loop.hints.of_the_sum(micro)
        loop.spent = True
        scaled = loss * flight.share(visit) if micro or not ends else loss
        scaled = scaled if loop.scaler is None else loop.scaler.scale(scaled)
        scaled.backward()  # type: ignore[no-untyped-call]
        if visit.waits:
            raise RuntimeError(f"the input received no gradient from this loss.\n{CURES}")
        if not all(other.waits for other in later):
            raise RuntimeError(
                "this loss is of several batches of the replay: call step() once for each, with the loss of that "
                "batch alone; accumulate= adds their gradients up"
            )
        loop.hints.sums(loop, ends)
        if ends:
            stepping = Loop.moving = True
            _move_weights(loop)
    except BaseException:  # the weights have not moved: this replay has not been made
        for visit in (*flight.waiting[: index + 1], *(v for v in later if not v.waits)):
            visit.forget()
        if stepping and loop.scaler is not None:  # or it takes the next gradients for unscaled ones
            loop.scaler.update(loop.scaler.get_scale())
        raise
    finally:
        Loop.moving = False
    loop.report.loss(turn, loss)
    if ends:
        loop.settle()
        if flight.waiting or not loop.alone:  # nobody asks for a batch before the next update
            loop.clean_weights()


def _move_weights(loop: Loop) -> None:
    """Unscale, clip, step, and update the scaler."""
    scaler = loop.scaler
    if loop.max_norm is not None:
        if scaler is not None:
            for optimizer in loop.optimizers:
                scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(loop.parameters, loop.max_norm)
    for optimizer in loop.optimizers:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    if scaler is not None:
        scaler.update()


def as_scaler(scaler: Any) -> GradScaler | None:
    """The argument `scaler`."""
    if scaler is not None and not hasattr(scaler, "unscale_"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    return scaler  # type: ignore[no-any-return]


def as_optimizers(optimizer: Any) -> list[Optimizer]:
    """The argument `optimizer`: none, one or several."""
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
