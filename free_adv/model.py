"""The classifier that is attacked: kept still meanwhile, and refused if its answers are not logits."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from free_adv.checks import describe

Model = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def undisturbed(
    model: Any, device: torch.device, foreign: bool = False
) -> Iterator[Callable[[], None]]:
    """Run a model in evaluation mode; leave modes, gradients, buffers and random state as they were.

    Args:
        model: A module, or a callable that runs some: those that can be found are still from the beginning; if
            there are none, whichever is called.
        device: Where random numbers are drawn, beside the host.
        foreign: Whether code of somebody else's runs, which may change modes and buffers.

    Yields:
        A function that puts all modules into evaluation mode again, with their buffers.
    """
    modes: dict[nn.Module, bool] = {}
    grads: dict[int, tuple[nn.Parameter, Tensor | None]] = {}
    buffers: list[tuple[Tensor, Tensor]] = []

    def still(module: nn.Module, *_: Any) -> None:
        if module not in modes:
            modes[module] = module.training
            for p in module.parameters(recurse=False):  # an attack's backward() would add to it
                grads.setdefault(id(p), (p, p.grad))
                p.grad = None
            if foreign:
                buffers.extend((b, b.detach().clone()) for b in module.buffers(recurse=False))
        module.training = False

    def all_still() -> None:
        for module in [*modes]:
            still(module)
        with torch.no_grad():
            for buffer, was in buffers:
                if not torch.equal(buffer, was):
                    buffer.copy_(was)

    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "an attack needs gradients, which torch.inference_mode() forbids: call it outside, or under "
            "torch.no_grad(); in Lightning, Trainer(inference_mode=False)"
        )
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.enable_grad(),
        contextlib.ExitStack() as ends,
    ):
        try:
            for module in modules(model):
                still(module)
            if not modes:  # a global hook, which a compiled module would not like
                ends.callback(register_module_forward_pre_hook(still).remove)
            yield all_still
        finally:
            all_still()
            for module, mode in reversed(modes.items()):  # a compiled module shares its mode
                module.training = mode
            for p, grad in grads.values():
                p.grad = grad


def modules(model: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a callable runs, as far as they can be found from it."""
    inner: list[Any] = []
    if isinstance(model, nn.Module):
        yield from model.modules()
    elif depth == 0 or isinstance(model, type | ModuleType | Tensor):
        return
    elif isinstance(model, functools.partial):
        inner = [model.func, *model.args, *model.keywords.values()]
    elif inspect.ismethod(model):
        inner = [model.__self__]
    elif inspect.isfunction(model):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            known = inspect.getclosurevars(model)
            inner = [*known.nonlocals.values(), *known.globals.values()]
    elif isinstance(model, list | tuple):
        inner = [*model]
    else:
        inner = [*(model if isinstance(model, dict) else getattr(model, "__dict__", {})).values()]
    for value in inner:
        yield from modules(value, depth - 1)


def logits(output: Any, samples: int) -> Tensor:
    """What a model returned, if it is what a classifier returns: logits of shape (N, classes)."""
    if not isinstance(output, Tensor):
        take = "[0]" if isinstance(output, list | tuple) else ".logits"
        if isinstance(output, Mapping):
            take = repr([next((k for k in ("logits", *output) if k in output), "logits")])
        raise TypeError(
            f"model must return logits of shape (N, classes), got a {type(output).__name__}; "
            f"pass lambda x: model(x){take}"
        )
    if output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1):
        z = "z" if output.ndim == 2 else "z[:, None]"
        raise ValueError(
            f"model must return logits of two classes or more, got {describe(output)}; for one output with a "
            f"threshold at 0 write a wrapper: z = model(x); return torch.cat([-{z}, {z}], 1)"
        )
    if output.ndim != 2 or len(output) != samples or not output.is_floating_point():
        raise ValueError(
            f"model must return logits of shape (N, classes) for {samples} samples, got {describe(output)}; "
            "only classifiers can be evaluated: of a map of logits take one row a sample, for instance its "
            "mean over the places"
        )
    return output


def labels(y: Any, samples: int, classes: int | None, device: torch.device) -> Tensor:
    """Class indices of shape (N,), as whole numbers from 0 to the number of classes less 1."""
    y = torch.as_tensor(y, device=device)
    if y.ndim == 2 and y.shape[1] == 1 and samples == len(y):
        raise ValueError(
            f"labels y must be class indices of shape (N,), got {describe(y)}; y[:, 0]"
        )
    if y.ndim == 2:
        raise ValueError(
            f"labels y must be class indices of shape (N,), got {describe(y)}; of one-hot or soft labels "
            "take y.argmax(1)"
        )
    if y.ndim != 1 or len(y) != samples:
        raise ValueError(
            f"labels y must be class indices of shape (N,) for {samples} samples, got {describe(y)}"
        )
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"labels y must be whole numbers, got {describe(y)}; y.long()")
    whole: Tensor = y.long()
    if len(whole) and classes is not None:
        low, high = (int(v) for v in whole.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels y run from {low} to {high}, but the model has {classes} classes, 0 to {classes - 1}; "
                "leave out images without a class, and count classes from 0"
            )
    return whole
