"""The context object: settings, `replay`, `step`, `epochs` and the state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from inspect import signature
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from free_adv import state as states
from free_adv.ascents import Objective, as_ascents
from free_adv.batch import as_paths
from free_adv.checks import Norm, Start, as_device, count, level, positive
from free_adv.delta import Delta, as_step_size
from free_adv.layer import attach
from free_adv.loop import Loop
from free_adv.replay import Replay, T
from free_adv.step import as_optimizers, as_scaler, step
from free_adv.threat import ThreatModel

Key = int | str | EllipsisType | tuple[int | str | EllipsisType, ...]
ASSIGNABLE = ("eps", "step_size", "ascents", "noise")
NO_CLIPPING = "; None does not clip"
PIXELS = (0.0, 1.0)  # the default of `bounds`: an output perturbed `at` a module has no such range


class FreeAdversarial:
    """Adversarial training at the cost of natural training, inside your own loop.

    It sits beside the optimizer, as `torch.amp.GradScaler` does. Every minibatch is replayed *m* times; the one
    backward pass of a replay moves the weights down and `delta` up, and delta is carried on: Algorithm 1 of
    "Adversarial Training for Free!" (Shafahi et al. 2019, arXiv 1904.12843). Train fewer epochs: `epochs`.
    A loop with a backward pass of its own needs only `replay`, which takes in its gradient. Where the loss is a
    function of the batch, an `objective` with `replays=1, ascents=1, start="zero", noise=2` (N-FGSM) is advised.

    Args:
        optimizer: The optimizer that `step` drives, or several. None for a loop that steps by itself.
        eps: Radius of the perturbations in pixel units (those of `bounds`): `8/255` for [0, 1] images.
        replays: The paper's *m*, how often each minibatch is trained on: 8 on CIFAR, 4 on ImageNet; 1 with `ascents`.
        step_size: Length of an ascent step in pixel units. None means `eps`, as in the paper.
        norm: "linf" or "l2" (per sample).
        bounds: Lowest and highest valid pixel, before normalisation; None for no range. None with `at`.
        mean: The mean that the loader has subtracted, as in `ThreatModel`: one number, one per channel, or a tensor that
            broadcasts over a sample, such as (C, 1, 1). None if it does not normalise.
        std: The standard deviation that the loader has divided by, in the same form.
        start: How delta begins a minibatch: "carry" goes on, as in the paper; "zero" or "uniform" (in the ball).
        ascents: How often delta climbs by `objective` alone, right before a micro-batch is first yielded. 0 is the
            paper's loop; with `replays=1` it is adversarial training by FGSM (1) or PGD (more).
        objective: `f(batch) -> loss`, what the ascents climb: it gets the perturbed batch as the loop would and returns
            a scalar, such as `criterion(model(batch[0]), batch[1])`, inside autocast if the loop's is.
        noise: Radius, in units of `eps`, of uniform noise that is drawn once a minibatch and added beside delta: not
            held in the ball, only in the bounds. 2 in N-FGSM (de Jorge et al. 2022, arXiv 2202.01181).
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
            embedding layer for text, the layer that makes floats of uint8 images. `eps` is in its units. A call that is
            given a tensor of the batch, or some of its samples, has the delta of those samples, in whichever pass and
            order it comes; any other call is known by its number since the last backward pass. Pass `device` where
            the loop moves the batch: a copy is not recognised.

    `eps` and `step_size` can be assigned between two batches and count from the next replay on: delta is projected into
    a smaller ball, `step_size=None` follows `eps`. `ascents` and `noise` count from the next minibatch on. `replays` and
    `window` can be read.

    Raises:
        ValueError, TypeError: A value is out of range or of the wrong type; the message names the cure.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = [(torch.rand(16, 1, 8, 8), torch.arange(16) % 10)]
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> free = FreeAdversarial(  # the paper's own setting is replays=8, and not the next four
        ...     optimizer, eps=8 / 255, replays=1, ascents=1, start="zero", noise=2,
        ...     objective=lambda batch: criterion(model(batch[0]), batch[1]),
        ... )
        >>> for epoch in range(free.epochs(8)):
        ...     for x, y in free.replay(loader):
        ...         free.step(criterion(model(x), y))
        >>> free.delta.shape, bool(free.delta.abs().max() <= 8 / 255 + 1e-7)
        (torch.Size([16, 1, 8, 8]), True)
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        eps: float,
        replays: int = 4,
        step_size: float | None = None,
        norm: Norm = "linf",
        bounds: Iterable[float] | None = PIXELS,
        mean: float | Iterable[Any] | None = None,
        std: float | Iterable[Any] | None = None,
        start: Start = "carry",
        ascents: int = 0,
        objective: Objective | None = None,
        noise: float = 0.0,
        scaler: GradScaler | None = None,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        window: int = 1,
        key: Key | list[Key] = 0,
        device: torch.device | str | int | None = None,
        at: nn.Module | None = None,
    ) -> None:
        bounds = None if at is not None and bounds is PIXELS else bounds
        threat = ThreatModel(eps, norm, bounds, mean, std)
        paths = as_paths(key)
        self._loop = Loop(
            delta=Delta(threat, step_size, start),
            replays=count("replays", replays),
            accumulate=count("accumulate", accumulate),
            window=count("window", window),
            paths=paths if at is None else [],
            several=at is None and (len(paths) > 1 or isinstance(key, list) or ... in paths[0]),
            device=None if device is None else as_device(device),
            optimizers=as_optimizers(optimizer),
            scaler=as_scaler(scaler),
            max_norm=None
            if max_grad_norm is None
            else positive("max_grad_norm", max_grad_norm, NO_CLIPPING),
            ascents=as_ascents(ascents, objective),
            objective=objective,
            noise=level("noise", noise),
        )
        if at is not None:
            attach(at, self._loop)

    def replay(self, loader: Iterable[T]) -> Replay[T]:
        """Wrap a loader so that each minibatch comes *m* times, its input perturbed by delta.

        Wrap last: after `accelerator.prepare`, after any prefetching. Its length is *m* times the loader's;
        other attributes are the loader's own. Every replay yields the batch in fresh containers, with fresh tensors and
        NumPy arrays, also in an object's attributes and the containers there; what holds none is passed on as it is.

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
        minibatch, and the optimizer moves after the last one. Gradients that other backward passes have made since the
        batch was yielded count in full. `p.grad` can be read afterwards, until the next update's first batch is asked for.

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
            `ascents`, the alignment at each of them; and the numbers of `updates` and `skipped`. Each rank has its own.
        """
        return self._loop.report.read(self._loop.replays)

    def epochs(self, n: int) -> int:
        """Epochs over the replayed loader that cost as much as `n` natural ones: `ceil(n / (m + 2/3 ascents))`.

        An ascent costs two thirds of a pass: its backward pass makes no gradients of weights. Warns where rounding up
        costs over 1.25 n.
        """
        cost = self.replays + 2 * self.ascents / 3
        made = math.ceil(count("n", n) / cost - 1e-9)
        self._loop.hints.of_the_epochs(n, made, cost)
        return made

    @property
    def threat(self) -> ThreatModel:
        """The `ThreatModel` that `eps`, `norm`, `bounds`, `mean` and `std` make."""
        return self._loop.delta.threat

    @property
    def eps(self) -> float:
        """The radius of the perturbations."""
        return self.threat.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._loop.settle().delta.enter(dataclasses.replace(self.threat, eps=value))

    @property
    def step_size(self) -> float:
        """The length of an ascent step; assign None to have it follow `eps`."""
        return self._loop.delta.length

    @step_size.setter
    def step_size(self, value: float | None) -> None:
        self._loop.settle().delta.step_size = as_step_size(value)

    @property
    def ascents(self) -> int:
        """How often delta climbs before a minibatch; assigned, it holds from the next minibatch on."""
        return self._loop.ascents

    @ascents.setter
    def ascents(self, value: int) -> None:
        self._loop.ascents = as_ascents(value, self._loop.objective)

    @property
    def noise(self) -> float:
        """The radius of the noise, in units of `eps`; assigned, it holds from the next minibatch on."""
        return self._loop.noise

    @noise.setter
    def noise(self, value: float) -> None:
        self._loop.noise = level("noise", value)

    @property
    def replays(self) -> int:
        """The paper's *m*: how often each minibatch is trained on."""
        return self._loop.replays

    @property
    def window(self) -> int:
        """How many minibatches take turns."""
        return self._loop.window

    @property
    def turn(self) -> int | None:
        """Which replay of its minibatch the batch yielded last is, 0 to m - 1, until the next is asked for.

        None before the first.
        """
        flight = self._loop.flight
        self._loop.hints.of_the_turn({visit.stop.turn for visit in flight.waiting})
        return None if flight.latest is None else flight.latest.turn

    @property
    def last(self) -> bool:
        """Whether the latest batch ends its group, and the weights move with it (no time for `no_sync`)."""
        flight = self._loop.flight
        return bool(flight.minibatches) and (flight.latest is None or flight.latest.ends)

    @property
    def delta(self) -> Tensor | Any:  # with a union each use would have to tell the types apart
        """A copy of the rows of delta that the latest batch used, in pixel units; None before the first.

        A list for several inputs. With `at` the rows of all calls, joined; a list if their shapes differ.
        """
        return self._loop.moved(delta=True)

    @property
    def clean(self) -> Tensor | Any:
        """A copy of the latest batch's input (output of `at`) without delta; a list where `delta` is one."""
        return self._loop.moved(delta=False)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to go on where this one is.

        Taken between a batch and its `step`, it repeats that replay.

        Returns:
            A dict of tensors and plain values:

            - `version`: 3; `rank`: the rank and the number of ranks of the process group.
            - `settings`: those of the threat model, `step_size`, `ascents`, `noise` and `replays`. A loading object takes over `eps`,
              `step_size`, `ascents` and `noise`; the others must be its own.
            - `delta`: a list of tensors of shape (rows, ...), in pixel units; `places`: where each belongs, the
              numbers of the minibatch in the window and of the micro-batch in it, and the path of the input or the
              number of the call; `begun`: how many of its rows the minibatches in flight have begun with; `noise`: what
              lies beside those rows.
            - `minibatches`: those in flight, each a list of batches, or None; `done`: updates made with them.
        """
        return states.dump(self._loop)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: the next `replay` first yields what is left of its minibatch.

        Brings `eps`, `step_size`, `ascents` and `noise`. An iterator that is under way ends.

        Raises:
            ValueError, TypeError: The state is malformed or was made with other settings. Nothing is changed.
        """
        with torch.inference_mode(False):  # its tensors could never want a gradient
            states.load(self._loop, state)

    def __enter__(self) -> FreeAdversarial:
        return self

    def __exit__(self, *exc: object) -> None:
        """Drop delta and any batch in flight."""
        self._loop.clear()

    def __repr__(self) -> str:
        return f"FreeAdversarial({self.threat}, replays={self._loop.replays}, window={self._loop.window})"

    def __setattr__(self, name: str, value: Any) -> None:
        arguments = signature(FreeAdversarial).parameters
        mine = name in arguments or hasattr(FreeAdversarial, name)
        derived = type(self) is not FreeAdversarial and not mine  # a subclass's own
        if name in ASSIGNABLE or name.startswith("_") or derived:
            super().__setattr__(name, value)
            return
        cure = "there is no such attribute, only eps, step_size, ascents and noise can be assigned"
        if name in arguments:
            cure = f"make a new FreeAdversarial(..., {name}=...)"
            if name in ("key", "at"):
                cure += "; delta begins anew"
            elif name not in states.settings(self._loop):
                cure += " and go on with new.load_state_dict(free.state_dict())"
        elif name == "threat":
            cure = (
                "assign eps, or make a new FreeAdversarial with another norm, bounds, mean and std"
            )
        elif hasattr(FreeAdversarial, name):
            cure = "it can only be read"
        raise AttributeError(f"FreeAdversarial.{name} cannot be assigned: {cure}")
