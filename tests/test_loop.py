"""Batches of every structure, loops that end early, mixed precision, and misuse."""

import collections
import contextlib
import copy
import itertools
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from free_adv import FreeAdversarial
from free_adv.batch import length
from tests.reference import batches, network

Pair = collections.namedtuple("Pair", "image label")


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    label: torch.Tensor


class Record:
    def __init__(self, image, label):
        self.image = image
        self.label = label


def free_for(model, lr=0.1, **arguments):
    return FreeAdversarial(torch.optim.SGD(model.parameters(), lr), **{"eps": 0.1, **arguments})


def loss_of(model, x, y):
    return functional.cross_entropy(model(x), y)


def in_ball(free, eps=0.1):
    deltas = free.state_dict()["delta"]
    return all(d.isfinite().all() and d.abs().max() <= eps + 1e-6 for d in deltas if d.numel())


STRUCTURES = [
    (0, lambda x, y: (x, y), lambda b: b),
    (0, lambda x, y: [x, y], lambda b: b),
    (-2, lambda x, y: (x, y), lambda b: b),
    ("image", Pair, lambda b: (b.image, b.label)),
    (0, Pair, lambda b: (b[0], b[1])),
    ("image", Sample, lambda b: (b.image, b.label)),
    ("image", Record, lambda b: (b.image, b.label)),
    ("x", lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    ("x", lambda x, y: collections.OrderedDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    ("x", lambda x, y: collections.UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    (
        ("in", 1, "x"),
        lambda x, y: {"in": [y, {"x": x}], "y": y},
        lambda b: (b["in"][1]["x"], b["y"]),
    ),
    ((1, "image"), lambda x, y: (y, Pair(x, y), "id"), lambda b: (b[1].image, b[0])),
]


@pytest.mark.parametrize(("key", "pack", "unpack"), STRUCTURES)
def test_every_structure_keeps_its_type_and_trains_alike(key, pack, unpack):
    plain, other = network(torch.float64), network(torch.float64)
    one, two = free_for(plain), free_for(other, key=key)
    loader = batches(dtype=torch.float64)
    packed = [pack(x, y) for x, y in loader]
    for (x, y), batch in zip(one.replay(loader), two.replay(packed), strict=True):
        assert type(batch) is type(packed[0])
        x2, y2 = unpack(batch)
        assert torch.equal(x2, x)
        assert torch.equal(y2, y)
        one.step(loss_of(plain, x, y))
        two.step(loss_of(other, x2, y2))
    torch.testing.assert_close(two.delta, one.delta, atol=1e-9, rtol=0)
    for clean, after in zip(loader, packed, strict=True):
        assert torch.equal(unpack(after)[0], clean[0])


def test_a_bare_tensor_is_the_input_itself():
    model = network()
    free = free_for(model)
    for x in free.replay([torch.rand(4, 2, 5, 5)]):
        free.step(model(x).square().mean())
    assert free.delta.shape == (4, 2, 5, 5)


def test_an_input_that_is_also_its_own_target_is_perturbed_only_once():
    x = torch.rand(4, 2, 5, 5)
    model = torch.nn.Conv2d(2, 2, 3, padding=1)
    free = free_for(model)
    for noisy, target in free.replay([(x, x)]):
        assert torch.equal(target, x)
        free.step(functional.mse_loss(model(noisy), target))
    assert not torch.equal(noisy.detach(), x)


trees = st.recursive(
    st.just("leaf"),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore:the batch holds a tensor like its input")
@given(tree=trees, data=st.data())
def test_any_nesting_gets_its_input_replaced_and_nothing_else(tree, data):
    path, node = [], tree
    while node != "leaf":
        keys = list(node) if isinstance(node, dict) else range(len(node))
        path.append(data.draw(st.sampled_from(list(keys))))
        node = node[path[-1]]

    def build(node):
        if node == "leaf":
            return torch.rand(2, 3)
        if isinstance(node, dict):
            return {k: build(v) for k, v in node.items()}
        return type(node)(build(v) for v in node)

    batch = build(tree)
    if not path:
        return
    free = FreeAdversarial(eps=0.1, replays=2, key=tuple(path))

    def compare(old, new, path):
        if isinstance(old, torch.Tensor):
            assert new is not old
            assert new.requires_grad == (path == ())
            if path != ():
                assert torch.equal(new, old)
            return
        assert type(old) is type(new)
        for k in old if isinstance(old, dict) else range(len(old)):
            compare(old[k], new[k], path[1:] if path and path[0] == k else None)

    for fresh in free.replay([batch]):
        compare(batch, fresh, tuple(path))
        x = fresh
        for k in path:
            x = x[k]
        x.square().sum().backward()


def test_changing_a_batch_in_place_reaches_neither_the_next_replay_nor_delta():
    loader = [{"x": torch.rand(4, 2, 5, 5), "y": torch.arange(4), "extra": [torch.ones(3)]}]
    kept = pickle.loads(pickle.dumps(loader))
    model = network()
    free = free_for(model, key="x")
    for batch in free.replay(loader):
        assert torch.equal(batch["extra"][0], torch.ones(3))
        x, y = batch.pop("x"), batch.pop("y")
        assert torch.equal(y, torch.arange(4))
        batch["extra"][0].zero_()
        batch["extra"].append(None)
        x.mul_(0.7).add_(0.1).sub_(0.5).div_(0.25)
        free.step(loss_of(model, x, y))
        y.zero_()
    assert (free.delta != 0).any()
    assert torch.equal(loader[0]["x"], kept[0]["x"])
    assert torch.equal(loader[0]["extra"][0], kept[0]["extra"][0])


def test_a_dataclass_is_fresh_in_every_replay_and_moved_to_the_device():
    model = network()
    free = free_for(model, key="image")
    x, y = batches((4,))[0]
    for batch in free.replay([Sample(x, y)]):
        assert torch.equal(batch.label, batches((4,))[0][1])
        free.step(loss_of(model, batch.image, batch.label))
        batch.label.zero_()
    assert torch.equal(y, batches((4,))[0][1])
    moved = FreeAdversarial(eps=0.1, key="image", device="meta", bounds=None)
    assert next(iter(moved.replay([Sample(x, y)]))).label.device.type == "meta"


def test_what_is_yielded_is_no_leaf_and_the_rows_of_delta_are():
    free = FreeAdversarial(eps=0.1)
    x, _ = next(iter(free.replay(batches())))
    assert x.requires_grad
    assert not x.is_leaf
    (leaf,) = free._loop.group.slots[0].leaves.values()
    assert leaf.is_leaf
    assert leaf.data_ptr() == next(iter(free._loop.delta.buffers.values())).data_ptr()


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


def test_device_moves_every_tensor_of_the_batch():
    # meta is a second device that every machine has; it holds no values.
    free = FreeAdversarial(eps=0.1, device="meta", key="x")
    free.load_state_dict({**free.state_dict(), "delta": [torch.zeros(6, 2, 5, 5)], "places": [0]})
    batch = {"x": torch.rand(2, 2, 5, 5), "y": [torch.zeros(2)], "name": "a"}
    fresh = next(iter(free.replay([batch])))
    assert fresh["x"].device.type == fresh["y"][0].device.type == "meta"
    assert free.delta.device.type == "meta"
    assert free.state_dict()["delta"][0].shape == (6, 2, 5, 5)


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


def test_a_batch_is_as_long_as_its_first_tensor():
    given = [(torch.tensor(2.0), torch.ones(5)), (torch.ones(3), torch.ones(5)), {"a": 1}]
    assert [length(batch) for batch in given] == [1, 3, 1]


def test_a_replay_can_be_copied_and_pickled():
    replay = FreeAdversarial(eps=0.1, replays=2).replay(batches())
    assert len(copy.copy(replay)) == len(pickle.loads(pickle.dumps(replay))) == len(replay) == 6


# Loops that end early.


@pytest.mark.parametrize("end", ["break", "exception", "forgotten iterator"])
@pytest.mark.parametrize("own_backward", [False, True], ids=["step", "own backward"])
def test_after_an_early_end_the_object_goes_on_with_what_it_had_learnt(end, own_backward):
    model = network()
    free = free_for(model, replays=4)
    replay = iter(free.replay(batches()))
    with contextlib.suppress(KeyError):
        for i, (x, y) in enumerate(replay):
            loss = loss_of(model, x, y)
            loss.backward() if own_backward else free.step(loss)
            if i == 1:
                if end == "exception":
                    raise KeyError
                break
    if end != "forgotten iterator":
        replay.close()
    taken = free.state_dict()
    assert taken["done"] == 2
    model.zero_grad()
    count = 0
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))
        count += 1
    assert count == 12
    assert in_ball(free)


def test_the_newest_replay_wins_and_the_older_one_says_so():
    model = network()
    free = free_for(model)
    old = iter(free.replay(batches()))
    next(old)
    count = sum(1 for x, y in free.replay(batches()) if free.step(loss_of(model, x, y)) is None)
    assert count == 12
    with pytest.raises(RuntimeError, match="replaced by a newer one"):
        next(old)
    assert in_ball(free)


def test_an_older_replay_that_ends_leaves_the_newest_alone():
    model = network()
    free = free_for(model)
    old, replay = iter(free.replay(batches())), iter(free.replay(batches()))
    next(old)
    x, y = next(replay)
    old.close()
    free.step(loss_of(model, x, y))
    next(replay)


def test_two_objects_side_by_side_do_not_meet():
    models = [network(), network()]
    frees = [free_for(models[0]), free_for(models[1])]
    alone = network()
    single = free_for(alone)
    for x, y in single.replay(batches()):
        single.step(loss_of(alone, x, y))
    for pairs in zip(frees[0].replay(batches()), frees[1].replay(batches()), strict=True):
        for model, free, (x, y) in zip(models, frees, pairs, strict=True):
            free.step(loss_of(model, x, y))
    assert torch.equal(frees[0].delta, single.delta)
    assert torch.equal(frees[1].delta, single.delta)


def test_a_loader_that_raises_leaves_a_usable_object():
    def broken():
        yield from batches((4,))
        raise OSError("disk")

    model = network()
    free = free_for(model)
    with pytest.raises(OSError, match="disk"):
        for x, y in free.replay(broken()):
            free.step(loss_of(model, x, y))
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))


def test_a_new_replay_takes_in_what_the_last_one_had_left():
    model = network()
    free = FreeAdversarial(eps=0.1)
    for x, y in free.replay(batches()):
        loss_of(model, x, y).backward()
        break
    assert (free.delta == 0).all()
    next(iter(free.replay(batches())))
    assert (free.delta != 0).any()


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


def test_delta_and_clean_are_those_of_the_latest_micro_batch():
    model = network()
    free = free_for(model, accumulate=2, start="uniform")
    for i, (x, y) in enumerate(free.replay(loader := batches((4, 4)))):
        assert torch.equal(free.clean, loader[i % 2][0])
        torch.testing.assert_close((free.clean + free.delta).clamp(0, 1), x.detach())
        free.step(loss_of(model, x, y))


def test_the_share_of_a_micro_batch_is_that_of_its_inputs():
    loader = [(torch.ones(3), x, y) for x, y in batches((8, 3), torch.float64)]
    one, two = network(torch.float64), network(torch.float64)
    plain = free_for(one, accumulate=2)
    for x, y in plain.replay([batch[1:] for batch in loader]):
        plain.step(loss_of(one, x, y))
    free = free_for(two, accumulate=2, key=1)
    for _, x, y in free.replay(loader):
        free.step(loss_of(two, x, y))
    assert torch.equal(one[0].weight, two[0].weight)


def test_a_group_of_empty_batches_passes():
    model = network()
    free = free_for(model, accumulate=2)
    for x, _ in free.replay(batches((0, 0))):
        free.step(model(x).sum())


@pytest.mark.parametrize("sizes", [(4,), (4, 4)])
def test_step_goes_on_where_gradients_of_the_loops_own_have_arrived(sizes):
    model = network()
    free = free_for(model, replays=3, accumulate=3)
    window = list(itertools.islice(free.replay(batches(sizes)), 3))
    for x, y in window[: len(sizes)]:
        loss_of(model, x, y).backward()
    before = model[0].weight.detach().clone()
    for x, y in window[len(sizes) : 2 * len(sizes)]:
        free.step(loss_of(model, x, y))
    assert torch.equal(model[0].weight, before) == (len(sizes) == 2)


class NotSaying:
    """A loader that knows no length and says so as some streams do."""

    def __iter__(self):
        return iter(batches())

    def __len__(self):
        raise NotImplementedError


def test_a_loader_is_not_asked_for_its_length_where_none_is_needed():
    for x, _ in FreeAdversarial(eps=0.1).replay(NotSaying()):
        x.sum().backward()


@pytest.mark.parametrize("sizes", [(4,), (4, 4)])
def test_step_moves_the_weights_at_the_end_of_each_group_in_a_window_too(sizes):
    model = network()
    free = free_for(model, replays=3, accumulate=3)
    replay, moved = iter(free.replay(batches(sizes))), []
    for _ in range(len(sizes)):
        for x, y in itertools.islice(replay, 3):
            before = model[0].weight.detach().clone()
            free.step(loss_of(model, x, y))
            moved.append(not torch.equal(model[0].weight, before))
    assert moved == [i % len(sizes) == len(sizes) - 1 for i in range(3 * len(sizes))]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # of cycles, cut here
def test_a_backward_pass_that_makes_a_graph_leaves_none_in_delta():
    free = FreeAdversarial(eps=0.1)
    for x, _ in free.replay(batches()):
        weight = torch.ones((), requires_grad=True)
        (x * weight).square().sum().backward(create_graph=True)
        weight.grad = None
    assert not free.delta.requires_grad


def test_every_batch_of_a_full_group_must_have_its_gradient_before_the_next_replay():
    model = network()
    replay = iter(FreeAdversarial(eps=0.1, accumulate=2).replay(batches((4, 4))))
    next(replay)
    loss_of(model, *next(replay)).backward()
    with pytest.raises(RuntimeError, match="replay 1 of 4 received no gradient"):
        next(replay)


# Mixed precision, and gradients that are not finite.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_delta_finite_and_in_the_ball(norm, bad):
    model = network()
    free = FreeAdversarial(eps=0.1, norm=norm, replays=3)
    for i, (x, y) in enumerate(free.replay(batches())):
        loss = loss_of(model, x, y)
        (loss * bad if i in (1, 4, 8) else loss).backward()
    assert in_ball(free)
    assert (free.state_dict()["delta"][0] != 0).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_everything_works_together_and_a_huge_loss_scale_backs_off(norm):
    mean, std = 0.4, 0.25
    data = [{"pixel_values": (x - mean) / std, "labels": y} for x, y in batches((8, 8, 8, 5))]
    model = network()
    first, last = model[0], model[3]
    optimizers = [
        torch.optim.SGD(first.parameters(), 0.05, momentum=0.9),
        torch.optim.AdamW(last.parameters(), 1e-2),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2000)
    before = [p.detach().clone() for p in model.parameters()]
    free = FreeAdversarial(
        optimizers, eps=0.1, replays=12, norm=norm, mean=mean, std=std, start="carry",
        scaler=scaler, max_grad_norm=1.0, accumulate=2, key="pixel_values", device="cpu",
    )  # fmt: skip
    for _ in range(3):
        for batch in free.replay(data):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch["pixel_values"], batch["labels"])
            free.step(loss)
            assert in_ball(free)
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_delta_is_float32_for_half_precision_input(dtype):
    model = network(dtype)
    free = free_for(model)
    for x, y in free.replay([(x.to(dtype), y) for x, y in batches()]):
        assert x.dtype == dtype
        free.step(functional.cross_entropy(model(x).float(), y))
    assert free.delta.dtype == torch.float32
    assert in_ball(free)


def test_bfloat16_autocast_trains():
    model = network()
    free = free_for(model)
    for x, y in free.replay(batches()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, y)
        free.step(loss)
    assert (free.delta != 0).any()
    assert in_ball(free)


def test_the_loss_scale_changes_neither_delta_nor_weights():
    results = []
    for scale in (1.0, 2.0**12):
        model = network()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        free = free_for(model, scaler=scaler, max_grad_norm=5.0)
        for x, y in free.replay(batches()):
            free.step(loss_of(model, x, y))
        results.append((free.delta, model[0].weight))
    torch.testing.assert_close(results[0], results[1])


# Misuse.


def detached(free, model, x, y):
    free.step(loss_of(model, x.detach(), y))


def no_grad(free, model, x, y):
    with torch.no_grad():
        loss = loss_of(model, x, y)
    free.step(loss)


def no_backward(free, model, x, y):
    loss_of(model, x, y)


def own_detached(free, model, x, y):
    loss_of(model, x.detach(), y).backward()


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (detached, "the input received no gradient from this loss"),
        (no_grad, "the loss has no graph"),
        (no_backward, "replay 1 of 4 received no gradient"),
        (own_detached, "replay 1 of 4 received no gradient"),
    ],
)
def test_a_replay_without_a_gradient_is_refused_and_the_weights_are_as_they_were(body, where):
    model = network()
    free = free_for(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=where) as caught:
        for x, y in free.replay(batches()):
            body(free, model, x, y)
    for phrase in (
        "free.step(loss)",
        "torch.no_grad()",
        "x.detach()",
        "free.replay(wrapper)",
        "accumulate=",
    ):
        assert phrase in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for x, y in free.replay(batches()):
        free.step(loss_of(model, x, y))


def test_a_consumer_that_looks_ahead_is_refused():
    free = FreeAdversarial(eps=0.1)
    replay = iter(free.replay(batches()))
    next(replay)
    with pytest.raises(RuntimeError, match="replay 1 of 4 received no gradient"):
        next(replay)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    replays=st.integers(1, 4),
    accumulate=st.integers(1, 4),
)
def test_a_consumer_may_take_as_many_batches_as_it_accumulates(sizes, replays, accumulate):
    model = network()
    free = free_for(model, replays=replays, accumulate=accumulate)
    perturbation = free._loop.delta
    plain, taken = perturbation.ascend, []
    perturbation.ascend = lambda rows, grad: (taken.append(rows), plain(rows, grad))
    loader = free.replay(batches(sizes))
    replay, left = iter(loader), len(loader)
    while left:
        window = list(itertools.islice(replay, min(left, accumulate)))
        left -= len(window)
        for x, y in window:
            loss_of(model, x, y).backward()
    assert list(replay) == []
    assert len(taken) == replays * len(sizes)
    assert in_ball(free)


@pytest.mark.parametrize("short", [1, 2])
def test_looking_further_ahead_than_accumulate_is_refused_in_a_short_last_group_too(short):
    free = FreeAdversarial(eps=0.1, replays=5, accumulate=3)
    replay = iter(free.replay(batches((4,) * short)))
    for _ in range(3):
        next(replay)
    with pytest.raises(RuntimeError, match="replay 1 of 5 received no gradient"):
        next(replay)


def test_a_short_last_group_without_gradients_is_refused_at_the_end_at_the_latest():
    free = FreeAdversarial(eps=0.1, replays=2, accumulate=3)
    with pytest.raises(RuntimeError, match="replay 1 of 2 received no gradient"):
        list(free.replay(batches((4,))))


def test_iterating_in_inference_mode_is_refused():
    free = FreeAdversarial(eps=0.1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        next(iter(free.replay(batches())))


def test_step_out_of_order_says_what_was_expected():
    model = network()
    loss = loss_of(model, *batches()[0])
    with pytest.raises(RuntimeError, match=r"needs an optimizer: FreeAdversarial\(optimizer"):
        FreeAdversarial(eps=0.1).step(loss)
    free = free_for(model)
    with pytest.raises(RuntimeError, match="call it once inside"):
        free.step(loss)
    for x, y in free.replay(batches((4,))):
        free.step(loss_of(model, x, y))
        with pytest.raises(RuntimeError, match="call it once inside"):
            free.step(loss)
    with pytest.raises(RuntimeError, match="call it once inside"):
        free.step(loss)


def test_a_loss_that_is_no_scalar_tensor_is_refused_and_can_be_put_right():
    model = network()
    free = free_for(model)
    for x, y in free.replay(batches((4,))):
        with pytest.raises(TypeError, match="loss must be a tensor, got float"):
            free.step(0.5)
        with pytest.raises(ValueError, match=r"shape \(4,\).*mean\(\)"):
            free.step(functional.cross_entropy(model(x), y, reduction="none"))
        free.step(loss_of(model, x, y))


@pytest.mark.parametrize(
    ("arguments", "error", "phrase"),
    [
        ({"eps": 8}, ValueError, "did you mean eps=8/255"),
        ({"replays": 0}, ValueError, "replays must be at least 1, got 0"),
        ({"replays": 2.5}, TypeError, "replays must be a whole number, got float 2.5"),
        ({"replays": True}, TypeError, "replays must be a whole number, got bool"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"step_size": 0}, ValueError, "step_size must be positive"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be positive and finite, got -1"),
        ({"start": "reset"}, ValueError, "start must be 'carry', 'zero' or 'uniform', got 'reset'"),
        ({"scaler": True}, TypeError, "GradScaler, got bool"),
        ({"key": None}, TypeError, "key must be an index, a name, "),
        ({"key": ()}, TypeError, "key must be an index"),
        (
            {"optimizer": network()},
            TypeError,
            "optimizer must be a torch optimizer or several, got",
        ),
        ({"optimizer": []}, ValueError, "optimizer is an empty list"),
        ({"optimizer": 3}, TypeError, "got int"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, phrase):
    with pytest.raises(error, match=phrase):
        FreeAdversarial(**{"eps": 0.1, **arguments})


@pytest.mark.parametrize(
    ("batch", "key", "error", "phrases"),
    [
        ({"pixel_values": torch.rand(2, 3), "labels": torch.zeros(2, dtype=torch.long)}, 0, ValueError,
         ["no key=0", "it is a dict", "perhaps key='pixel_values'"]),
        ({"a": 1}, "image", ValueError, ["no key='image'", "'a': int", "with key="]),
        ((torch.rand(2, 3),), 3, ValueError, ["no key=3", "perhaps key=0"]),
        (torch.rand(2, 3), 1, ValueError, ["no key=1", "it is a Tensor"]),
        (({"patches": torch.rand(2, 3), "valid": torch.ones(2)}, 1), "x", ValueError,
         ["no key='x'", r"perhaps key=\(0, 'patches'\)"]),
        ((torch.rand(2, 3),), (0, 1), ValueError, [r"no key=\(0, 1\)"]),
        (([1.0, 2.0], 1), 0, TypeError, ["must be a tensor, got list"]),
        ((torch.ones(2, 3, dtype=torch.uint8),), 0, TypeError, ["torch.uint8"]),
        ((torch.rand(2, 3) * 255,), 0, ValueError, ["divide them by 255"]),
        (((torch.rand(2, 3) - 0.5) / 0.2,), 0, ValueError, ["mean= and std="]),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_right_is_refused_with_its_cure(batch, key, error, phrases):
    free = FreeAdversarial(eps=0.1, key=key)
    with pytest.raises(error) as caught:
        next(iter(free.replay([batch])))
    for phrase in phrases:
        caught.match(phrase)


def test_what_is_no_loader_is_refused():
    free = FreeAdversarial(eps=0.1)
    with pytest.raises(TypeError, match="loader must be iterable, got int"):
        free.replay(3)
    with pytest.raises(ValueError, match="replay already"):
        free.replay(free.replay([]))


# Random orders of calls.


@given(
    calls=st.lists(
        st.sampled_from(
            ["next", "next", "backward", "backward", "step", "break", "error", "save", "load"]
        ),
        max_size=40,
    ),
    accumulate=st.integers(1, 2),
)
def test_any_order_of_calls_ends_right_or_in_a_clear_error(calls, accumulate):
    model = network()
    m = 3
    free = free_for(model, replays=m, accumulate=accumulate, eps=0.1)
    loader = batches((4, 4, 2))
    replay = iter(free.replay(loader))
    current, state, ascents, yields = None, None, 0, 0
    perturbation = free._loop.delta
    plain = perturbation.ascend

    def counted(rows, grad):
        nonlocal ascents
        expected = (perturbation[rows] + 0.1 * grad.sign()).clamp(-0.1, 0.1)
        plain(rows, grad)
        ascents += 1
        assert torch.equal(perturbation[rows], expected)

    perturbation.ascend = counted
    used = False
    for call in calls:
        try:
            if call == "next":
                current, used = next(replay), False
                yields += 1
                x, _ = current
                assert free.clean.sub(x.detach()).abs().max() <= 0.1 + 1e-6
                assert x.detach().min() >= 0
                assert x.detach().max() <= 1
            elif call in ("backward", "step") and current is not None and not used:
                loss = loss_of(model, *current)
                loss.backward() if call == "backward" else free.step(loss)
                used = True
            elif call == "break":
                replay.close()
                replay, current = iter(free.replay(loader)), None
            elif call == "error":
                with contextlib.suppress(ZeroDivisionError):
                    replay.throw(ZeroDivisionError)
                replay, current = iter(free.replay(loader)), None
            elif call == "save":
                state = free.state_dict()
            elif call == "load" and state is not None:
                free.load_state_dict(state)
                replay, current = iter(free.replay(loader)), None
        except StopIteration:
            replay, current = iter(free.replay(loader)), None
        except RuntimeError as error:
            assert any(p in str(error) for p in ("received no gradient", "call it once inside"))
            if "call it once" not in str(error):
                replay, current = iter(free.replay(loader)), None
        assert in_ball(free)
        assert ascents <= yields
