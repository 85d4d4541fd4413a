"""Batches of every structure: what is perturbed in them, and that all the rest stays as it is."""

import collections
import collections.abc
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import free_for, loss_of
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


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: [t],
        lambda t: collections.OrderedDict(t=t),
        lambda t: collections.deque([{"t": t}]),
        lambda t: Pair("a name", t),
        lambda t: Sample(t, "a name"),
    ],
    ids=["list", "ordered dict", "dict in a deque", "named tuple", "dataclass"],
)
def test_what_a_container_in_an_object_holds_is_fresh_in_every_replay_and_moved(hold):
    def held(record):
        value = record.label
        while not isinstance(value, torch.Tensor):
            value = vars(value) if isinstance(value, Sample) else value
            inner = value.values() if isinstance(value, dict) else value
            value = next(v for v in inner if not isinstance(v, str))
        return value

    x, given = torch.rand(2, 3), torch.ones(4)
    record = Record(x, hold(given))
    for fresh in FreeAdversarial(eps=0.1, key="image", replays=3).replay([record]):
        assert torch.equal(held(fresh), torch.ones(4))
        held(fresh).zero_()
        fresh.image.sum().backward()
    assert torch.equal(given, torch.ones(4))
    moved = FreeAdversarial(eps=0.1, key="image", device="meta", bounds=None)
    assert held(next(iter(moved.replay([record])))).device.type == "meta"


class Frozen:
    """As frozen classes of attrs and pydantic are."""

    def __init__(self, image, label):
        self.__dict__.update(image=image, label=label)

    def __setattr__(self, name, value):
        raise AttributeError("frozen")


@dataclass
class Node:
    value: torch.Tensor
    above: object = None
    below: list = field(default_factory=list)


class Lazy(collections.abc.Mapping):
    """It computes what it is asked for, and has a constructor of its own."""

    def __init__(self, size):
        self.size = size

    def __getitem__(self, key):
        raise OSError("not there")

    def __iter__(self):
        return iter(range(self.size))

    def __len__(self):
        return self.size


class Shape(tuple):
    __slots__ = ()

    def __new__(cls, height, width):
        return super().__new__(cls, (height, width))


def test_what_in_an_object_holds_itself_or_is_of_a_class_of_its_own_is_passed_on_as_it_is():
    tree = Node(torch.ones(2))
    tree.below.append(Node(torch.ones(2), above=tree))
    shape = Shape(torch.ones(2), torch.ones(2))
    for label in (tree, Lazy(3), shape):
        fresh = next(
            iter(FreeAdversarial(eps=0.1, key="image").replay([Record(torch.rand(2, 3), label)]))
        )
        assert fresh.label is label
        assert fresh.image.requires_grad


def test_an_object_that_is_frozen_is_a_batch():
    x = torch.rand(2, 3)
    batch = next(iter(FreeAdversarial(eps=0.1, key="image").replay([Frozen(x, Frozen(x, x))])))
    assert isinstance(batch, Frozen)
    assert batch.image.requires_grad
    assert not x.requires_grad


def test_device_moves_every_tensor_of_the_batch():
    # meta is a second device that every machine has; it holds no values.
    free = FreeAdversarial(eps=0.1, device="meta", key="x")
    free.load_state_dict(
        {
            **free.state_dict(),
            "delta": [torch.zeros(6, 2, 5, 5)],
            "places": [(0, 0, "['x']")],
            "begun": [0],
            "noise": [torch.zeros(0, 2, 5, 5)],
        }
    )
    batch = {"x": torch.rand(2, 2, 5, 5), "y": [torch.zeros(2)], "name": "a"}
    fresh = next(iter(free.replay([batch])))
    assert fresh["x"].device.type == fresh["y"][0].device.type == "meta"
    assert free.delta.device.type == "meta"
    assert free.state_dict()["delta"][0].shape == (6, 2, 5, 5)
