"""Batches of any class: containers, tensors of a subclass, several inputs, lists of samples, devices."""

import collections
import copy
import dataclasses
import itertools
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from free_adv import FreeAdversarial
from tests.internals import rows
from tests.reference import batches, network

EPS = 0.1
X, Y = torch.linspace(0.2, 0.8, 4 * 2 * 5 * 5).reshape(4, 2, 5, 5), torch.arange(4)


def far(moved, clean):
    return (moved.detach() - clean).abs().max().item()


# Containers of the loader's own.


class Holder:
    """An object that keeps what it holds in a dict."""

    def __init__(self, **items):
        self.data = items


class Indexed(Holder):
    def __getitem__(self, name):
        return self.data[name]

    def __setitem__(self, name, value):
        self.data[name] = value


class Mapped(collections.abc.MutableMapping):
    """A mapping whose iteration gives something else than its keys, as some batch classes do."""

    def __init__(self, **items):
        self.inner = items

    def keys(self):
        return self.inner.keys()

    def __getitem__(self, name):
        return self.inner[name]

    def __setitem__(self, name, value):
        self.inner[name] = value

    def __delitem__(self, name):
        del self.inner[name]

    def __iter__(self):
        return iter(range(4))

    def __len__(self):
        return 4


class Slotted:
    __slots__ = ("image", "label")

    def __init__(self, image, label):
        self.image, self.label = image, label


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: object


class Items(list):
    """A list with an attribute."""

    name = "items"


CONTAINERS = {
    "an object that holds a dict": (("data", "x"), lambda x: Holder(x=x), lambda b: b.data["x"]),
    "an object with items": ("x", lambda x: Indexed(x=x), lambda b: b["x"]),
    "a mapping of the user's": ("x", lambda x: Mapped(x=x), lambda b: b["x"]),
    "slots": ("image", lambda x: Slotted(x, Y), lambda b: b.image),
    "a dict in an object in a list": ((0, "data", "x"), lambda x: [Holder(x=x)], lambda b: b[0].data["x"]),
    "an object in a frozen dataclass": (
        ("inner", "data", "x"),
        lambda x: Outer(Holder(x=x)),
        lambda b: b.inner.data["x"],
    ),
    "a list in a dict in a tuple": ((0, "x", 1), lambda x: ({"x": [Y, x]},), lambda b: b[0]["x"][1]),
    "a list of a class": (0, lambda x: Items([x, Y]), lambda b: b[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_nothing_of_the_loaders_own_batch_is_ever_changed(name):
    key, pack, unpack = CONTAINERS[name]
    batch, free = pack(X), FreeAdversarial(eps=EPS, replays=3, key=key)
    moved = []
    for _ in range(3):
        for fresh in free.replay([batch]):
            assert type(fresh) is type(batch)
            assert unpack(batch) is X
            moved.append(far(unpack(fresh), X))
            unpack(fresh).sum().backward()
    assert max(moved) == pytest.approx(EPS)
    assert not X.requires_grad


def test_what_stands_beside_the_input_in_an_object_is_fresh_in_every_replay():
    batch = Holder()
    batch.image = batch.target = X.clone()
    for fresh in FreeAdversarial(eps=EPS, key="image").replay([batch]):
        assert fresh.target is not batch.target
        fresh.target.zero_()
        fresh.image.sum().backward()
    assert torch.equal(batch.image, X)


def test_the_same_tensor_twice_is_two_tensors_to_the_loop():
    x = X.clone()
    for one, target, again in FreeAdversarial(eps=EPS).replay([(x, x, x)]):
        assert torch.equal(target, X)
        assert torch.equal(again, X)
        target.sub_(0.1)
        again.zero_()
        (one - target).square().sum().backward()
    assert torch.equal(x, X)


# Tensors of a subclass.


class Image(torch.Tensor):
    """As fastai's images: a subclass with metadata."""


def image(x):
    made = x.as_subclass(Image)
    made.meta = {"file": "a.png"}
    return made


def test_a_tensor_of_a_subclass_trains_as_a_plain_one_and_keeps_type_and_metadata():
    results = []
    for wrap in (torch.Tensor.clone, image):
        model = network()
        free = FreeAdversarial(torch.optim.SGD(model.parameters(), 0.1), eps=EPS)
        for x, y in free.replay([(wrap(x), y) for x, y in batches()]):
            assert type(x) is (Image if wrap is image else torch.Tensor)
            if wrap is image:
                assert x.meta == {"file": "a.png"}
                x.meta.clear()
            x = x.as_subclass(torch.Tensor).mul_(0.9)  # no leaf
            free.step(functional.cross_entropy(model(x), y))
        assert type(free.delta) is type(free.clean) is torch.Tensor
        results.append([free.delta, *model.parameters()])
    assert all(map(torch.equal, *results))


def test_images_of_torchvision_keep_their_type():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    for x, _ in FreeAdversarial(eps=EPS).replay(
        [(tv_tensors.Image(X[:, :1].repeat(1, 3, 1, 1)), Y)]
    ):
        assert type(x) is tv_tensors.Image
        x.sum().backward()


def test_a_parameter_is_an_input_like_any_other():
    for (x,) in FreeAdversarial(eps=EPS).replay([(torch.nn.Parameter(X),)]):
        assert type(x) is torch.Tensor
        x.sum().backward()


# Several inputs.


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_inputs_train_as_one_that_holds_both(norm):
    """In linf two views are one input of twice the channels; in l2 each has a ball of its own."""
    one = FreeAdversarial(eps=EPS, replays=3, norm=norm)
    two = FreeAdversarial(eps=EPS, replays=3, norm=norm, key=[0, 1])
    pairs = [(x, x.flip(0), y) for x, y in batches((8, 8), torch.float64)]
    weight = torch.linspace(-1, 1, 4 * 25, dtype=torch.float64).reshape(4, 5, 5)
    stacked = one.replay([(torch.cat([x, z], 1), y) for x, z, y in pairs])
    for (both, _), (x, z, _) in zip(stacked, two.replay(pairs), strict=True):
        if norm == "linf":
            assert torch.equal(both, torch.cat([x, z], 1))
        (both * weight).square().sum().backward()
        (torch.cat([x, z], 1) * weight).square().sum().backward()
        assert isinstance(two.delta, list)
        torch.testing.assert_close((two.clean[0] + two.delta[0]).clamp(0, 1), x.detach())
    for delta in two.delta:
        assert two.threat.distance(delta).max() == pytest.approx(EPS)


def test_an_input_whose_gradient_does_not_come_is_told_though_another_has_its():
    free = FreeAdversarial(eps=EPS, key=[0, 1])
    with pytest.raises(RuntimeError, match="replay 1 of 4 received no gradient"):
        for x, _ in free.replay([(X, X.flip(0))]):
            x.sum().backward()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_element_of_a_list_is_one_sample_of_its_own_size(norm):
    images = [torch.rand(3, 6, 6 + i % 2) * 2 - 1 for i in range(4)]
    targets = [{"boxes": torch.rand(2, 4)} for _ in images]
    scale = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}  # channels are dimension 0 here
    free = FreeAdversarial(eps=EPS, replays=3, norm=norm, key=(0, ...), **scale)
    for moved, fresh in free.replay([(images, targets)] * 2):
        assert type(moved) is list
        assert [m.shape for m in moved] == [i.shape for i in images]
        assert fresh[0]["boxes"] is not targets[0]["boxes"]
        for m in moved:
            m.mul_(1)  # no leaf, and no view that forbids it
        sum(m.square().sum() for m in moved).backward()
    assert (
        [d.shape for d in free.delta] == [c.shape for c in free.clean] == [i.shape for i in images]
    )
    for delta, clean, image in zip(free.delta, free.clean, images, strict=True):
        assert torch.equal(clean, image)
        assert free.threat.distance(delta[None]).item() == pytest.approx(EPS, rel=1e-4)
    assert sorted(tuple(d.shape) for d in free.state_dict()["delta"]) == [
        (2, 3, 6, 6),
        (2, 3, 6, 7),
    ]


@pytest.mark.parametrize(
    "kind", [torch.Tensor, type("Image", (torch.Tensor,), {})], ids=["plain", "subclass"]
)
@pytest.mark.parametrize("key", [0, (0, ...)], ids=str)
def test_every_kind_of_input_may_be_asked_for_where_gradients_are_off(key, kind):
    batch = (
        ([X[0].as_subclass(kind), X[1].as_subclass(kind)],) if key != 0 else (X.as_subclass(kind),)
    )
    replay = iter(FreeAdversarial(eps=EPS, replays=2, key=key).replay([batch]))
    for _ in range(2):
        with torch.no_grad():
            (found,) = next(replay)
        torch.stack([*found]).as_subclass(torch.Tensor).sum().backward()
    assert list(replay) == []


def test_a_list_of_dicts_is_a_batch_too():
    batch = [{"image": torch.rand(3, 4, 4 + i), "file": str(i)} for i in range(3)]
    for fresh in FreeAdversarial(eps=EPS, key=(..., "image")).replay([batch]):
        assert [b["file"] for b in fresh] == ["0", "1", "2"]
        sum(b["image"].sum() for b in fresh).backward()
    assert not any(b["image"].requires_grad for b in batch)


def test_micro_batches_of_lists_are_weighted_by_their_samples():
    model = network(torch.float64)
    (x, y), (z, w) = batches((3, 1), torch.float64)
    lists = [([*x], y), ([*z], w)]
    free = FreeAdversarial(
        torch.optim.SGD(model.parameters(), 0.1), eps=EPS, key=(0, ...), accumulate=2
    )
    for images, labels in free.replay(lists):
        free.step(functional.cross_entropy(model(torch.stack(images)), labels))
    other = network(torch.float64)
    large = FreeAdversarial(torch.optim.SGD(other.parameters(), 0.1), eps=EPS)
    for images, labels in large.replay([(torch.cat([x, z]), torch.cat([y, w]))]):
        large.step(functional.cross_entropy(other(images), labels))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("stop", range(1, 12))
@pytest.mark.parametrize("key", [[0, 1], (2, ...)], ids=str)
def test_a_run_with_several_inputs_goes_on_bit_equal_from_any_replay(key, stop):
    loader = [(x, x.flip(0), [*x], y) for x, y in batches()]

    def run(model, optimizer, free, source, stop=None):
        for i, (a, b, rest, y) in enumerate(free.replay(source)):
            x = torch.stack(rest) if key == (2, ...) else (a + b) / 2
            free.step(functional.cross_entropy(model(x), y))
            if i + 1 == stop:
                return

    def made():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, FreeAdversarial(optimizer, eps=EPS, key=key)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tensors that are not named
        run(*(whole := made()), loader)
        source = iter(loader)
        run(*(parts := made()), source, stop)
        states = [copy.deepcopy(part.state_dict()) for part in parts]
        for part, state in zip(fresh := made(), states, strict=True):
            part.load_state_dict(state)
        run(*fresh, source)
    for mine, theirs in zip(fresh[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(map(torch.equal, fresh[2].state_dict()["delta"], whole[2].state_dict()["delta"]))


@pytest.mark.parametrize(
    ("batch", "key", "phrase"),
    [
        (([X[0], X[1]], [1, 2]), 0, r"perhaps key=\(0, \.\.\.\) if each"),
        (([X[0]], [1]), 0, r"perhaps key=\(0, \.\.\.\) if each"),
        ({"views": (X, X)}, "views", r"perhaps key=\('views', \.\.\.\) if each .* two views"),
        ([{"image": X[0]}, {"image": X[1]}], "image", r"perhaps key=\(\.\.\., 'image'\)"),
        ((X, Y), (0, ...), r"no key=\(0, \.\.\.\).*perhaps key=0"),
        (([], []), (0, ...), r"no key=\(0, \.\.\.\)"),
        (({"a": [Y, X]},), "a", r"perhaps key=\(0, 'a', 1\)"),
    ],
)
def test_the_hint_never_names_one_of_a_list_of_like_tensors(batch, key, phrase):
    with pytest.raises((ValueError, TypeError), match=phrase) as caught:
        next(iter(FreeAdversarial(eps=EPS, key=key).replay([batch])))
    assert "(0, 0)" not in str(caught.value)


@pytest.mark.parametrize("key", [None, (), [], [0, None], 1.5])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(TypeError, match="key must be an index, a name"):
        FreeAdversarial(eps=EPS, key=key)


def train(free, loader, after=bool):
    for x, *_ in free.replay(loader):
        x.sum().backward()
        after()


def test_a_second_view_that_is_not_named_is_told_once():
    free = FreeAdversarial(eps=EPS, replays=1)
    views = [(X, X.flip(0), X.flip(1), Y), (X, X.flip(0), X, Y)]
    with pytest.warns(UserWarning, match=r"like its input at \(1,\).*key=\[0, 1\]") as told:
        train(free, views)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_targets_that_are_the_input_itself_or_of_another_form_are_not_told():
    for batch in [(X, X, Y), (X, Y), (X[:, 0, 0, 0], Y.float()), (X, X[:2]), (X, (X * 255).long())]:
        train(FreeAdversarial(eps=EPS, replays=1), [batch])


@given(
    st.lists(st.sampled_from([(3, 2), (3, 3), (1, 2)]), min_size=1, max_size=6), st.integers(1, 3)
)
def test_rows_of_delta_never_meet(shapes, accumulate):
    free = FreeAdversarial(eps=EPS, replays=2, key=(0, ...), accumulate=accumulate)
    loader = [([torch.full(s, 0.5) for s in shapes[i:]],) for i in range(len(shapes))]
    for (images,) in free.replay(loader):
        taken = [(r.key, i) for r in rows(free) for i in range(r.start, r.stop)]
        assert len(set(taken)) == len(taken)
        sum(i.sum() for i in images).backward()


# Devices. meta is a second device that every machine has.


class Movable:
    def __init__(self, x):
        self.x = x

    def to(self, device):
        self.x = self.x.to(device)  # in place, as some do
        return self


@pytest.mark.parametrize("window", [1, 2])
def test_arrays_come_anew_in_every_replay_as_tensors_do(window):
    held = {"y": np.arange(4), "names": np.array(["a", "b", "c", "d"], dtype=object)}
    loader = [(torch.rand(4, 3), held, [np.ones(4)], Labelled(np.arange(4)))] * 2
    for x, labels, (weights,), labelled in FreeAdversarial(
        eps=EPS, replays=3, window=window
    ).replay(loader):
        assert labels["y"].tolist() == labelled.y.tolist() == [0, 1, 2, 3]
        assert weights.tolist() == [1] * 4
        labels["y"] -= 1  # the loop counts from 0
        labelled.y -= 1
        labels["names"][0] = "changed"
        weights *= 2
        x.sum().backward()
    assert held["y"].tolist() == [0, 1, 2, 3]
    assert held["names"][0] == "a"


@dataclasses.dataclass
class Labelled:
    y: np.ndarray


REUSED = {
    "a tensor": lambda memory, i: memory.fill_(i / 10),
    "an array": lambda memory, i: torch.from_numpy(_filled(memory.numpy(), i / 10)),
    "a view": lambda memory, i: memory.fill_(i / 10)[:],
    "inside": lambda memory, i: {"x": [memory.fill_(i / 10)]},
}


def _filled(array, value):
    array[:] = value
    return array


@pytest.mark.parametrize(
    "how", [{"window": 2}, {"accumulate": 2}, {"window": 2, "accumulate": 2}], ids=str
)
@pytest.mark.parametrize("source", REUSED.values(), ids=REUSED)
@pytest.mark.parametrize("at", [False, True])
def test_a_loader_may_use_its_memory_again(source, how, at):
    memory = torch.zeros(4, 6)

    def loader():
        for i in range(4):
            yield source(memory, i)

    key, module = ("x", 0) if source is REUSED["inside"] else 0, nn.Identity()
    where = {"at": module} if at else {"key": key}
    free, seen = FreeAdversarial(eps=0.01, bounds=None, replays=2, **where, **how), []
    for batch in free.replay(loader()):
        x = batch["x"][0] if isinstance(batch, dict) else batch
        module(x).sum().backward()
        seen.append(round(10 * free.clean.mean().item()))
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


class Slots:
    """An object that keeps its tensors in slots."""

    __slots__ = ("more", "x", "y")

    def __init__(self, x, y, more):
        self.x, self.y, self.more = x, y, more


class Graph:
    """An object with keys, as a batch of PyG's."""

    def __init__(self, x, y, more):
        self._store = {"x": x, "y": y, "more": more}

    def keys(self):
        return self._store.keys()

    def __getitem__(self, key):
        return self._store[key]

    def __getattr__(self, name):
        if name == "_store" or name not in self._store:
            raise AttributeError(name)
        return self._store[name]

    def __setattr__(self, name, value):
        if name == "_store":
            self.__dict__[name] = value
        else:
            self._store[name] = value


OBJECTS = {
    "attributes": lambda x, y, more: types.SimpleNamespace(x=x, y=y, more=more),
    "slots": Slots,
    "keys": Graph,
}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("how", [{"key": "x"}, {"at": nn.Identity()}], ids=["key", "at"])
def test_what_an_object_holds_comes_anew_and_the_loaders_own_stays(make, how):
    batch = make(torch.rand(4, 3), torch.arange(4), {"a": [np.arange(4)]})
    module = how.get("at", nn.Identity())
    for b in FreeAdversarial(eps=EPS, replays=3, bounds=None, **how).replay([batch]):
        assert b.y.tolist() == b.more["a"][0].tolist() == [0, 1, 2, 3]
        b.y -= 1
        b.more["a"][0][:] = 9
        module(b.x).sum().backward()
    assert batch.y.tolist() == batch.more["a"][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_pieces_and_shares_of_an_object_are_those_of_its_tensors(make):
    torch.manual_seed(0)
    x, y = torch.rand(10, 3, dtype=torch.float64), torch.arange(10) % 3
    results = []
    for cuts in ([slice(0, 8), slice(8, 10)], [slice(0, 10)]):
        model = nn.Linear(3, 3).double()
        nn.init.eye_(model.weight)
        nn.init.zeros_(model.bias)
        at = nn.Identity()
        free = FreeAdversarial(
            torch.optim.SGD(model.parameters(), 0.1),
            eps=EPS,
            replays=2,
            accumulate=len(cuts),
            at=at,
        )
        loader = [make(x[cut], y[cut], {}) for cut in cuts]
        for b in free.replay(loader):
            half = len(b.y) // 2
            z = torch.cat([at(b.x[half:]), at(b.x[:half])])  # in another order
            free.step(functional.cross_entropy(model(z), torch.cat([b.y[half:], b.y[:half]])))
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_an_object_whose_memory_the_loader_uses_again_is_trained_on_whole(make):
    memory, seen = torch.zeros(4, 6), []

    def loader():
        batch = make(memory, torch.arange(4), {})
        for i in range(4):
            memory.fill_(i / 10)
            yield batch

    free = FreeAdversarial(eps=0.01, bounds=None, replays=2, window=2, key="x")
    for b in free.replay(loader()):
        b.x.sum().backward()
        seen.append(round(10 * free.clean.mean().item()))
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


class Named(collections.namedtuple("Named", "x y")):
    """A named tuple with a constructor of its own."""

    def __new__(cls, both):
        return super().__new__(cls, *both)


@dataclasses.dataclass
class Late:
    x: torch.Tensor
    cache: object = dataclasses.field(init=False)


class InPlace:
    def __init__(self, x):
        self.x = x

    def to(self, device):
        self.x = self.x.to(device)


class Attributes(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("batch", "key"),
    [
        (Named((X, Y)), "x"),
        (Late(X), "x"),
        (InPlace(X), "x"),
        (Attributes(x=X), "x"),
        (collections.deque([X, Y]), None),
        (collections.UserList([X, Y]), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_odd_containers_are_moved_and_copied_as_any_other(batch, key):
    at = nn.Identity()
    for window in (1, 2):
        free = FreeAdversarial(
            eps=EPS, replays=2, device="cpu", window=window, **({"key": key} if key else {"at": at})
        )
        for b in free.replay([batch] * 2):
            assert type(b) is type(batch)
            x = b["x"] if isinstance(b, dict) else b.x if key else at(b[0])
            x.sum().backward()
        assert (free.delta == EPS).all()


IMAGES, TOKENS, LABELS = torch.rand(4, 3, 8, 8), torch.randint(0, 99, (4, 7)), torch.arange(4)
MISTAKEN = {  # what is at the key, and the cure
    "labels first": ((LABELS, IMAGES), 0, "perhaps key=1"),
    "labels first, by name": ({"label": LABELS, "image": IMAGES}, "label", "perhaps key='image'"),
    "tokens": ((TOKENS, LABELS), 0, r"at=model.get_input_embeddings\(\)"),
    "tokens by name": ({"input_ids": TOKENS}, "input_ids", r"at=model.get_input_embeddings\(\)"),
    "bytes": (((IMAGES * 255).byte(), LABELS), 0, r"x.float\(\) / 255"),
    "bytes beside a map": (((IMAGES * 255).byte(), IMAGES), 0, r"x.float\(\) / 255"),
    "an array": ((IMAGES.numpy(), LABELS), 0, "got a NumPy array; convert it .* torch.as_tensor"),
}


@pytest.mark.parametrize(("batch", "key", "cure"), MISTAKEN.values(), ids=MISTAKEN)
def test_an_input_of_another_kind_is_refused_with_the_cure_that_fits(batch, key, cure):
    with pytest.raises(TypeError, match=cure):
        next(iter(FreeAdversarial(eps=EPS, key=key).replay([batch])))


def test_what_has_a_to_of_its_own_is_moved_by_it_and_the_loaders_own_stays():
    packed = pack_padded_sequence(torch.rand(2, 3, 4), [3, 2], batch_first=True)
    for batch, key in ((packed, "data"), (Movable(X), "x"), (Outer(Movable(X)), ("inner", "x"))):
        fresh = next(iter(FreeAdversarial(eps=EPS, key=key, device="meta").replay([batch])))
        inner = fresh.inner if isinstance(fresh, Outer) else fresh
        old = batch.inner if isinstance(batch, Outer) else batch
        name = "data" if key == "data" else "x"
        assert type(inner) is type(old)
        assert getattr(inner, name).device.type == "meta"
        assert getattr(old, name).device.type == "cpu"


def test_a_packed_sequence_trains():
    model = torch.nn.LSTM(4, 5, batch_first=True)
    packed = pack_padded_sequence(torch.rand(2, 3, 4), [3, 2], batch_first=True)
    free = FreeAdversarial(torch.optim.SGD(model.parameters(), 0.1), eps=EPS, key="data")
    for batch in free.replay([packed]):
        assert isinstance(batch, PackedSequence)
        free.step(model(batch)[0].data.square().mean())
    assert free.delta.abs().max() == pytest.approx(EPS)


def test_what_cannot_be_moved_says_so():
    class Opaque:
        image = property(lambda self: X)

    with pytest.raises(TypeError, match=r"device='meta' cannot move the Opaque .*to\(device\)"):
        next(iter(FreeAdversarial(eps=EPS, key="image", device="meta").replay([Opaque()])))
    with pytest.raises((TypeError, RuntimeError), match=r"device must be what Tensor\.to takes"):
        FreeAdversarial(eps=EPS, device="nowhere")


@pytest.mark.parametrize("own", [False, True], ids=["step", "own optimizer"])
def test_training_through_the_host_is_told_once(own):
    """Weights elsewhere: here an optimizer of weights on meta, beside a model on the CPU that gives gradients."""
    far_away = torch.optim.SGD([torch.zeros(2, device="meta", requires_grad=True)], 0.1)
    free = FreeAdversarial(None if own else far_away, eps=EPS)
    with pytest.warns(UserWarning, match=r"device='meta'\), which moves each batch once") as told:
        train(free, [(X, Y)] * 2, far_away.step if own else bool)
    assert len(told) == 1


def test_weights_beside_the_batches_are_not_told_of():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in FreeAdversarial(eps=EPS).replay(batches()):
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


# Gradients that do not come, and those that come too late.


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("own", [False, True], ids=["step", "own backward"])
@pytest.mark.parametrize("at", [False, True], ids=["input", "at"])
def test_a_gradient_that_is_none_has_not_arrived(own, at):
    model = torch.nn.Sequential(torch.nn.Identity(), network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    free = FreeAdversarial(None if own else optimizer, eps=EPS, at=model[0] if at else None)
    with pytest.raises(RuntimeError, match="received no gradient"):
        for x, y in free.replay(batches()):
            loss = functional.cross_entropy(model[1](NoGradient.apply(model[0](x))), y)
            loss.backward() if own else free.step(loss)


def late_by_cycle(free):
    for x, _ in itertools.islice(itertools.cycle(free.replay(batches((4, 4)))), 30):
        x.sum().backward()


def late_by_cache(free):
    for x, _ in list(map(tuple, cached(free))):
        x.sum().backward()


def cached(free):
    for x, y in free.replay(batches((4,))):
        x.sum().backward()
        yield x, y


def late_after_the_loop(free):
    for x, _ in free.replay(batches((4,))):
        x.sum().backward()
    x.sum().backward()


def late_by_one(free):
    old = None
    for x, _ in free.replay(batches((4, 4))):
        (x.sum() + (0 if old is None else old.sum())).backward()
        old = x


def late_after_the_block(free):
    with free:
        x, _ = next(iter(free.replay(batches((4,)))))
    x.sum().backward()


def late_after_a_skip(free):
    for x, _ in free.replay(batches((4,))):
        free.skip()
        x.sum().backward()


@pytest.mark.parametrize(
    "loop",
    [late_by_cycle, late_by_cache, late_after_the_loop, late_by_one, late_after_the_block, late_after_a_skip],
)  # fmt: skip
def test_a_batch_that_comes_after_its_time_is_refused_in_its_backward_pass(loop):
    with pytest.raises(
        RuntimeError, match=r"time is over.*\n.*free.replay\(itertools.cycle\(loader"
    ):
        loop(FreeAdversarial(eps=EPS))


def test_several_passes_over_the_batch_in_hand_add_up():
    one, two = FreeAdversarial(eps=EPS, norm="l2"), FreeAdversarial(eps=EPS, norm="l2")
    weight = torch.linspace(-1, 1, 50).reshape(2, 5, 5)
    for (x, _), (z, _) in zip(one.replay([(X, Y)]), two.replay([(X, Y)]), strict=True):
        (x * weight).sum().backward()
        x.square().sum().backward()
        ((z * weight).sum() + z.square().sum()).backward()
    torch.testing.assert_close(one.delta, two.delta)


def test_a_batch_in_hand_may_go_backward_once_more_after_its_step():
    model = network()
    free = FreeAdversarial(torch.optim.SGD(model.parameters(), 0.1), eps=EPS)
    for x, y in free.replay(batches((4,))):
        free.step(functional.cross_entropy(model(x), y))
        model(x).sum().backward()  # of another network's optimizer, say


def test_losses_that_are_kept_keep_neither_inputs_nor_gradients():
    model, free, total = network(), FreeAdversarial(eps=EPS), 0
    for x, y in free.replay(batches((8,) * 5)):
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        total = total + loss
    del x, loss
    seen, todo, storages = set(), [total.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.shape == (8, 2, 5, 5):
            storages.add(leaf.untyped_storage().data_ptr())
            assert leaf.grad is None
    assert len(storages) == 1  # delta itself


def test_a_gradient_whose_memory_is_used_again_does_no_harm():
    class Graphed(torch.autograd.Function):
        """Hands out its gradients in memory of its own, as a CUDA graph does."""

        memory = torch.zeros_like(X)

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return Graphed.memory.copy_(grad).detach()

    deltas = []
    for wrap in (torch.clone, Graphed.apply):
        model, free = network(), FreeAdversarial(eps=EPS)
        for x, y in free.replay([(X, Y)]):
            functional.cross_entropy(model(wrap(x)), y).backward()
            Graphed.memory.normal_()
        deltas.append(free.delta)
    assert torch.equal(*deltas)


# A detector, in its own training loop.


def test_a_detector_of_torchvision_trains_on_a_list_of_images_of_several_sizes():
    detection = pytest.importorskip("torchvision.models.detection")
    model = detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(2)]
    images = [torch.rand(3, 48, 64), torch.rand(3, 64, 48)]
    free = FreeAdversarial(eps=8 / 255, replays=2, key=(0, ...))
    for moved, found in free.replay([(images, targets)]):
        loss = sum(model(moved, found).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [d.shape for d in free.delta] == [i.shape for i in images]
    assert all(d.abs().max() > 0 for d in free.delta)
