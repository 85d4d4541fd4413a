"""The replay iterator: reads minibatches and yields each m times."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import length_hint
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from free_adv.flight import Flight
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
        return Turns(self._loop, self._loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("_loop", "_loader"):  # not set up yet: copy and pickle look here first
            raise AttributeError(name)
        if name == "next":  # its batches would come as they are
            raise AttributeError("a replay has no next(): iterate it, or call next(iter(replay))")
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._loader)})

    def __repr__(self) -> str:
        return f"Replay({self._loader!r}, replays={self._loop.replays})"


@dataclasses.dataclass(eq=False)
class Turns(Iterator[T]):
    """The batches of one pass over a loader, in their turns. Behind an error it goes on, as a loader's iterator does."""

    loop: Loop
    loader: Any
    # The loader's iterator, from the first batch on.
    source: Iterator[Any] = dataclasses.field(default_factory=lambda: iter(()))
    left: int = 0  # how many batches the loader may still have, if it matters
    taken: list[Any] = dataclasses.field(default_factory=list)  # it gave, and are not in flight yet
    last: bool = False  # Accelerate's flag, see below
    through: bool = False
    me: object = None  # this iterator for the loop, once it has begun
    failed: Flight | None = None  # what was in flight when an error came
    watch: RemovableHandle | None = None

    def __next__(self) -> T:
        if self.through:
            raise StopIteration
        loop = self.loop
        try:
            self._open()
            if loop.newest is not self.me:
                self.close()
                raise RuntimeError(
                    "this replay was replaced by a newer one of the same FreeAdversarial, or ended by "
                    "load_state_dict() or by the end of its with block: iterate the newest, or replay(loader) "
                    "anew, and give loops that run side by side one object each"
                )
            if torch.is_inference_mode_enabled():
                raise RuntimeError(
                    "replay() was iterated under torch.inference_mode(), where nothing "
                    "receives a gradient: iterate it outside"
                )
            loop.demand()
            self.through = not loop.flight.todo and not self._read()
            if not self.through:
                batch: T = loop.next()
                if self.last:  # for Accelerate, only the last replay is that of the last batch
                    self.loader.end_of_dataloader = not loop.flight.todo
                return batch
        except BaseException as error:
            self.failed = loop.flight if loop.newest is self.me else None
            self._rest()
            # One of another iterator would end the epoch in silence.
            if isinstance(error, StopIteration):
                raise RuntimeError("the loader or the objective raised StopIteration") from error
            raise
        self.close()
        raise StopIteration

    def _rest(self) -> None:
        if self.watch is not None:
            self.watch.remove()
        if self.loop.newest is self.me:
            self.loop.newest = None

    def close(self) -> None:
        """End here, as a loop that is left does, and the loader's iterator too."""
        self.through, self.loader, self.source, self.taken = True, None, iter(()), []
        self._rest()

    __del__ = close

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an iterator of a replay cannot be copied: take a state_dict() of the object"
        )

    def _open(self) -> None:
        loop = self.loop
        if self.me is None:
            loop.hints.of_the_loader(loop, self.loader)
            # If the loader raises here, nothing has changed.
            self.source = map(loop.held, iter(self.loader))
            if loop.accumulate * loop.window > 1:  # no other needs it
                with contextlib.suppress(Exception):  # a stream's `__len__` may raise what it likes
                    self.left = length_hint(self.loader, 0)
            self.me = loop.open()
        elif self.failed is loop.flight and loop.newest is None:
            loop.newest = self.me
        else:
            return
        self.failed, self.watch = None, loop.hints.watch(loop)

    def _read(self) -> bool:
        """Take what comes next from the loader, never past its end, where it may begin to clear up; False behind it."""
        loop, size = self.loop, self.loop.accumulate * self.loop.window
        loop.leave()
        loop.hints.of_a_minibatch(loop, self.watch)
        loop.delta.forget()
        wanted = min(size, self.left) or size
        for batch in islice(self.source, wanted - len(self.taken)):
            self.taken.append(batch)
        batches, self.taken = self.taken, []
        self.left = max(0, self.left - len(batches))
        if batches:
            self.last = getattr(self.loader, "end_of_dataloader", False)
            loop.read(batches)
            loop.hints.of_the_batches(loop)
        return bool(batches)
