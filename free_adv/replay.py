"""The replay iterator: reads minibatches and yields each m times."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from free_adv.batches import move
from free_adv.minibatch import Flight, Minibatch


class Replay:
    """A loader whose minibatches come m times each, with x perturbed; `FreeAdversarial.replay` makes it.

    Attributes that it does not own are read from and written to the wrapped loader.
    """

    _flight: Flight
    _loader: Iterable[Any]
    _warned: bool

    def __init__(self, flight: Flight, loader: Iterable[Any]) -> None:
        if isinstance(loader, Replay):
            raise ValueError("loader is a replay already: iterate it as it is, or wrap its loader")
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            module = hasattr(loader, "train_dataloader")  # a data module of Lightning
            cure = ": wrap what its train_dataloader() returns" if module else ""
            raise TypeError(f"loader must be iterable, got {type(loader).__name__}{cure}")
        self.__dict__.update(_flight=flight, _loader=loader, _warned=False)

    def __len__(self) -> int:
        return self._flight.replays * len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        flight = self._flight
        if not self._warned and _unsharded(self._loader):
            self.__dict__["_warned"] = True
            warnings.warn(
                "every rank trains on all the data: this DataLoader is not split between the ranks of "
                "the process group. Call replay() after accelerator.prepare, or give the DataLoader a "
                "DistributedSampler; ignore this if the dataset itself is already split by rank",
                stacklevel=2,
            )
        source = _Source(self._loader, flight)  # if the loader raises here, nothing has changed
        me = flight.open()
        try:
            while minibatch := flight.minibatch or source.read():
                while minibatch.left:
                    if torch.is_inference_mode_enabled():
                        raise RuntimeError(
                            "replay() was iterated under torch.inference_mode(), where nothing "
                            "receives a gradient: iterate it outside"
                        )
                    batch = minibatch.next()
                    source.mark(last=not minibatch.left)
                    flight.resumed = False
                    yield batch
                    if flight.newest is not me:
                        raise RuntimeError(
                            "this replay was replaced by a newer one of the same FreeAdversarial: iterate "
                            "the newest, and give loops that run side by side one object each"
                        )
                    if flight.minibatch is not minibatch:  # skipped
                        break
                    minibatch.demand()
                flight.minibatch = None
        finally:
            if flight.newest is me:
                flight.newest = None

    def __getattr__(self, name: str) -> Any:
        if name in ("_flight", "_loader"):  # not set up yet: copy and pickle look here first
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __repr__(self) -> str:
        return f"Replay({self._loader!r}, replays={self._flight.replays})"


class _Source:
    """The wrapped loader while it is read."""

    def __init__(self, loader: Any, flight: Flight) -> None:
        self.loader = loader
        self.flight = flight
        self.batches = iter(loader)
        self.left = length_hint(loader, 0) if flight.accumulate > 1 else 0  # no other needs it
        self.ended = False

    def read(self) -> Minibatch | None:
        """The next minibatch: one batch, or up to `accumulate`; the loader is read no further."""
        flight = self.flight
        flight.forget()
        wanted = min(flight.accumulate, self.left) or flight.accumulate
        batches = list(islice(self.batches, wanted))
        if not batches:
            return None
        self.left = max(0, self.left - len(batches))
        self.ended = getattr(self.loader, "end_of_dataloader", False)
        if flight.device is not None:
            batches = [move(batch, flight.device) for batch in batches]
        minibatch = Minibatch(flight, batches)
        flight.perturbation.begin(minibatch.rows)
        flight.minibatch = minibatch
        return minibatch

    def mark(self, last: bool) -> None:
        """Keep the flag by which Accelerate knows its last batch true for the last replay only."""
        if self.ended:
            self.loader.end_of_dataloader = last


def _unsharded(loader: Any) -> bool:
    """Whether there are several ranks, and nothing but a dataset of its own could give each its share."""
    # Beside a batch sampler of the user's, the loader's own `sampler` says nothing.
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader if batches is None else batches, "sampler", None)
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
        and type(loader) is DataLoader
        and type(sampler) in (RandomSampler, SequentialSampler)
        and type(batches) in (BatchSampler, type(None))
    )
