"""The model under attack: found wherever a callable leads, kept still, and left as it was."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from free_adv.hints import warn

T = TypeVar("T")
Kept = list[tuple[nn.Module, dict[str, tuple[Any, Tensor | None]]]]  # buffers, with their values

LEAVES = (str, bytes, int, float, complex, type(None), CodeType, ModuleType, Tensor)
HOLDERS = (list, tuple, dict, set, FunctionType, MethodType, functools.partial, nn.Module)
REGISTERED = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
MANY = 1000  # a container of more is data
FAR = 3000  # objects


class Subject:
    """A model in evaluation mode; on leaving, its modes, gradients, buffers and random state are as they were.

    Modules that other threads run meanwhile are none of its own.

    Args:
        model: A module, or any callable that runs some. Those that it leads to are still from the beginning, and
            any other from its first call on.
        device: Where random numbers are drawn, beside the host and where the model is.

    Attributes:
        eager: Whether compiled code stood back in a call, so that another may be rounded otherwise.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.modes: dict[nn.Module, bool] = {}  # outer ones first
        self.roots: list[nn.Module] = []
        self.grads: dict[int, tuple[nn.Parameter, Tensor | None, bool]] = {}
        self.found: Kept = []  # buffers as they were
        self.begun: Kept = []  # and in evaluation mode
        self.weights: list[tuple[str, nn.Parameter, tuple[int, str | None]]] = []
        self.watched: set[bool] = set()  # whether there was a gradient in the calls so far
        self.hidden = self.eager = False

    def __call__(self, x: Tensor) -> Any:
        """The output for a copy of `x`, which the model may change."""
        known = not self.hidden and torch.is_grad_enabled() in self.watched
        with contextlib.nullcontext() if known else self.watching():
            return self.model(x.clone())

    def __enter__(self) -> Subject:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "an attack needs gradients, which torch.inference_mode() forbids: call it outside, or under "
                "torch.no_grad(); in Lightning, Trainer(inference_mode=False)"
            )
        modules = [*within(self.model, nn.Module)]
        devices = {p.device for module in modules for p in module.parameters(recurse=False)}
        with contextlib.ExitStack() as ends:
            ends.enter_context(torch.random.fork_rng([]))
            for device in devices | {self.device}:
                # Known to torch are the random states of devices with a module of this kind.
                if hasattr(getattr(torch, device.type, None), "get_rng_state_all"):
                    forked = torch.random.fork_rng([device], device_type=device.type)
                    ends.enter_context(forked)
            ends.enter_context(torch.enable_grad())
            try:
                for module in modules:
                    self.hold(module)
            except BaseException:
                self.release()
                raise
            self.ends = ends.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self.ends:
            self.release()
            moved = [name for name, p, was in self.weights if was != _mark(p, was[1] is not None)]
        if moved:
            warn(
                f"the model's own eval() and train(), or its forward pass, have changed {len(moved)} of its weights, "
                f"{moved[0]} first, as adapters do that are merged and unmerged: a run that goes on from here "
                "differs by rounding from one without this call. To keep the weights, judge a copy.deepcopy(model)"
            )

    def hold(self, root: nn.Module) -> None:
        """Keep a module still, with all inside of it."""
        if root in self.modes or not hasattr(root, "training"):
            return
        new = [m for m in root.modules() if m not in self.modes and hasattr(m, "training")]
        self.modes = {m: m.training for m in new} | self.modes
        self.roots.append(root)
        own = [m for m in new if _switches(m)]
        summed = {id(p) for m in own for p in m.parameters()}
        weights = dict(root.named_parameters())
        for name, p in weights.items():
            if isinstance(p, nn.Parameter) and id(p) not in self.grads:
                self.grads[id(p)] = p, p.grad, p.requires_grad
                p.grad = None  # an attack's backward() would add to it
                if not nn.parameter.is_lazy(p):
                    self.weights.append((name, p, _mark(p, id(p) in summed)))
        # In a call by torch.func other tensors are in their places.
        kept = new if all(isinstance(p, nn.Parameter) for p in weights.values()) else []
        found = _buffers(kept)
        _switch(root, False)
        self.found += found
        self.begun += _buffers(kept) if own else found
        for module in new:
            if isinstance(module, DistributedDataParallel):
                # It would wait for other ranks, whose number of passes may differ.
                module.forward = module.module.__call__  # type: ignore[method-assign]

    def still(self) -> None:
        """Into evaluation mode again, with its buffers, whatever an attack has done."""
        for root in self.roots:
            if any(m.training for m in root.modules() if m in self.modes):
                _switch(root, False)
        _put_back(self.begun)

    def release(self) -> None:
        """Leave all as it was found."""
        for module, mode in self.modes.items():
            if isinstance(module, DistributedDataParallel):
                vars(module).pop("forward", None)
            if module.training != mode:
                _switch(module, mode)
        for module, mode in self.modes.items():
            if module.training != mode:  # where a train() of its own would have it otherwise
                module.training = mode
        _put_back(self.found)
        for p, grad, trained in self.grads.values():
            p.grad = grad
            if p.requires_grad != trained:  # by a train() that freezes, or an attack
                p.requires_grad_(trained)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hold whatever runs meanwhile. Compiled code would not like the hook, so that nothing compiled runs."""
        thread = threading.get_ident()

        def watch(module: nn.Module, _: Any) -> None:
            mine = threading.get_ident() == thread
            if mine and module not in self.modes and hasattr(module, "training"):
                self.hidden = True
                self.hold(module)

        self.watched.add(torch.is_grad_enabled())
        with contextlib.ExitStack() as ends:
            if "torch._dynamo" in sys.modules:  # else there is nothing compiled
                if not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
                    yield
                    return
                self.eager = True
                ends.enter_context(torch.compiler.set_stance("force_eager"))
                ends.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", "Using `torch.compile")
            ends.enter_context(register_module_forward_pre_hook(watch))
            yield


def within(root: Any, kind: type[T]) -> Iterator[T]:
    """The objects of a kind that `root` leads to, the nearest first; none of its code runs."""
    coming: deque[Any] = deque([root])
    seen: dict[int, Any] = {}  # it keeps them alive, so that no other gets their id
    far = 0
    while coming and far < FAR:
        value = coming.popleft()
        if id(value) not in seen and not isinstance(value, LEAVES):
            seen[id(value)] = value
            far += not isinstance(value, nn.Module)
            if isinstance(value, kind):
                yield value
            coming.extend(_inner(value))


def _inner(value: Any) -> list[Any]:
    """What an object holds; of a function also what it names, of an instance what its class holds."""
    if isinstance(value, nn.Module):  # not what is far from it, such as its trainer
        names: Any = vars(value).keys() - REGISTERED
        if type(value).__module__.startswith("torch.nn."):  # where the rest is numbers
            names = ("_forward_hooks", "_forward_pre_hooks")
        own = [v for v in map(vars(value).get, names) if isinstance(v, HOLDERS)]
        return [*value.children(), *(v for v in own if isinstance(v, nn.Module) or v)]
    if isinstance(value, FunctionType):
        codes, known = [value.__code__], value.__globals__
        for code in codes:  # it grows by those of functions inside
            codes.extend(c for c in code.co_consts if isinstance(c, CodeType))
        names = dict.fromkeys(name for code in codes for name in code.co_names)
        held = (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value))
        return [*held, *(known[name] for name in names if name in known)]
    if isinstance(value, type):
        attributes = (v for c in value.__mro__ for v in vars(c).values())
        return [v for v in attributes if not isinstance(v, FunctionType)]
    if isinstance(value, list | tuple | dict | set | frozenset) and len(value) > MANY:
        return []
    called = getattr(type(value), "__call__", None)  # noqa: B004
    return [*gc.get_referents(value), called if isinstance(called, FunctionType) else None]


def _switch(module: nn.Module, mode: bool) -> None:
    """Into a mode by its own train() or eval(), but for what has none, as modules that torch.export has made."""
    try:
        module.train() if mode else module.eval()
    except NotImplementedError:
        for inner in module.children():
            _switch(inner, mode)


def _switches(module: nn.Module) -> bool:
    """Whether a module's eval() or train() may do more than those of torch."""
    modules = (getattr(f, "__module__", None) or "" for f in (module.eval, module.train))
    return not all(name.startswith("torch.") for name in modules)


def _mark(p: nn.Parameter, summed: bool) -> tuple[int, str | None]:
    """By which to see that a weight has changed: its version, which `data` evades, or its sum."""
    plain = type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta
    if not summed or not plain:
        return 0 if p.is_inference() else p._version, None
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    return 0, str(p.detach().sum(dtype=wide).item())  # as text, in which NaN is NaN


def _buffers(modules: list[nn.Module]) -> Kept:
    """The buffers of modules, each with a copy if it is one that can be written to."""

    def copied(b: Any) -> Tensor | None:
        odd = b is None or nn.parameter.is_lazy(b) or b.is_meta or b.layout != torch.strided
        return None if odd or b.is_inference() or 0 in b.stride() else b.detach().clone()

    return [
        (m, {name: (b, copied(b)) for name, b in m._buffers.items()}) for m in modules if m._buffers
    ]


def _put_back(kept: Kept) -> None:
    """Buffers as they were; only a cache, which no state holds, may have come or grown."""
    for module, before in kept:
        caches = getattr(module, "_non_persistent_buffers_set", ())
        now = dict(module._buffers.items())
        for name, (buffer, was) in before.items():
            if now.get(name) is not buffer:
                shapes = [getattr(b, "shape", None) for b in (buffer, now.get(name))]
                if name not in caches or shapes[0] == shapes[1]:
                    module._buffers[name] = buffer
            if was is not None:
                if buffer.shape != was.shape:
                    buffer.resize_(was.shape)
                buffer.data.copy_(was)  # no new version: a graph that holds it does not mind
