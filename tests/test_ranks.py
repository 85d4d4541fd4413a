"""Several ranks train as one process does, with DDP and FSDP, and talk no more than in natural training."""

import collections
import contextlib
import importlib.util
import itertools
import linecache
import os
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from free_adv import FreeAdversarial, ThreatModel, evaluate
from tests.helpers import advance, joined, on_two_ranks, with_batch_norm
from tests.reference import batches, free_training, network

EPOCHS, M, EPS = 3, 3, 0.1
SAME = {"atol": 1e-10, "rtol": 0}
SHORT = [(4, 4, 3), (4, 4, 1)]  # the sizes of the batches of either rank
FEWER = [(4, 4, 3), (4, 2)]


# What each of two ranks runs, and one process for comparison.


def dataset():
    """20 images: batches of 8, 8 and 4, or half of each on either of two ranks."""
    return TensorDataset(*batches((20,), torch.float64)[0])


def shard(rank, world):
    """Rank r has every second sample of the batches that one process would have, from the r-th on."""
    return DataLoader(dataset(), 8 // world, sampler=DistributedSampler(dataset(), world, rank))


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[-1]):
        fsdp.fully_shard(layer, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def ddp_with_batch_norm(model):
    return DDP(torch.nn.Sequential(torch.nn.BatchNorm2d(2).double(), *model))


def train(
    rank=0,
    world=1,
    wrap=lambda model: model,
    epochs=EPOCHS,
    natural=False,
    own_backward=False,
    no_sync=False,
    look=False,
    reported=False,
    **arguments,
):
    model = wrap(network(torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    own_backward = own_backward or natural
    free = FreeAdversarial(None if own_backward else optimizer, eps=EPS, replays=M, **arguments)
    loader = shard(rank, world)
    source = loader if natural else free.replay(loader)
    if reported:
        free.report()  # from now on
    for epoch in range(epochs * M if natural else epochs):
        source.sampler.set_epoch(epoch)
        for x, y in source:
            quiet = no_sync and not free.last  # the last group has one micro-batch only
            with model.no_sync() if quiet else contextlib.nullcontext():
                advance(model, free, x, y, optimizer if own_backward else None)
        if look:
            evaluate(model, [dataset()[:]], ThreatModel(EPS), steps=2, progress=False)
    return free.report() if reported else outcome(model, free)


def outcome(model, free):
    weights = [p.detach() for p in model.parameters()]
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in weights]
    return weights, *([joined(free)] if free.state_dict()["delta"] else [])


def train_on(rank, sizes, join=False):
    model = DDP(network(torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    free = FreeAdversarial(optimizer, eps=EPS, replays=M)
    loader = batches(sizes[rank], torch.float64, seed=rank)
    with model.join() if join else contextlib.nullcontext():
        for _ in range(EPOCHS):
            for x, y in free.replay(loader):
                free.step(functional.cross_entropy(model(x), y))
    return outcome(model, free)


def collectives(rank, **arguments):
    """How often each collective was called in one epoch of training, or as many natural updates."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        train(rank, 2, epochs=1, **arguments)
        distributed.barrier()  # or the last event may come too late to be recorded
    names = (e.name for e in events.events())
    return collections.Counter(n for n in names if n.startswith("gloo:") and "barrier" not in n)


def train_in_two_parts(rank, folder, stop):
    """Stop after some updates and go on from a file of this rank; without `stop`, run through."""
    source = iter(batches((4, 4, 4), seed=rank))

    def begin():
        model = DDP(network())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, FreeAdversarial(optimizer, eps=EPS, replays=M)

    def go_on(model, optimizer, free, updates=None):
        for x, y in itertools.islice(free.replay(source), updates):
            free.step(functional.cross_entropy(model(x), y))

    objects = begin()
    if stop:
        go_on(*objects, stop)
        file = folder / f"state-{rank}.pt"
        torch.save([o.state_dict() for o in objects], file)
        objects = begin()
        for o, state in zip(objects, torch.load(file, weights_only=True), strict=True):
            o.load_state_dict(state)
    go_on(*objects)
    return outcome(objects[0], objects[2])


def evaluation(model, part=slice(None), **arguments):
    x, y = dataset()[:]
    loader = list(zip(x.split(5), y.split(5), strict=True))[part]
    return evaluate(model, loader, ThreatModel(EPS), steps=1, progress=False, **arguments)


def evaluation_of_a_sampler(model, shuffle=True):
    """Of 19 images, which two ranks cannot share evenly."""
    data = Subset(dataset(), range(19))
    sampler = DistributedSampler(data, shuffle=shuffle)
    loader = DataLoader(data, 4, sampler=sampler)
    return evaluate(model, loader, ThreatModel(EPS), steps=1, progress=False, sharded=True)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())


class Halves(BatchSampler):
    def __iter__(self):
        return itertools.islice(super().__iter__(), distributed.get_rank(), None, 2)


PLAIN = {
    "in order": lambda: DataLoader(dataset(), 4),
    "shuffled": lambda: DataLoader(dataset(), 4, shuffle=True, drop_last=True),
    "batches in order": lambda: DataLoader(
        dataset(), batch_sampler=BatchSampler(SequentialSampler(dataset()), 4, False)
    ),
    "without batches": lambda: DataLoader(dataset(), None),
}
SPLIT = {
    "DistributedSampler": lambda: shard(0, 2),
    "a sampler of its own": lambda: DataLoader(
        dataset(), 4, sampler=WeightedRandomSampler(torch.ones(20), 20)
    ),
    "batches of a sampler of its own": lambda: DataLoader(
        dataset(), batch_sampler=BatchSampler(DistributedSampler(dataset(), 2, 0), 4, False)
    ),
    "a batch sampler of its own": lambda: DataLoader(
        dataset(), batch_sampler=Halves(SequentialSampler(dataset()), 4, False)
    ),
    "a stream": lambda: DataLoader(Stream(), 4),
    "a list": batches,
}
ACCELERATE = {"DataLoaderShard": {}, "DataLoaderDispatcher": {"dispatch_batches": True}}


def warnings_of(loader):
    """Category, text and line of what two epochs warn of."""
    replay = FreeAdversarial(eps=EPS, replays=1).replay(loader)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for x, _ in replay:
                x.sum().backward()
    return [(w.category, str(w.message), linecache.getline(w.filename, w.lineno)) for w in caught]


def warnings_of_a_prepared_loader(**settings):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
    loader = accelerator.prepare(DataLoader(dataset(), 4))
    return type(loader).__name__, accelerator.num_processes, warnings_of(loader)


LIKE_ONE_PROCESS = {
    "DDP": {"wrap": DDP},
    "DDP, own backward": {"wrap": DDP, "own_backward": True},
    "DDP, clipped": {"wrap": DDP, "max_grad_norm": 0.05},
    "DDP, accumulated": {"wrap": DDP, "accumulate": 2},
    "DDP, accumulated with no_sync": {"wrap": DDP, "accumulate": 2, "no_sync": True},
    "DDP, evaluated between": {"wrap": DDP, "look": True},
    "DDP, gradients in buckets": {"wrap": lambda m: DDP(m, gradient_as_bucket_view=True)},
    "FSDP": {"wrap": sharded},
    "FSDP, own backward": {"wrap": sharded, "own_backward": True},
    "FSDP, clipped": {"wrap": sharded, "max_grad_norm": 0.05},
    "FSDP, accumulated": {"wrap": sharded, "accumulate": 2},
    "FSDP, evaluated between": {"wrap": sharded, "look": True},
}
COUNTED = {
    "DDP": {"wrap": ddp_with_batch_norm},
    "DDP, natural": {"wrap": ddp_with_batch_norm, "natural": True},
    "FSDP": {"wrap": sharded},
    "FSDP, natural": {"wrap": sharded, "natural": True},
    "accumulated": {"wrap": DDP, "accumulate": 2},
    "accumulated with no_sync": {"wrap": DDP, "accumulate": 2, "no_sync": True},
}


def possible(name):
    return "FSDP" not in name or hasattr(fsdp, "fully_shard")


def on_a_rank(rank, folder):
    results = {}
    for name, arguments in LIKE_ONE_PROCESS.items():
        if possible(name):
            results[name] = train(rank, 2, **arguments)
    for name, arguments in COUNTED.items():
        if possible(name):
            results["count", name] = collectives(rank, **arguments)
    results["report"] = train(rank, 2, wrap=DDP, reported=True)
    results["short"] = train_on(rank, SHORT)
    results["fewer"] = train_on(rank, FEWER, join=True)
    results["at once"] = train_in_two_parts(rank, folder, stop=None)
    results["in two parts"] = train_in_two_parts(rank, folder, stop=M + 2)
    model = DDP(with_batch_norm())  # its buffers would be sent at each forward pass
    part = slice(3, 4) if rank else slice(3)  # of four batches
    results["evaluation"] = evaluation(model, part, sharded=True)
    results["one rank alone"] = None if rank else evaluation(model)
    results["with repeats"] = evaluation_of_a_sampler(model)
    for name, make in {**PLAIN, **SPLIT}.items():
        results["warnings", name] = warnings_of(make())
    if importlib.util.find_spec("accelerate"):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
        os.environ.update({k: str(v) for k, v in where.items()})  # a launcher would set them
        for name, settings in ACCELERATE.items():
            results["warnings", name] = warnings_of_a_prepared_loader(**settings)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What all of it gave on either rank, from one launch."""
    return on_two_ranks(on_a_rank, tmp_path_factory.mktemp("ranks"))


# What the two ranks promise.


@pytest.mark.parametrize("name", LIKE_ONE_PROCESS)
def test_two_ranks_with_half_batches_train_as_one_process_with_whole_ones(name, ranks):
    if not possible(name):
        pytest.skip("this torch has no fully_shard")
    arguments = {
        k: v for k, v in LIKE_ONE_PROCESS[name].items() if k in ("max_grad_norm", "accumulate")
    }
    expected, whole = train(**arguments)
    for rank in range(2):
        weights, delta = ranks[rank][name]
        torch.testing.assert_close(weights, expected, **SAME)
        torch.testing.assert_close(delta, whole[rank::2], **SAME)


def test_two_ranks_follow_algorithm_1_on_the_whole_batches(ranks):
    loader, whole = shard(0, 1), []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        whole += list(loader)
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    *_, expected = free_training(model, optimizer, whole, eps=EPS, m=M, epochs=1)
    for rank in range(2):
        weights, delta = ranks[rank]["DDP"]
        torch.testing.assert_close(weights, list(model.parameters()), **SAME)
        torch.testing.assert_close(delta, expected[rank::2], **SAME)


def test_each_rank_has_a_delta_of_its_own(ranks):
    one, two = (ranks[rank]["DDP"][1] for rank in range(2))
    assert (one != two).double().mean() > 0.2


def test_each_rank_reports_what_its_own_replays_have_seen(ranks):
    one, two = (ranks[rank]["report"] for rank in range(2))
    whole = train(reported=True)
    for name in ("alignment", "edge", "loss"):
        means = [(a + b) / 2 for a, b in zip(one[name], two[name], strict=True)]
        assert means == pytest.approx(whole[name], rel=1e-6)
    assert one["alignment"] != two["alignment"]
    assert one["updates"] == two["updates"] == whole["updates"]


@pytest.mark.parametrize("name", ["DDP", "FSDP"])
def test_free_training_calls_the_collectives_of_natural_training_and_no_more(name, ranks):
    if not possible(name):
        pytest.skip("this torch has no fully_shard")
    for results in ranks:
        count = results["count", name]
        assert count["gloo:all_reduce"] >= 3 * M  # at least one for each update
        assert count == results["count", f"{name}, natural"]


def test_no_sync_before_the_last_micro_batch_of_a_group_leaves_one_round_for_each_group(ranks):
    for results in ranks:
        assert results["count", "accumulated"]["gloo:all_reduce"] == 3 * M
        assert results["count", "accumulated with no_sync"]["gloo:all_reduce"] == 2 * M


@pytest.mark.parametrize(("name", "sizes"), [("short", SHORT), ("fewer", FEWER)])
def test_ranks_with_unlike_batches_move_by_the_average_of_their_mean_gradients(name, sizes, ranks):
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loaders = [batches(s, torch.float64, seed=rank) for rank, s in enumerate(sizes)]
    deltas = [torch.zeros(4, 2, 5, 5, dtype=torch.float64) for _ in loaders]
    # A rank that has run out of batches, under join(), is out until the others are through all epochs.
    for of_ranks in itertools.zip_longest(*(loader * EPOCHS for loader in loaders)):
        active = [(batch, d) for batch, d in zip(of_ranks, deltas, strict=True) if batch]
        for _ in range(M):
            optimizer.zero_grad()
            for (x, y), delta in active:
                x_adv = (x + delta[: len(x)]).clamp(0, 1).requires_grad_()
                (functional.cross_entropy(model(x_adv), y) / 2).backward()
                delta[: len(x)] = (delta[: len(x)] + EPS * x_adv.grad.sign()).clamp(-EPS, EPS)
            optimizer.step()
    for rank in range(2):
        weights, delta = ranks[rank][name]
        torch.testing.assert_close(weights, list(model.parameters()), **SAME)
        torch.testing.assert_close(delta, deltas[rank], **SAME)


def test_each_rank_goes_on_bit_equal_from_a_state_of_its_own(ranks):
    for results in ranks:
        (weights, delta), (expected, whole) = results["in two parts"], results["at once"]
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
        assert torch.equal(delta, whole)


def test_an_evaluation_of_shares_adds_up_to_that_of_all_images(ranks):
    first, second = (r["evaluation"] for r in ranks)
    assert first == second
    assert first.count == 20
    assert first.clean == evaluation(with_batch_norm()).clean
    assert 0 < first.robust < first.clean


def test_one_rank_alone_can_evaluate_the_model_that_ddp_wraps(ranks):
    for rank, images in ((0, 10), (1, 9)):
        assert ranks[rank]["with repeats"].count == 19
        assert len(ranks[rank]["with repeats"].clean_mask) == images
    assert ranks[0]["with repeats"] == ranks[1]["with repeats"]
    assert ranks[0]["one rank alone"] == evaluation(with_batch_norm())


def test_an_evaluation_of_shares_needs_a_process_group():
    with pytest.raises(RuntimeError, match="sharded=True needs a process group"):
        evaluation(with_batch_norm(), sharded=True)


@pytest.mark.parametrize("name", PLAIN)
def test_a_loader_that_every_rank_reads_whole_is_warned_of_once_where_the_loop_is(name, ranks):
    for results in ranks:
        ((category, text, line),) = results["warnings", name]
        assert category is UserWarning
        for phrase in ("every rank trains on all", "accelerator.prepare", "DistributedSampler"):
            assert phrase in text
        assert line.strip() == "for x, _ in replay:"


@pytest.mark.parametrize("name", SPLIT)
def test_a_loader_that_may_be_split_is_not_warned_of(name, ranks):
    assert not any(results["warnings", name] for results in ranks)


@pytest.mark.parametrize("name", ACCELERATE)
def test_a_loader_that_accelerate_has_prepared_is_not_warned_of(name, ranks):
    pytest.importorskip("accelerate")
    assert [results["warnings", name] for results in ranks] == [(name, 2, [])] * 2


def test_one_process_is_not_warned(tmp_path):
    assert not any(warnings_of(make()) for make in PLAIN.values())
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert not any(warnings_of(make()) for make in PLAIN.values())
    finally:
        distributed.destroy_process_group()
