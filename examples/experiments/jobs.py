"""A training job on one or many ranks that can be killed at any moment and goes on where its last checkpoint was."""

import os
import sys
from pathlib import Path
from typing import Any

import records
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

FULL = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def join() -> torch.device:
    """Join the process group of torchrun, or make one of one process; the device of this rank."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {"rank": 0, "world_size": 1, "store": distributed.HashStore()}
    if "RANK" in os.environ:
        alone = {}
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return torch.device(device)


def agree(value: int) -> int:
    """The largest value of any rank; over gloo, so that no rank waits for its GPU."""
    tensor = torch.tensor(int(value))
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def shard(net: nn.Module, device: torch.device) -> None:
    """FSDP2: each block of a stage in a group of its own, what is left in another."""
    from torch.distributed.fsdp import fully_shard  # torch 2.6

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    stages = (m for m in net.modules() if isinstance(m, nn.Sequential | nn.ModuleList))
    blocks = {block for stage in stages if stage is not net for block in stage.children()}
    for module in reversed(list(net.modules())):  # the inner ones first
        if module in blocks and any(True for _ in module.children()):
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)


def rehearse(model: DistributedDataParallel, x: Tensor) -> None:
    """One backward pass without an update; buffers stay as they were, random states do not.

    DDP lays out its buckets anew after the first one. With more than two ranks the layout decides in which order
    gradients are summed, so without this a resumed job would differ in the last bits of its first update.
    """
    kept = [buffer.clone() for buffer in model.buffers()]
    model(x).sum().backward()
    model.zero_grad()
    for buffer, old in zip(model.buffers(), kept, strict=True):
        buffer.copy_(old)


def whole(net: nn.Module) -> dict[str, Tensor]:
    """The state of a model, in one piece, on rank 0; all ranks must call."""
    return states.get_model_state_dict(net, options=FULL)


class Checkpoint:
    """`last.pt` with what the ranks share, and a file for each rank with what is its own.

    The files of the ranks carry the number of their update. `last.pt` is written when all of them are there, and
    older ones go when it is: whenever the job is killed, `last.pt` and the files it names are whole and of one update.

    Args:
        folder: Where the files are, the same directory for all ranks.
        settings: Plain values that must be the same in a resumed job.
        net: The model, maybe sharded by FSDP2.
        optimizer: Its optimizer.
        ema: The average of its weights.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: AveragedModel | None,
    ) -> None:
        self.folder, self.settings, self.last = folder, settings, folder / "last.pt"
        self.net, self.optimizer, self.ema = net, optimizer, ema
        self.rank = distributed.get_rank()

    def save(self, progress: dict[str, Any], own: dict[str, Any]) -> None:
        """Write a checkpoint; all ranks must call after the same update.

        Args:
            progress: Plain values that the ranks share, with `update`, the number of updates made.
            own: The state of this rank.
        """
        file = self._file(progress["update"])
        buffers = dict(self.net.named_buffers())
        records.save(file, {**own, "random": records.random_state(), "buffers": buffers})
        shared = {
            "settings": self.settings,
            "progress": progress,
            "model": whole(self.net),
            "optimizer": states.get_optimizer_state_dict(self.net, self.optimizer, options=FULL),
            "ema": whole(self.ema.module) if self.ema else None,
        }
        agree(0)  # all ranks' files are there
        if self.rank == 0:
            records.save(self.last, shared)
        agree(0)  # and last.pt is
        for old in (*self.folder.glob(f"rank{self.rank}-*"), *self.folder.glob("last.pt.*")):
            if old != file and (self.rank == 0 or old.name.startswith("rank")):
                old.unlink()

    def load(self, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Go on from last.pt: `progress` and `own` as they were saved, or None if there is none.

        Raises:
            SystemExit: It was made with other settings, which are printed.
        """
        message = [False, False]
        if self.rank == 0 and self.last.exists():
            message = [True, self._differs(records.load(self.last)["settings"])]
        distributed.broadcast_object_list(message)
        found, refused = message
        if refused:
            sys.exit(2)
        if not found:
            return None
        # Not broadcast_from_rank0: torch 2.15 mixes up the values of channels-last weights on other ranks.
        shared, options = records.load(self.last), states.StateDictOptions(full_state_dict=True)
        progress, optimizer = shared["progress"], shared["optimizer"]
        states.set_optimizer_state_dict(self.net, self.optimizer, optimizer, options=options)
        states.set_model_state_dict(self.net, shared["model"], options=options)
        if self.ema:
            states.set_model_state_dict(self.ema.module, shared["ema"], options=options)
            self.ema.n_averaged.fill_(progress["update"])
        own = records.load(self._file(progress["update"]), device)
        for name, buffer in self.net.named_buffers():  # running statistics are those of each rank
            buffer.copy_(own["buffers"][name])
        records.set_random_state(own["random"])
        return progress, own

    def _file(self, update: int) -> Path:
        return self.folder / f"rank{self.rank}-{update}.pt"

    def _differs(self, theirs: dict[str, Any]) -> bool:
        names = [n for n in {**theirs, **self.settings} if theirs.get(n) != self.settings.get(n)]
        for name in names:
            old, new = theirs.get(name), self.settings.get(name)
            print(f"{name} is {old!r} in {self.last} and {new!r} now", file=sys.stderr)
        if names:
            print("a job goes on with its own settings only; take another --out", file=sys.stderr)
        return bool(names)
