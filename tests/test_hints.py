"""What is told once, of a likely mistake that is no error, and what is not."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from free_adv import FreeAdversarial
from tests.helpers import advance, free_for, loss_of
from tests.reference import batches, network


@pytest.fixture(autouse=True)
def told():
    """What was told, each with the way to say that it is meant."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield lambda phrase: sum(phrase in str(w.message) for w in seen)
    assert all("ignore this" in str(w.message) for w in seen)
    assert not any(Path(w.filename).parent.name in ("free_adv", "optim") for w in seen)


def by_hand(model, k, free, loader, skips=()):
    """A loop that steps after every k batches, but for those updates that a scaler has left out."""
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for i, (x, y) in enumerate(free.replay(loader)):
        (loss_of(model, x, y) / k).backward()
        if i % k == k - 1:
            if i // k not in skips:
                sgd.step()
            sgd.zero_grad()


GAPS = "pass FreeAdversarial(..., accumulate="


@pytest.mark.parametrize("k", [2, 3, 4])
def test_accumulation_by_hand_is_told_once_with_its_number(k, told):
    free = FreeAdversarial(eps=0.1, replays=4)
    for _ in range(2):
        by_hand(network(), k, free, batches((4,) * 6))
    assert told(f"{GAPS}{k})") == told(GAPS) == 1


@pytest.mark.parametrize(
    "how",
    [
        {"k": 1},
        {"k": 1, "skips": (0, 1, 2)},  # the scale of a GradScaler comes down from far
        {"k": 1, "skips": (0, 2, 5)},
        {"k": 2, "accumulate": 2},
        {"k": 2, "few": True},  # three updates are no rule
    ],
    ids=str,
)
def test_what_is_no_accumulation_by_hand_is_not_told(how, told):
    arguments = dict(how)
    accumulate, few = arguments.pop("accumulate", 1), arguments.pop("few", False)
    free = FreeAdversarial(eps=0.1, replays=3 if few else 4, accumulate=accumulate)
    by_hand(network(), free=free, loader=batches((4,) * (2 if few else 6)), **arguments)
    assert told("accumulate") == 0


def test_two_optimizers_that_step_in_every_replay_are_not_taken_for_accumulation(told):
    model = network()
    both = [torch.optim.SGD(part.parameters(), 0.1) for part in (model[0], model[3])]
    for x, y in FreeAdversarial(eps=0.1).replay(batches((4,) * 6)):
        loss_of(model, x, y).backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert told("accumulate") == 0


@pytest.mark.parametrize("own", [True, False], ids=["own backward", "step"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [("max_grad_norm", 1.0), ("scaler", torch.amp.GradScaler("cpu", enabled=False))],
)
def test_an_argument_that_only_step_uses_is_told_if_it_is_never_called(argument, value, own, told):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    free = FreeAdversarial(optimizer, eps=0.1, replays=2, **{argument: value})
    for _ in range(2):
        for x, y in free.replay(batches()):
            advance(model, free, x, y, optimizer if own else None)
    assert told(f"{argument}= does nothing here") == (1 if own else 0)


@pytest.mark.parametrize("own", [True, False], ids=["own backward", "step"])
def test_an_optimizer_of_another_model_is_told(own, told):
    for trained, given, times in ((0, 0, 0), (0, 1, 1)):
        models = network(), network()
        optimizer = torch.optim.SGD(models[given].parameters(), 0.1)
        free = FreeAdversarial(optimizer, eps=0.1, replays=2)
        for x, y in free.replay(batches()):
            advance(models[trained], free, x, y, optimizer if own else None)
        assert told("none of the 4 weights of the optimizer has a gradient") == times


def test_an_optimizer_that_makes_its_gradients_itself_is_not_told_of_them(told):
    model = network()
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=1)
    for x, y in FreeAdversarial(lbfgs, eps=0.1, replays=2).replay(batches()):

        def closure(x=x, y=y):
            lbfgs.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        lbfgs.step(closure)
    assert told("none of the") == 0


class Images(Dataset):
    """Single images, as `ImageFolder` gives them."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        return torch.rand(2, 5, 5), i % 4


class Stream(IterableDataset):
    """A dataset that gives batches, as webdataset's do."""

    def __iter__(self):
        return iter(batches())


@pytest.mark.parametrize(
    ("loader", "times"),
    [
        (Images(), 1),
        (TensorDataset(torch.rand(6, 2, 5, 5), torch.arange(6)), 1),
        (torch.utils.data.Subset(Images(), [0, 1]), 1),
        (DataLoader(Images(), 2), 0),
        (Stream(), 0),
        (DataLoader(Stream(), None), 0),
        (batches(), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_dataset_in_place_of_a_loader_is_told(loader, times, told):
    free = FreeAdversarial(eps=0.1, replays=2)
    for _ in range(2):
        for x, _ in free.replay(loader):
            x.sum().backward()
    assert told("DataLoader(dataset, batch_size=128, shuffle=True)") == times


def test_epochs_that_cost_over_a_quarter_more_than_asked_are_told(told):
    free = FreeAdversarial(eps=0.1, replays=8)
    assert [free.epochs(n) for n in (8, 16, 7, 13, 200)] == [1, 2, 1, 2, 25]
    assert told("natural ones do") == 0
    assert free.epochs(2) == 1
    assert told("epochs(2) is 1, and each costs what 8 natural ones do") == 1


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("what", ["the same samples", "others", "the whole, then a piece"])
def test_samples_that_come_again_after_no_grad_are_told(what, copied, told):
    at = nn.Linear(5, 5)
    other = torch.rand(4, 5)
    for (x,) in FreeAdversarial(eps=0.1, replays=3, at=at).replay([(torch.rand(4, 5),)] * 2):
        give = torch.clone if copied else lambda t: t
        with torch.no_grad():
            at(give(other if what == "others" else x))
        pieces = [x[2:], x[:2]] if what == "the whole, then a piece" else [x]
        for piece in pieces:
            at(give(piece)).sum().backward()
    assert told("torch.no_grad() come again") == (0 if what == "others" else 1)


def test_the_turn_of_batches_that_are_ahead_and_of_several_replays_is_told(told):
    free = FreeAdversarial(eps=0.1, replays=2, accumulate=2)
    replay = iter(free.replay(batches((4, 4, 4))))
    for known in (True, True, False):
        ahead = [next(replay) for _ in range(2)]
        assert told("turn is that of the last one") == 0
        assert free.turn in (0, 1)
        assert free.turn in (0, 1)
        assert told("turn is that of the last one") == (not known)
        for x, _ in ahead:
            x.sum().backward()


@pytest.mark.parametrize(("ahead", "times"), [(1, 0), (2, 1)])
def test_that_clean_images_are_those_of_another_batch_that_is_ahead_is_told(ahead, times, told):
    free = FreeAdversarial(eps=0.1, replays=2, accumulate=2)
    replay = iter(free.replay(batches((4,) * 4)))
    for _ in range(8 // ahead):
        for x, y in [next(replay) for _ in range(ahead)]:
            assert free.clean.shape == free.delta.shape == x.shape
            loss_of(network(), x, y).backward()
    assert told("free.clean and free.delta are those of the last one") == times


def test_clean_images_that_are_asked_for_batch_by_batch_are_those_of_the_batch(told):
    free, model = FreeAdversarial(eps=0.1, replays=2, accumulate=2), network()
    losses = []
    for x, y in free.replay(batches((4,) * 4)):
        assert (x - free.clean).abs().max() <= 0.1 + 1e-6
        losses.append(loss_of(model, x, y))
        if free.last:
            sum(losses).backward()
            losses = []
    assert told("free.clean and free.delta are those of the last one") == 0


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_tensor_beside_the_input_is_of_no_concern(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a beta
        graph = torch.eye(6).to_sparse(layout=layout)
    batch = torch.rand(6, 6), graph
    x, beside = next(iter(FreeAdversarial(eps=0.1, accumulate=1).replay([batch])))
    assert x.requires_grad
    assert beside.layout == layout


@pytest.mark.parametrize(("shape", "times"), [((2, 3, 3, 8, 8), 1), ((2, 3, 4, 8, 8), 0)])
def test_channels_that_may_be_the_frames_of_a_video_are_told(shape, times, told):
    free = FreeAdversarial(eps=0.1, mean=[0.5] * 3, std=[0.25] * 3, replays=2, bounds=None)
    for (x,) in free.replay([(torch.rand(shape),)] * 2):
        x.sum().backward()
    assert told("pass tensors of shape (C, 1, 1)") == times


def test_gradients_that_are_off_come_first_among_the_causes():
    free = free_for(network())
    with (
        torch.no_grad(),
        pytest.raises(
            RuntimeError, match=r"Gradients are off here: a validation runs on the loader"
        ),
    ):
        for x, _ in free.replay(batches()):
            x.sum()


def test_an_optimizer_of_something_else_beside_step_is_no_accumulation(told):
    model, other = network(), nn.Linear(2, 2)
    free, beside = free_for(model, replays=8), torch.optim.SGD(other.parameters(), 0.1)
    for i, (x, y) in enumerate(free.replay(batches((4,) * 3))):
        free.step(loss_of(model, x, y))
        if i % 2:
            other(torch.rand(1, 2)).sum().backward()
            beside.step()
    assert told("accumulate=") == 0


def test_more_micro_batches_by_hand_than_accumulate_says_are_told(told):
    free = FreeAdversarial(eps=0.1, replays=4, accumulate=2)
    by_hand(network(), 4, free, batches((4,) * 12))
    assert told(f"{GAPS}4)") == 1


def test_a_loop_that_steps_before_its_first_backward_pass_is_not_told(told):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in FreeAdversarial(optimizer, eps=0.1).replay(batches()):
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
    assert told("none of the") == 0


def test_a_first_minibatch_that_is_skipped_says_nothing_of_step(told):
    model = network()
    free = free_for(model, max_grad_norm=1.0, replays=2)
    for i, (x, y) in enumerate(free.replay(batches())):
        if i == 0:
            free.skip()
            continue
        free.step(loss_of(model, x, y))
    assert told("does nothing here") == 0


def test_samples_of_one_number_are_not_compared(told):
    at = nn.Embedding(9, 3)
    scale = torch.tensor(1.0)
    at.register_forward_pre_hook(lambda module, args: args[-1:])
    for ids in FreeAdversarial(eps=0.1, replays=2, at=at).replay([torch.arange(4)]):
        with torch.no_grad():
            at(torch.tensor([0, 8]))
        at(ids).sum().backward()
        at(scale, ids).sum().backward()
    assert told("come again") == 0


@pytest.mark.parametrize("left", ["zero_grad", "none", "in the objective"])
def test_gradients_that_are_gone_between_two_micro_batches_are_told_once(left, told):
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.1)

    def objective(batch):
        if left == "in the objective":
            sgd.zero_grad()
        return loss_of(model, *batch)

    settings = {"replays": 1, "ascents": 1, "objective": objective, "accumulate": 3}
    free = FreeAdversarial(sgd, eps=0.1, **settings)
    for x, y in free.replay(batches((4,) * 8)):
        if left == "zero_grad":
            sgd.zero_grad()  # as it stood there before
        free.step(loss_of(model, x, y))
    gone = "earlier micro-batches"
    assert told(gone) == (left != "none")
    assert told("leave out optimizer.zero_grad()") == (left != "none")
