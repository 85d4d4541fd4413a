"""What the tests of several files share."""

import contextlib
import datetime
import os
import warnings

import torch
from torch import distributed
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.reference import network


@contextlib.contextmanager
def told_of(*kinds):
    """torch.load may read these classes; torch 2.4 has no context for it."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([*kinds])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def free_for(model, lr=0.1, **arguments):
    return FreeAdversarial(torch.optim.SGD(model.parameters(), lr), **{"eps": 0.1, **arguments})


def loss_of(model, x, y):
    return functional.cross_entropy(model(x), y)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model, free, loader, epochs=1, optimizer=None):
    """Train with `step`, or with a backward pass of the loop's own for that optimizer; the weights."""
    for _ in range(epochs):
        for x, y in free.replay(loader):
            advance(model, free, x, y, optimizer)
    return weights(model)


def advance(model, free, x, y, optimizer=None):
    """One update: by `step`, or by a backward pass of the loop's own for that optimizer."""
    loss = loss_of(model, x, y)
    if optimizer is None:
        free.step(loss)
    else:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_batch_norm():
    return torch.nn.Sequential(torch.nn.BatchNorm2d(2).double(), *network(torch.float64))


def in_ball(free):
    """Whether all of delta is within eps, and finite: NaN is outside."""
    threat = free.threat
    deltas = [d for d in free.state_dict()["delta"] if d.numel()]
    return all((threat.distance(d) <= threat.eps * (1 + 1e-6)).all() for d in deltas)


def joined(free):
    """All of delta of one sample shape, in the order of its places."""
    state = free.state_dict()
    order = sorted(range(len(state["places"])), key=lambda i: state["places"][i])
    return torch.cat([state["delta"][i] for i in order])


def equal(one, other):
    """Whether tensors, and whatever holds them, are bit-equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def on_two_ranks(work, folder):
    """What `work(rank, folder)` returns on each of two ranks that run at once."""
    torch.multiprocessing.spawn(_on_a_rank, (work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _on_a_rank(rank, work, folder):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="'set_vital'")  # see pyproject.toml
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    distributed.destroy_process_group()
    # Not the interpreter's own end: FSDP keeps the group alive, and gloo's threads, should they then still hold
    # a tensor, abort the process (pytorch pull request 179291).
    os._exit(0)
