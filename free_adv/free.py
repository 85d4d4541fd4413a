"""The context object: settings, `replay`, `step`, `epochs` and the state."""

from __future__ import annotations

from collections.abc import Iterable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from free_adv import state as states
from free_adv.batch import as_paths
from free_adv.checks import Norm, Start, as_device, count, positive
from free_adv.delta import Delta
from free_adv.layer import attach
from free_adv.loop import Loop
from free_adv.replay import Replay
from free_adv.step import as_optimizers, as_scaler, step
from free_adv.threat import ThreatModel

Key = int | str | EllipsisType | tuple[int | str | EllipsisType, ...]
PIXELS = (0.0, 1.0)  # the default of `bounds`: an output perturbed `at` a module has no such range


class FreeAdversarial:
    """Adversarial training at the cost of natural training, inside your own loop.

    It sits beside the optimizer, as `torch.amp.GradScaler` does. Every minibatch is replayed *m* times; the one
    backward pass of a replay moves the weights down and `delta` up, and delta is carried on: Algorithm 1 of
    "Adversarial Training for Free!" (Shafahi et al. 2019, arXiv 1904.12843). Divide the epochs by *m*: `epochs`.
    A loop with a backward pass of its own needs only `replay`, which takes in its gradient.

    Args:
        optimizer: The optimizer that `step` drives, or several. None for a loop that steps by itself.
        eps: Radius of the perturbations in pixel units (those of `bounds`): `8/255` for [0, 1] images.
        replays: The paper's *m*, how often each minibatch is trained on: 8 on CIFAR, 4 on ImageNet.
        step_size: Length of an ascent step in pixel units. None means `eps`, as in the paper.
        norm: "linf" or "l2" (per sample).
        bounds: Lowest and highest valid pixel, before normalisation; None for no range. None with `at`.
        mean: The mean that the loader has subtracted, per channel; None if it does not normalise.
        std: The standard deviation that the loader has divided by, per channel.
        start: How delta begins a minibatch: "carry" goes on, as in the paper; "zero" or "uniform" (in the ball).
        scaler: A `torch.amp.GradScaler` for float16 autocast, driven by `step`.
        max_grad_norm: Clip the norm of the parameters' gradient in `step`. delta is never clipped by it.
        accumulate: Micro-batches per optimizer step; they are replayed as one minibatch.
        window: How many minibatches take turns: b1 .. bW, *m* times, an update after each. Each has a delta of
            its own, so that memory holds W minibatches and W deltas. 1 is the paper's loop.
        key: Where in a batch the input is: an index, a name, or a tuple of them for nested batches.
            A batch that is a tensor is the input itself. A list of keys names several inputs, such as two
            views. `...` stands for every element of a list, each *one sample without a batch dimension*:
            `key=(0, ...)` for a detector's `([image, ...], [target, ...])`.
        device: Where to move a batch, once for all its replays; pass it where the loop would move it. None
            leaves it.
        at: A module whose *output*, one tensor of shape (N, ...), is perturbed in place of the input: an
            embedding layer for text, the layer that makes floats of uint8 images. `eps` is in its units. Calls before
            a backward pass have rows of delta each; after one, a call goes on with those left, or begins again.

    Attributes:
        threat: The `ThreatModel` that `eps`, `norm`, `bounds`, `mean` and `std` make.

    Raises:
        ValueError, TypeError: A value is out of range or of the wrong type; the message names the cure.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = [(torch.rand(16, 1, 8, 8), torch.arange(16) % 10)]
        >>> free = FreeAdversarial(optimizer, eps=8 / 255, replays=4)
        >>> for epoch in range(free.epochs(8)):
        ...     for x, y in free.replay(loader):
        ...         free.step(torch.nn.functional.cross_entropy(model(x), y))
        >>> free.delta.shape, bool(free.delta.abs().max() <= 8 / 255 + 1e-7)
        (torch.Size([16, 1, 8, 8]), True)
    """

    threat: ThreatModel

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        eps: float,
        replays: int = 4,
        step_size: float | None = None,
        norm: Norm = "linf",
        bounds: Iterable[float] | None = PIXELS,
        mean: float | Iterable[float] | None = None,
        std: float | Iterable[float] | None = None,
        start: Start = "carry",
        scaler: GradScaler | None = None,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        window: int = 1,
        key: Key | list[Key] = 0,
        device: torch.device | str | int | None = None,
        at: nn.Module | None = None,
    ) -> None:
        bounds = None if at is not None and bounds is PIXELS else bounds
        self.threat = ThreatModel(eps, norm, bounds, mean, std)
        paths = as_paths(key)
        self._loop = Loop(
            delta=Delta(self.threat, step_size, start),
            replays=count("replays", replays),
            accumulate=count("accumulate", accumulate),
            window=count("window", window),
            paths=paths if at is None else None,
            several=at is None and (len(paths) > 1 or isinstance(key, list) or ... in paths[0]),
            device=None if device is None else as_device(device),
            optimizers=as_optimizers(optimizer),
            scaler=as_scaler(scaler),
            max_norm=None if max_grad_norm is None else positive("max_grad_norm", max_grad_norm),
        )
        if at is not None:
            attach(at, self._loop)

    def replay(self, loader: Iterable[Any]) -> Replay:
        """Wrap a loader so that each minibatch comes *m* times, its input perturbed by delta.

        Wrap last: after `accelerator.prepare`, after any prefetching. Its length is *m* times the loader's;
        other attributes are the loader's own. Every replay yields the batch in fresh containers.

        Args:
            loader: Any iterable of batches. The input, at `key`, has shape (N, ...) and a floating dtype;
                channels are dimension 1.

        Raises:
            RuntimeError: In the loop: no gradient came, or a newer replay was started.
            ValueError, TypeError: In the loop: no floating-point tensor at `key`, or one outside `bounds`.
        """
        return Replay(self._loop, loader)

    def step(self, loss: Tensor) -> None:
        """Move the weights and delta with one backward pass: use it instead of zero_grad, backward, step.

        With `accumulate`, call it for each micro-batch, the loss not divided: it is weighted by its share of the
        minibatch, and the optimizer moves after the last one.

        Args:
            loss: A scalar, the mean over the batch that `replay` has just yielded.

        Raises:
            RuntimeError: No optimizer, no replay to step for, or no gradient arrived. No weight has moved.
            TypeError, ValueError: `loss` is not a tensor, or not a scalar.
        """
        step(self._loop, loss)

    def skip(self) -> None:
        """Leave out the other replays of a minibatch that has failed, where its error is caught."""
        self._loop.skip()

    def report(self) -> dict[str, Any]:
        """What the replays have seen since the last report, as plain numbers; the first call begins to look.

        Returns:
            Lists by replay, nan where nothing was seen: `alignment`, the cosine of delta and the input gradient where it
            leads, mean over samples; `edge`, the share of delta at the edge of the ball; `loss`, as `step` sees it;
            and the numbers of `updates` and `skipped`. Each rank has its own.
        """
        return self._loop.report()

    def epochs(self, n: int) -> int:
        """Epochs over the replayed loader that cost as much as `n` natural ones: `ceil(n / m)`."""
        return -(-count("n", n) // self._loop.replays)

    @property
    def last(self) -> bool:
        """Whether the latest batch ends its group, and the weights move with it (no time for `no_sync`)."""
        group = self._loop.group
        return group is not None and (not group.slots or group.latest is None or group.latest[1])

    @property
    def delta(self) -> Tensor | Any:  # with a union each use would have to tell the types apart
        """A copy of the rows of delta that the latest batch used, in pixel units; None before the first.

        A list for several inputs. With `at` the rows of all calls, joined; a list if their shapes differ.
        """
        delta = self._loop.delta
        return self._loop.latest([delta[rows].reshape(x.shape) for x, rows in delta.latest])

    @property
    def clean(self) -> Tensor | Any:
        """A copy of the latest batch's input (output of `at`) without delta; a list where `delta` is one."""
        return self._loop.latest([x for x, _ in self._loop.delta.latest])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to go on where this one is.

        Taken between a batch and its `step`, it repeats that replay.

        Returns:
            A dict of tensors and plain values:

            - `version`: 2; `rank`: the rank and the number of ranks of the process group.
            - `settings`: those of the threat model and `replays`, which must be the same at loading.
            - `delta`: a list with one tensor per sample shape and place in the window, of shape (rows, ...), in
              pixel units; `places`: the place of each.
            - `window`: the minibatches in flight, each a list of batches, or None; `done`: updates made with them.
        """
        return states.dump(self._loop)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: the next `replay` first yields what is left of its minibatch.

        Raises:
            ValueError, TypeError: The state is malformed or was made with other settings. Nothing is changed.
        """
        states.load(self._loop, state)

    def __enter__(self) -> FreeAdversarial:
        return self

    def __exit__(self, *exc: object) -> None:
        """Drop delta and any batch in flight."""
        self._loop.clear()

    def __repr__(self) -> str:
        return f"FreeAdversarial({self.threat}, replays={self._loop.replays}, window={self._loop.window})"
