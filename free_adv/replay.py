"""The replay iterator: reads minibatches and yields each m times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from free_adv.batches import move
from free_adv.minibatch import Flight, Minibatch


class Replay:
    """A loader whose minibatches come m times each, with x perturbed; `FreeAdversarial.replay` makes it.

    Attributes that it does not own are read from and written to the wrapped loader.
    """

    _flight: Flight
    _loader: Iterable[Any]

    def __init__(self, flight: Flight, loader: Iterable[Any]) -> None:
        self.__dict__.update(_flight=flight, _loader=loader)

    def __len__(self) -> int:
        return self._flight.replays * len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        flight = self._flight
        me = flight.open()
        loader = iter(self._loader)
        try:
            while minibatch := flight.minibatch or self._read(loader):
                flight.minibatch = minibatch
                while minibatch.left:
                    yield minibatch.next()
                    if flight.newest is not me:
                        raise RuntimeError(
                            "this replay was replaced by a newer one of the same FreeAdversarial: iterate "
                            "the newest, and give loops that run side by side one object each"
                        )
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

    def _read(self, loader: Iterator[Any]) -> Minibatch | None:
        """The next minibatch: one batch, or up to `accumulate`; the loader is read no further."""
        flight = self._flight
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "replay() was iterated under torch.inference_mode(), where nothing receives a "
                "gradient: iterate it outside"
            )
        batches = list(islice(loader, flight.accumulate))
        if not batches:
            return None
        if flight.device is not None:
            batches = [move(batch, flight.device) for batch in batches]
        minibatch = Minibatch(flight, batches)
        flight.perturbation.begin(minibatch.rows)
        return minibatch
