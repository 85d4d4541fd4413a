"""Every image counts once, whatever shares it out to ranks; and no rank waits for another in its model."""

import functools
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from free_adv import ThreatModel, evaluate, pgd
from tests.helpers import on_two_ranks

TINY = ThreatModel(1e-6)  # moves nothing
COUNTS = [7, 8, 9, 10, 11, 12]


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))


def dataset(count):
    x = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = classifier()(x).argmax(1)
    y[0] = (y[0] + 1) % 10  # the first is wrong: a repeat of it shows in the accuracy
    return TensorDataset(x, y)


class EvenBatches:
    """Batches for two ranks in turns, filled up from the beginning so that both have as many full ones."""

    def __init__(self, count, rank):
        self.count, self.rank = count, rank

    def __iter__(self):
        whole = -(-self.count // 4) * 4
        numbers = [i % self.count for i in range(whole)]
        return iter([numbers[i : i + 2] for i in range(self.rank * 2, whole, 4)])


def prepared(rank, data, size=2, even=True, **settings):
    from accelerate.data_loader import prepare_data_loader

    loader = DataLoader(data, size)
    where = {"num_processes": 2, "process_index": rank, "put_on_device": True}
    return prepare_data_loader(loader, torch.device("cpu"), **where, even_batches=even, **settings)


class Around:
    """A loader around another, as prefetchers are."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def by_sampler(rank, data, **settings):
    return DataLoader(data, 2, sampler=DistributedSampler(data, 2, rank, **settings))


LOADERS = {
    "a sampler": lambda rank, data: by_sampler(rank, data),
    "a sampler, whole": lambda rank, data: Around(by_sampler(rank, data, shuffle=False)),
    "Accelerate": lambda rank, data: prepared(rank, data),
    "Accelerate, around": lambda rank, data: Around(prepared(rank, data)),
    "Accelerate, a generator": lambda rank, data: ((x, y) for x, y in prepared(rank, data)),
    "Accelerate, split": lambda rank, data: prepared(rank, data, 4, split_batches=True),
    "Accelerate, uneven": lambda rank, data: prepared(rank, data, even=False),
    "Accelerate, dispatched": lambda rank, data: prepared(rank, data, dispatch_batches=True),
}


def judged(model, loader):
    """The count, the accuracy, the size of the mask, and what was told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = evaluate(model, loader, TINY, steps=1, sharded=True, progress=False)
    texts = [str(w.message) for w in told if w.category is UserWarning]
    return result.count, result.clean, len(result.clean_mask), texts


def work(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    import accelerate

    accelerate.PartialState(cpu=True)
    results = {}
    for count in COUNTS:
        for name, make in LOADERS.items():
            results[name, count] = judged(classifier(), make(rank, dataset(count)))
        even = DataLoader(dataset(count), batch_sampler=EvenBatches(count, rank))
        results["told", count] = judged(classifier(), even)
        own = DataLoader(dataset(count + 2 * rank), 2)  # each rank has images of its own
        results["own", count] = judged(classifier(), own)
    results["DDP"] = unlike(rank)
    return results


def unlike(rank):
    """Nothing is right on rank 1, so that it has nothing to attack, whatever DDP is wrapped in."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    eager = functools.partial(torch.compile, backend="eager")
    net = nn.Sequential(nn.BatchNorm2d(3), classifier())
    x = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        y = (net.eval()(x).argmax(1) + rank) % 10
    ddp = DDP(net.train())
    settings = {"steps": 3, "sharded": True, "progress": False}
    found = []
    for model in (ddp, lambda x: ddp(x), nn.Sequential(nn.Identity(), ddp), eager(ddp)):
        result = evaluate(model, [(x, y)], ThreatModel(1e-3), **settings)
        found.append((result.count, result.clean))
        if rank == 0:
            pgd(model, x, y, TINY, steps=2)
    ddp(x).sum().backward()  # it talks again
    return found, ddp.training, net[0].weight.grad.clone()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("accelerate")
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", LOADERS)
def test_images_that_fill_up_the_shares_of_ranks_count_once(name, count, ranks):
    one, two = (results[name, count] for results in ranks)
    assert one[:2] == two[:2] == (count, (count - 1) / count)
    assert one[2] + two[2] == count
    assert one[3] == two[3] == []


@pytest.mark.parametrize("count", COUNTS)
def test_where_there_is_no_knowing_it_is_told_how_many_were_counted_and_how_many_there_are(
    count, ranks
):
    counted = -(-count // 4) * 4
    for found, _, _, texts in (results["told", count] for results in ranks):
        assert found == counted
        phrase = f"hold {counted} images together, their dataset {count}: some count twice"
        assert [phrase in text for text in texts] == [True] * (counted > count)


@pytest.mark.parametrize("count", COUNTS)
def test_ranks_with_images_of_their_own_are_not_told(count, ranks):
    for found, *_, texts in (results["own", count] for results in ranks):
        assert (found, texts) == (2 * count + 2, [])


def test_a_distributed_model_waits_for_no_other_rank_wherever_it_is(ranks):
    (one, training, first), (two, _, second) = (results["DDP"] for results in ranks)
    assert one == two == [(32, 0.5)] * 4
    assert training
    assert torch.equal(first, second)
