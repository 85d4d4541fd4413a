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
    group = loop.settle()
    waiting = [i for i, slot in enumerate(group.slots) if slot.waits] if group else []
    if group is None or not waiting:
        made = group is not None and (group.past or group.slots)
        raise RuntimeError(
            "step() makes the backward pass itself, and that of this batch is made: leave out loss.backward(), or "
            "the second call of step()"
            if made
            else "step() expects one call for each batch of replay(): call it once inside "
            "`for x, y in free.replay(loader):`"
        )
    scalar("loss", loss)
    index, stepping = waiting[0], False
    turn, part = group.order[0]
    ends = index == len(part) - 1
    try:
        if index == 0:
            for optimizer in loop.optimizers:
                optimizer.zero_grad()
        sizes = group.sizes[part.start : part.stop]
        if len(part) > 1 and any(sizes):  # its share of the mean over the minibatch
            loss = loss * (sizes[index] / sum(sizes))
        scaled = loss if loop.scaler is None else loop.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]
        if group.slots[index].waits:
            raise RuntimeError(f"the input received no gradient from this loss.\n{CURES}")
        if ends:
            stepping = Loop.moving = True
            _move_weights(loop)
    except BaseException:  # the weights have not moved: this replay has not been made
        for slot in group.slots[: index + 1]:
            slot.forget()
        if stepping and loop.scaler is not None:  # or it takes the next gradients for unscaled ones
            loop.scaler.update(loop.scaler.get_scale())
        raise
    finally:
        Loop.moving = False
    if loop.tally is not None:
        loop.tally.loss(turn, loss)
    if ends:
        loop.stepped = True
        group.take_in(loop.tally)


def _move_weights(loop: Loop) -> None:
    """Unscale, clip, step, and update the scaler."""
    scaler = loop.scaler
    if loop.max_norm is not None:
        if scaler is not None:
            for optimizer in loop.optimizers:
                scaler.unscale_(optimizer)
        groups = [group for optimizer in loop.optimizers for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, loop.max_norm)
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
