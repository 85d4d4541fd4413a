"""The replay iterator: reads minibatches and yields each m times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from free_adv.batch import find, tensors
from free_adv.checks import warn
from free_adv.group import Group
from free_adv.loop import Loop


class Replay:
    """A loader whose minibatches come m times each, with x perturbed; `FreeAdversarial.replay` makes it.

    Attributes that it does not own are read from and written to the wrapped loader.
    """

    _loop: Loop
    _loader: Any
    _warned: bool

    def __init__(self, loop: Loop, loader: Iterable[Any]) -> None:
        if isinstance(loader, Replay):
            raise ValueError("loader is a replay already: iterate it as it is, or wrap its loader")
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            module = hasattr(loader, "train_dataloader")  # a data module of Lightning
            cure = ": wrap what its train_dataloader() returns" if module else ""
            raise TypeError(f"loader must be iterable, got {type(loader).__name__}{cure}")
        self.__dict__.update(_loop=loop, _loader=loader, _warned=False)

    def __len__(self) -> int:
        return self._loop.replays * len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        loop, loader = self._loop, self._loader
        if not self._warned and _unsharded(loader):
            self.__dict__["_warned"] = True
            warn(
                "every rank trains on all the data: this DataLoader is not split between the ranks of "
                "the process group. Call replay() after accelerator.prepare, or give the DataLoader a "
                "DistributedSampler; ignore this if the dataset itself is already split by rank"
            )
        if loop.resumed and loop.group and _plain(loader, RandomSampler):
            warn(
                f"the state was saved inside an epoch: {loop.group.todo} replays that were left come first, and then "
                "this shuffled DataLoader from its beginning, so that there are more updates than a schedule "
                "expects. Save behind the loop, at the end of an epoch, or use a loader that resumes, such as "
                "torchdata's StatefulDataLoader; ignore this if yours goes on where it was"
            )
        # If the loader raises here, nothing has changed.
        chunks = _chunks(iter(loader), loader, loop.accumulate * loop.window)
        ended = False  # Accelerate's flag, see below
        me = loop.open()
        watch = None
        if "steps" not in loop.told:  # of the first group, by whomever
            watch = register_optimizer_step_pre_hook(lambda o, *_: _watch(loop, o))
        try:
            while True:
                if (group := loop.group) is None:
                    loop.delta.forget()
                    if (batches := next(chunks, None)) is None:
                        return
                    ended = getattr(loader, "end_of_dataloader", False)
                    seen = len(loop.delta.seen)
                    group = loop.read(batches)
                    for optimizer in loop.optimizers[:1]:
                        _warn_of_far(loop, optimizer)
                    if len(loop.delta.seen) > seen:
                        _warn_of_others(loop, group, batches)
                while group.todo:
                    if torch.is_inference_mode_enabled():
                        raise RuntimeError(
                            "replay() was iterated under torch.inference_mode(), where nothing "
                            "receives a gradient: iterate it outside"
                        )
                    batch = group.next()
                    if ended:  # for Accelerate, only the last replay is that of the last batch
                        loader.end_of_dataloader = not group.todo
                    loop.resumed = loop.stepped = False
                    yield batch
                    if loop.newest is not me:
                        raise RuntimeError(
                            "this replay was replaced by a newer one of the same FreeAdversarial: iterate "
                            "the newest, and give loops that run side by side one object each"
                        )
                    if loop.group is not group:  # skipped
                        break
                    loop.demand(group)
                else:
                    loop.leave()
                    loop.told.add("steps")
                    if watch is not None:
                        watch.remove()
        finally:
            if watch is not None:
                watch.remove()
            if loop.newest is me:
                loop.newest = None

    def __getattr__(self, name: str) -> Any:
        if name in ("_loop", "_loader"):  # not set up yet: copy and pickle look here first
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __repr__(self) -> str:
        return f"Replay({self._loader!r}, replays={self._loop.replays})"


def _chunks(batches: Iterator[Any], loader: Any, size: int) -> Iterator[list[Any]]:
    """Up to `size` batches at a time, never past the loader's end, where it may begin to clear up."""
    left = length_hint(loader, 0) if size > 1 else 0  # no other needs it
    while chunk := list(islice(batches, min(size, left) or size)):
        left = max(0, left - len(chunk))
        yield chunk


def _watch(loop: Loop, optimizer: Any) -> None:
    """See an optimizer about to step, whoever asked it to."""
    if not loop.optimizers:
        _warn_of_far(loop, optimizer)
    elif (
        loop.stepped and not (Loop.moving or "steps" in loop.told) and optimizer in loop.optimizers
    ):
        loop.told.add("steps")
        warn(
            "the optimizer steps again after free.step(loss), which has moved the weights already: leave out "
            "optimizer.step(), zero_grad() and loss.backward(); ignore this if it is an update of your own"
        )


def _warn_of_far(loop: Loop, optimizer: Any) -> None:
    """Tell once if delta and its gradient cross from the host to the weights' device in each replay."""
    if "device" in loop.told or loop.group is None or not loop.group.inputs:
        return
    loop.told.add("device")
    here = loop.group.inputs[0][0][2].device
    there = next((p.device for g in optimizer.param_groups for p in g["params"]), here)
    if here.type == "cpu" != there.type:
        warn(
            f"the batches are on the CPU and the weights on {there}, so that delta and its gradient cross "
            f"between them in every replay: pass FreeAdversarial(..., device={str(there)!r}), which moves "
            "each batch once"
        )


def _warn_of_others(loop: Loop, group: Group, batches: list[Any]) -> None:
    """Tell once of a tensor like an input that was not named."""
    for batch, inputs in zip(batches, group.inputs or (), strict=False):
        named = {path: find(batch, path)[0][1] for path, *_ in inputs}
        shapes = {x.shape for x in named.values() if x.ndim > 1 and x[:1].numel() > 1}
        for path, t in tensors(batch):
            known = path in named or any(t is x for x in named.values())  # or is its own target
            if known or t.is_nested or t.shape not in shapes or not t.is_floating_point():
                continue
            if "key" in loop.told:
                return
            loop.told.add("key")
            warn(
                f"the batch holds a tensor like its input at {path}, which stays as it is: if it is an input "
                "too, such as a second view, name both, as in key=[0, 1]; ignore this if it is a target"
            )


def _plain(loader: Any, *samplers: type) -> bool:
    """Whether it is a DataLoader of torch's own, with one of these samplers."""
    # Beside a batch sampler of the user's, the loader's own `sampler` says nothing.
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader if batches is None else batches, "sampler", None)
    return (
        type(loader) is DataLoader
        and type(sampler) in samplers
        and type(batches) in (BatchSampler, type(None))
    )


def _unsharded(loader: Any) -> bool:
    """Whether there are several ranks, and nothing but a dataset of its own could give each its share."""
    many = distributed.is_available() and distributed.is_initialized()
    return (
        many
        and distributed.get_world_size() > 1
        and _plain(loader, RandomSampler, SequentialSampler)
    )
