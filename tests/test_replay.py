"""What `replay` gives: a loader that is m times as long, and batches that are no leaves."""

import copy
import operator
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from free_adv import FreeAdversarial
from tests.helpers import free_for, loss_of
from tests.internals import buffers, leaf
from tests.reference import batches, network


def test_what_is_yielded_is_no_leaf_and_the_rows_of_delta_are():
    free = FreeAdversarial(eps=0.1)
    x, _ = next(iter(free.replay(batches())))
    assert x.requires_grad
    assert not x.is_leaf
    assert leaf(free).is_leaf
    assert leaf(free).data_ptr() == next(iter(buffers(free).values())).data_ptr()


class Loader:
    """A loader with a setting, as timm's has, that is read and written from outside."""

    mixup_enabled = True

    def __iter__(self):
        return iter(batches())

    def __len__(self):
        return 3


def test_the_replay_is_m_times_as_long_and_passes_attributes_both_ways():
    loader = Loader()
    replay = FreeAdversarial(eps=0.1, replays=5).replay(loader)
    assert len(replay) == 15
    assert replay.mixup_enabled
    replay.mixup_enabled = False
    assert loader.mixup_enabled is False
    assert not hasattr(replay, "sampler")
    with pytest.raises(TypeError, match="len"):
        len(FreeAdversarial(eps=0.1).replay(iter([])))


class NotSaying:
    """A loader that knows no length and says so as some streams do."""

    def __iter__(self):
        return iter(batches())

    def __len__(self):
        raise NotImplementedError


def test_a_loader_is_not_asked_for_its_length_where_none_is_needed():
    for x, _ in FreeAdversarial(eps=0.1).replay(NotSaying()):
        x.sum().backward()


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, TypeError, ValueError])
@pytest.mark.parametrize("how", [{}, {"window": 2}, {"accumulate": 3}], ids=str)
def test_a_length_that_raises_is_none(how, error):
    class Stream:
        def __iter__(self):
            return iter(batches((4,) * 4))

        def __len__(self):
            raise error("a stream has no length")

    model = network()
    free = free_for(model, replays=2, **how)
    replay = free.replay(Stream())
    assert operator.length_hint(replay, 7) == 7
    with pytest.raises(TypeError, match="no length: a stream has no length"):
        len(replay)
    count = 0
    for x, y in replay:
        free.step(loss_of(model, x, y))
        count += 1
    assert count == 8


def test_a_replay_can_be_copied_and_pickled():
    replay = FreeAdversarial(eps=0.1, replays=2).replay(batches())
    assert len(copy.copy(replay)) == len(pickle.loads(pickle.dumps(replay))) == len(replay) == 6


def test_a_loader_with_workers_trains_as_one_without():
    data = TensorDataset(torch.rand(20, 2, 5, 5), torch.arange(20) % 4)
    deltas = []
    for workers in (0, 2):
        model = network()
        free = free_for(model, replays=3)
        loader = DataLoader(data, 8, num_workers=workers, persistent_workers=workers > 0)
        assert len(free.replay(loader)) == 9
        for _ in range(2):
            for x, y in free.replay(loader):
                free.step(loss_of(model, x, y))
        deltas.append(free.state_dict()["delta"][0])
    assert torch.equal(*deltas)


def test_last_tells_the_batches_after_which_the_weights_move():
    model = network()
    free = free_for(model, replays=2, accumulate=2)
    assert not free.last
    told = []
    for x, y in free.replay(batches((4, 4, 2))):
        told.append(free.last)
        before = model[0].weight.detach().clone()
        free.step(loss_of(model, x, y))
        assert torch.equal(before, model[0].weight) != told[-1]
    assert told == [False, True, False, True, True, True]


def test_last_holds_for_each_replay_of_a_short_group_that_is_taken_ahead():
    free = FreeAdversarial(eps=0.1, replays=3, accumulate=3)
    replay = iter(free.replay(batches((4,))))
    assert [(next(replay), free.last)[1] for _ in range(3)] == [True] * 3


def test_delta_and_clean_are_those_of_the_latest_micro_batch():
    model = network()
    free = free_for(model, accumulate=2, start="uniform")
    for i, (x, y) in enumerate(free.replay(loader := batches((4, 4)))):
        assert torch.equal(free.clean, loader[i % 2][0])
        torch.testing.assert_close((free.clean + free.delta).clamp(0, 1), x.detach())
        free.step(loss_of(model, x, y))


def test_a_batch_may_be_taken_where_gradients_are_off():
    replay = iter(FreeAdversarial(eps=0.1).replay(batches()))
    with torch.no_grad():
        x, _ = next(replay)
    assert x.requires_grad


def test_an_input_that_wants_a_gradient_of_its_own_gets_none():
    clean = torch.rand(4, 2, 5, 5, requires_grad=True)
    for (x,) in FreeAdversarial(eps=0.1).replay([(clean,)]):
        x.sum().backward()
    assert clean.grad is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # of cycles, cut here
def test_a_backward_pass_that_makes_a_graph_leaves_none_in_delta():
    free = FreeAdversarial(eps=0.1)
    for x, _ in free.replay(batches()):
        weight = torch.ones((), requires_grad=True)
        (x * weight).square().sum().backward(create_graph=True)
        weight.grad = None
    assert not free.delta.requires_grad


# What an iterator holds to.


def some(objective=None):
    """A replay of three batches."""
    free = free_for(network(), replays=1, ascents=int(objective is not None), objective=objective)
    return free.replay(batches((4, 4, 4)))


def test_an_iterator_that_is_used_up_in_the_objective_or_the_loader_does_not_end_the_epoch():
    empty, model = iter(()), network()
    replay = some(lambda batch: loss_of(model, *batch) * next(empty))
    with pytest.raises(RuntimeError, match="the loader or the objective raised StopIteration"):
        next(iter(replay))

    class Loader:
        def __iter__(self):
            return iter(next(empty))

    with pytest.raises(RuntimeError, match="the loader or the objective raised StopIteration"):
        next(iter(FreeAdversarial(eps=0.1).replay(Loader())))


@pytest.mark.parametrize("how", ["close", "to the end", "drop"])
def test_the_loaders_iterator_ends_with_that_of_the_replay(how):
    ended = []

    def loader():
        try:
            yield from batches((4, 4))
        finally:
            ended.append(True)

    replay = iter(FreeAdversarial(eps=0.1, replays=1).replay(loader()))
    next(replay)[0].sum().backward()
    assert not ended
    if how == "close":
        replay.close()
    elif how == "to the end":
        for x, _ in replay:
            x.sum().backward()
    else:
        del replay
    assert ended
    if how != "drop":
        assert next(replay, None) is None


def test_an_iterator_that_was_replaced_says_so_once_and_is_over():
    replay = some()
    old, new = iter(replay), iter(replay)
    next(old)
    next(new)
    with pytest.raises(RuntimeError, match="replaced by a newer one"):
        next(old)
    assert next(old, None) is None


def test_an_iterator_of_a_replay_cannot_be_copied():
    running = iter(some())
    next(running)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied: take a state_dict\(\)"):
            way(running)


def test_an_iterator_that_has_failed_does_not_go_on_behind_the_with_block():
    class Missing(Exception):
        pass

    class Once:
        def __init__(self):
            self.given = iter([Missing, *batches((4, 4))])

        def __iter__(self):
            return self

        def __next__(self):
            value = next(self.given)
            if value is Missing:
                raise Missing
            return value

    with FreeAdversarial(eps=0.1) as free:
        replay = iter(free.replay(Once()))
        with pytest.raises(Missing):
            next(replay)
    with pytest.raises(RuntimeError, match="by the end of its with block"):
        next(replay)


def test_a_batch_whose_copy_has_failed_comes_again():
    class Fragile(dict):
        fails = False

        def __copy__(self):
            if Fragile.fails:
                Fragile.fails = False
                raise MemoryError
            return Fragile(self)

    free = FreeAdversarial(eps=0.1, replays=3, key="x")
    replay = iter(free.replay([Fragile(x=torch.rand(2, 3))]))
    next(replay)["x"].sum().backward()
    Fragile.fails = True
    with pytest.raises(MemoryError):
        next(replay)
    turns = []
    for batch in replay:
        turns.append(free.turn)
        batch["x"].sum().backward()
    assert turns == [1, 2]
