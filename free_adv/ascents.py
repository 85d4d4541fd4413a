"""Ascents of delta alone, by the gradient of an objective, right before a micro-batch is first yielded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.amp import GradScaler
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from free_adv.checks import count, describe
from free_adv.flight import Flight
from free_adv.report import Report

INSIDE = ", and pass the module given as at, in training mode; a checkpoint round it needs use_reentrant=False"

Objective = Callable[[Any], Tensor]


def climb(flight: Flight, objective: Objective, scaler: GradScaler | None, report: Report) -> None:
    """Move delta of the batch that is yielded next up the objective, as often as the flight says.

    The model is run on the weights of this moment, in the mode that it is in; gradients of weights are not touched.
    """
    with flight.climb():
        for number in range(flight.ascents):
            _ascend(flight, objective, scaler, report, number)


def _ascend(
    flight: Flight, objective: Objective, scaler: GradScaler | None, report: Report, number: int
) -> None:
    with flight.rehearsal() as (visit, batch), torch.enable_grad(), _alone():
        loss = _scalar(objective(batch))
        loss = loss if scaler is None else scaler.scale(loss)
        leaves = [*visit.leaves.values()]
        grads: tuple[Tensor | None, ...] = ()
        if leaves and loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        if not any(g is not None for g in grads) or (None in grads and not visit.inside):
            raise RuntimeError(
                "the objective gave delta no gradient: its loss must come from the batch that it is given (from every "
                "input that key= names), with gradients on, not from the loader's own or from x.detach()"
                + (INSIDE if visit.inside else "")
            )
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        for rows, grad in visit.gradients():
            report.ascent(number, flight.delta[rows], grad, flight.delta.threat)
            flight.delta.ascend(rows, grad)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A pass that makes no gradients of weights, for which DDP must not wait: as its own `no_sync`, wherever it is."""
    found: list[tuple[Any, bool]] = []

    def quieten(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            found.append((module, module.require_backward_grad_sync))
            module.require_backward_grad_sync = False

    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    handle = register_module_forward_pre_hook(quieten)
    try:
        yield
    finally:
        handle.remove()
        for module, sync in reversed(found):
            module.require_backward_grad_sync = sync


def as_ascents(value: Any, objective: Any) -> int:
    """The argument `ascents`, which needs the other."""
    ascents = count("ascents", value, least=0)
    if objective is not None and not callable(objective):
        raise TypeError(f"objective must be callable, got {type(objective).__name__}")
    if ascents and objective is None:
        raise ValueError(
            f"ascents={ascents} needs an objective: FreeAdversarial(..., objective=f) with f(batch) -> loss, for "
            "example lambda batch: criterion(model(batch[0]), batch[1])"
        )
    return ascents


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"objective must return a loss, a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"objective must return a scalar, got {describe(loss)}; take its mean()")
    return loss
