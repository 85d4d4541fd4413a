"""The perturbation of a module's output, for what has no continuous input."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from free_adv.batch import tensors
from free_adv.loop import Loop


def attach(module: nn.Module, loop: Loop) -> None:
    """Perturb the output of `module` in the replays of `loop`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"at must be a torch.nn.Module, got {type(module).__name__}")
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Hook):  # of an older object: two would move it further than eps
            del module._forward_hooks[key]
    module.register_forward_hook(Hook(loop), with_kwargs=True)


class Hook:
    """A forward hook that adds delta to the output of its module while a batch waits for its gradient.

    It does nothing when there is nothing to train: between the gradient and the next batch, in eval
    mode, where gradients are off, and in copies of the module, such as that of a moving average.
    """

    def __init__(self, loop: Loop | None) -> None:
        self._loop = (lambda: None) if loop is None else weakref.ref(loop)
        # What is in flight must not become part of a compiled graph.
        self._eager = torch.compiler.disable(self._perturb)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """See `torch.nn.Module.register_forward_hook`."""
        # Constants to a compiler, whose graph has no break in evaluation.
        bare = not torch.is_grad_enabled()
        if not module.training or (bare and torch.compiler.is_compiling()):
            return None
        result: Tensor | None = self._eager(module, (args, kwargs), output, bare)
        return result

    def _perturb(self, module: nn.Module, given: Any, output: Any, bare: bool) -> Tensor | None:
        loop = self._loop()
        if loop is None or loop.newest is None or not loop.flight.minibatches:
            return None  # no loop is running
        args = [t for _, t in tensors(given)]
        if bare:
            loop.hints.of_a_bare_call(args)
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"at must be a module whose output is one tensor, but {type(module).__name__} gave "
                f"{type(output).__name__}; choose one inside it, such as its embedding layer"
            )
        # In a backward pass it is a checkpoint that runs the module again.
        again = torch._C._current_graph_task_id() != -1
        return loop.flight.again(output, args) if again else loop.flight.call(output, args)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)  # a copied or saved module is not in the loop
