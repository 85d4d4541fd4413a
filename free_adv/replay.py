"""The replay iterator: reads minibatches and yields each m times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import length_hint
from typing import Any, Generic, TypeVar

import torch

from free_adv.loop import Loop

T = TypeVar("T")


class Replay(Generic[T]):
    """A loader whose minibatches come m times each, with x perturbed; `FreeAdversarial.replay` makes it.

    Attributes that it does not own are read from and written to the wrapped loader.
    """

    _loop: Loop
    _loader: Any

    def __init__(self, loop: Loop, loader: Iterable[T]) -> None:
        if isinstance(loader, Replay):
            raise ValueError("loader is a replay already: iterate it as it is, or wrap its loader")
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            module = hasattr(loader, "train_dataloader")  # a data module of Lightning
            cure = ": wrap what its train_dataloader() returns" if module else ""
            raise TypeError(f"loader must be iterable, got {type(loader).__name__}{cure}")
        self.__dict__.update(_loop=loop, _loader=loader)

    def __len__(self) -> int:
        try:
            return self._loop.replays * len(self._loader)
        except Exception as error:  # a stream's may raise what it likes, callers know TypeError
            raise TypeError(f"the loader has no length: {error}") from error

    def __iter__(self) -> Iterator[T]:
        loop, loader = self._loop, self._loader
        loop.hints.of_the_loader(loop, loader)
        # If the loader raises here, nothing has changed.
        chunks = _chunks(map(loop.held, iter(loader)), loader, loop.accumulate * loop.window)
        ended = False  # Accelerate's flag, see below
        me = loop.open()
        watch = loop.hints.watch(loop)
        try:
            while True:
                if not loop.resumed:
                    loop.delta.forget()
                    if (batches := next(chunks, None)) is None:
                        return
                    ended = getattr(loader, "end_of_dataloader", False)
                    loop.read(batches)
                    loop.hints.of_the_batches(loop)
                while loop.flight.todo:
                    if torch.is_inference_mode_enabled():
                        raise RuntimeError(
                            "replay() was iterated under torch.inference_mode(), where nothing "
                            "receives a gradient: iterate it outside"
                        )
                    batch = loop.next()
                    if ended:  # for Accelerate, only the last replay is that of the last batch
                        loader.end_of_dataloader = not loop.flight.todo
                    yield batch
                    if loop.newest is not me:
                        raise RuntimeError(
                            "this replay was replaced by a newer one of the same FreeAdversarial, or ended by "
                            "load_state_dict() or by the end of its with block: iterate the newest, or replay(loader) "
                            "anew, and give loops that run side by side one object each"
                        )
                    loop.demand()
                loop.leave()
                loop.hints.of_a_minibatch(loop, watch)
        finally:
            watch.remove()
            if loop.newest is me:
                loop.newest = None

    def __getattr__(self, name: str) -> Any:
        if name in ("_loop", "_loader"):  # not set up yet: copy and pickle look here first
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._loader)})

    def __repr__(self) -> str:
        return f"Replay({self._loader!r}, replays={self._loop.replays})"


def _chunks(batches: Iterator[Any], loader: Any, size: int) -> Iterator[list[Any]]:
    """Up to `size` batches at a time, never past the loader's end, where it may begin to clear up."""
    left = 0
    if size > 1:  # no other needs it
        with contextlib.suppress(Exception):  # a stream's `__len__` may raise what it likes
            left = length_hint(loader, 0)
    while chunk := list(islice(batches, min(size, left) or size)):
        left = max(0, left - len(chunk))
        yield chunk
