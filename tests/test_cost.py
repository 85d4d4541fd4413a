"""What a replay costs beside the training itself: no waiting for the device, no further copies."""

import gc
import itertools
import weakref

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from free_adv import FreeAdversarial
from tests.internals import buffers, leaf
from tests.reference import batches, network


class Operators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "normalised"])
def test_after_the_first_minibatch_no_value_is_read_and_no_constant_is_made(norm, scaled):
    scale = {"mean": (0.4, 0.5), "std": (0.2, 0.3)} if scaled else {}
    model = network()
    free = FreeAdversarial(
        torch.optim.SGD(model.parameters(), 0.1), eps=0.1, norm=norm, replays=3, **scale
    )
    loader = [(free.threat.from_pixels(x, x.dtype), y) for x, y in batches((4, 4))]
    replay = iter(free.replay(loader))
    for x, y in itertools.islice(replay, 3):
        free.step(functional.cross_entropy(model(x), y))
    with Operators() as operators:
        for x, y in replay:
            free.step(functional.cross_entropy(model(x), y))
    assert "sign_" in operators.names or norm == "l2"
    assert "convolution_backward" in operators.names
    # Reading a value makes the host wait for a GPU; so does copying a constant from the host.
    assert not {"_local_scalar_dense", "is_nonzero", "lift_fresh"} & set(operators.names)


VIEWS = {"view", "slice", "detach", "alias", "select", "unsqueeze", "expand", "_unsafe_view"}


class Passes(Operators):
    """Counts the kernels, and how often one of them reads or writes a tensor of that many elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.passes = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            self.names.append(func.overloadpacket.__name__)
            given = [v for k, v in (kwargs or {}).items() if k != "out"]
            tensors = [t for t in (*args, *given, out) if isinstance(t, torch.Tensor)]
            self.passes += sum(t.numel() == self.size for t in tensors)
        return out


@pytest.mark.parametrize(
    ("norm", "scaled", "kernels", "passes"),
    [("linf", False, 9, 20), ("linf", True, 9, 20), ("l2", False, 20, 23), ("l2", True, 21, 25)],
)
def test_a_replay_makes_few_kernels_and_passes_over_the_input(norm, scaled, kernels, passes):
    scale = {"mean": (0.4, 0.5), "std": (0.2, 0.3)} if scaled else {}
    x, weight = batches((8,))[0][0], torch.ones((), requires_grad=True)
    free = FreeAdversarial(eps=0.1, norm=norm, **scale)
    x = free.threat.from_pixels(x, x.dtype)
    replay = iter(free.replay([(x, torch.arange(8))]))
    (next(replay)[0] * weight).sum().backward()
    with Passes(x.numel()) as ours:
        (next(replay)[0] * weight).sum().backward()
    alone = x.clone().requires_grad_()
    with Passes(x.numel()) as natural:
        (alone * weight).sum().backward()
    assert len(ours.names) - len(natural.names) <= kernels  # the copy of the labels is one
    assert ours.passes - natural.passes <= passes


def test_no_value_of_a_length_that_was_seen_is_read_though_there_are_more_than_are_kept():
    embedding = torch.nn.Embedding(10, 4)
    free = FreeAdversarial(eps=0.1, replays=1, at=embedding)
    loader = [torch.zeros(2, length, dtype=torch.long) for length in range(1, 21)]
    for words in free.replay(loader):
        embedding(words).sum().backward()
    with Operators() as operators:
        for words in free.replay(loader):
            embedding(words).sum().backward()
    assert not {"_local_scalar_dense", "is_nonzero", "lift_fresh"} & set(operators.names)


def test_a_replay_clones_what_stands_beside_the_input_and_not_the_input():
    with Operators() as operators:
        next(iter(FreeAdversarial(eps=0.1, bounds=None).replay(batches((4,)))))
    assert operators.names.count("clone") == 1  # the labels


def test_device_copies_a_batch_once_for_all_its_replays():
    copies = []
    for replays in (1, 6):
        free = FreeAdversarial(eps=0.1, replays=replays, device="meta", bounds=None)
        with Operators() as operators:
            for x, y in free.replay(batches((4, 4, 4))):
                assert x.device.type == y.device.type == "meta"
                x.sum().backward()
        copies.append(operators.names.count("_to_copy"))
    assert copies[0] == copies[1] >= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_no_step_waits_for_it():
    model = network().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    free = FreeAdversarial(optimizer, eps=0.1, device="cuda", mean=0.5, std=0.2)
    images = [(free.threat.from_pixels(x, x.dtype), y) for x, y in batches((4, 4, 4))]
    replay = iter(free.replay([(x.pin_memory(), y.pin_memory()) for x, y in images]))
    for x, y in itertools.islice(replay, 4):  # the first minibatch, whose values are read
        free.step(functional.cross_entropy(model(x), y))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in replay:
            free.step(functional.cross_entropy(model(x), y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replay_adds_delta_its_gradient_and_one_copy_of_the_input():
    clean = torch.rand(3, 7, 11, 13)
    weight = torch.ones((), requires_grad=True)
    free = FreeAdversarial(eps=0.1, replays=3)

    def alive():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and not t.is_nested]
        return {t.untyped_storage().data_ptr() for t in tensors if t.shape == clean.shape}

    before = alive()
    for (x,) in free.replay([(clean,)]):
        (x * weight).sum().backward()
        grad = leaf(free).grad
        delta = next(iter(buffers(free).values()))
        new = alive() - before
        expected = (t.untyped_storage().data_ptr() for t in (delta, grad, x))
        assert new == set(expected)
        del x, grad, delta


@pytest.mark.parametrize("key", [0, ("inputs", 0)])
def test_what_a_replay_leaves_goes_at_once_without_a_garbage_collection(key):
    x, y = batches((4,))[0]
    batch = (x, y) if key == 0 else {"inputs": [x], "y": y}
    free = FreeAdversarial(eps=0.1, replays=4, key=key)
    weight = torch.ones((), requires_grad=True)
    inputs, grads = [], []
    gc.collect()
    gc.disable()
    try:
        for moved in free.replay([batch]):
            assert [ref() for ref in inputs + grads] == [None] * 2 * len(inputs)
            moved = moved[0] if key == 0 else moved["inputs"][0]
            loss = (moved * weight).sum()
            loss.backward()
            inputs.append(weakref.ref(moved))
            grads.append(weakref.ref(leaf(free).grad))
            del moved  # the loop keeps its loss, as loops do
    finally:
        gc.enable()
    assert loss.grad_fn is not None
