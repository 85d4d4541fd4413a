"""A saved state goes on exactly where it was taken."""

import collections
import copy
import dataclasses
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.helpers import equal, told_of
from tests.reference import batches, network


def make(replays=3, accumulate=1, **arguments):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    free = FreeAdversarial(
        optimizer, **{"eps": 0.1, "replays": replays, "accumulate": accumulate, **arguments}
    )
    return model, optimizer, free


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("between", [False, True], ids=["after step", "between yield and step"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_run_stopped_at_any_replay_goes_on_bit_equal(stop, accumulate, between):
    loader = batches((6, 6, 4))

    def run(model, optimizer, free, source, stop=None):
        for i, (x, y) in enumerate(free.replay(source)):
            if between and i == stop:
                break
            free.step(functional.cross_entropy(model(x), y))
            if not between and i + 1 == stop:
                break

    model, optimizer, free = make(accumulate=accumulate)
    run(model, optimizer, free, loader)
    expected, delta = (
        [p.detach().clone() for p in model.parameters()],
        free.state_dict()["delta"][0],
    )

    model, optimizer, free = make(accumulate=accumulate)
    source = iter(loader)
    run(model, optimizer, free, source, stop)
    if stop % accumulate and not between:
        # In mid-group the gradients of the weights are not in any state: the replay is made again.
        assert free.state_dict()["done"] == (stop // 2 if stop < 6 else stop - 6)
    states = [through_a_file(o.state_dict()) for o in (model, optimizer, free)]
    for new, state in zip(fresh := make(accumulate=accumulate), states, strict=True):
        new.load_state_dict(state)
    run(*fresh, source)
    assert all(torch.equal(a, b) for a, b in zip(fresh[0].parameters(), expected, strict=True))
    assert torch.equal(fresh[2].state_dict()["delta"][0], delta)


def test_saving_does_not_disturb_the_run():
    one, two = make(), make()
    for x, y in one[2].replay(batches()):
        one[2].step(functional.cross_entropy(one[0](x), y))
    for x, y in two[2].replay(batches()):
        two[2].state_dict()
        two[2].step(functional.cross_entropy(two[0](x), y))
        two[2].state_dict()
    assert torch.equal(one[2].delta, two[2].delta)


def test_a_state_is_a_copy_when_it_is_taken_and_when_it_is_loaded():
    model, _, free = make()
    loader = batches()
    kept = [x.clone() for x, _ in loader]
    replay = iter(free.replay(loader))
    x, y = next(replay)
    state = free.state_dict()
    before = state["delta"][0].clone()
    free.step(functional.cross_entropy(model(x), y))
    assert torch.equal(state["delta"][0], before)
    loader[0][0].zero_()  # a loader that uses its memory again
    assert torch.equal(state["minibatches"][0][0][0], kept[0])
    free.load_state_dict(state)
    state["minibatches"][0][0][0].zero_()
    state["delta"][0].fill_(1)
    x, _ = next(iter(free.replay(loader)))
    assert torch.equal(x.detach(), kept[0])


def test_a_state_holds_a_view_of_the_data_and_not_all_of_the_data():
    _, _, free = make()
    data = torch.rand(100, 2, 5, 5)
    next(iter(free.replay([(x, torch.zeros(4)) for x in data.split(4)])))
    (x, _) = free.state_dict()["minibatches"][0][0]
    assert x.untyped_storage().nbytes() == 4 * 4 * 2 * 5 * 5


def test_a_state_of_another_rank_loads_with_a_warning():
    _, _, free = make()
    state = {**free.state_dict(), "rank": [1, 2]}
    with pytest.warns(UserWarning, match="that of rank 1 of 2, but this is rank 0 of 1") as warned:
        free.load_state_dict(state)
    assert warned[0].filename == __file__


def test_a_loader_that_cannot_begin_costs_no_minibatch_of_a_state():
    class Broken:
        def __iter__(self):
            raise OSError("disk")

    model, _, free = make()
    for x, y in itertools.islice(free.replay(batches()), 2):
        free.step(functional.cross_entropy(model(x), y))
    new = make()[2]
    new.load_state_dict(free.state_dict())
    with pytest.raises(OSError, match="disk"):
        next(iter(new.replay(Broken())))
    assert sum(x.sum().backward() is None for x, _ in new.replay([])) == 1


def test_a_resumed_minibatch_is_moved_to_the_device():
    free = FreeAdversarial(eps=0.1, replays=2)
    next(iter(free.replay([(torch.rand(4, 2, 5, 5), torch.arange(4))])))
    moved = FreeAdversarial(eps=0.1, replays=2, device="meta")  # a second device of every machine
    moved.load_state_dict(free.state_dict())
    x, y = next(iter(moved.replay([])))
    assert x.device.type == y.device.type == "meta"


def used():
    """An object with delta and a minibatch in flight, and its state."""
    model, _, free = make(accumulate=2)
    for x, y in itertools.islice(free.replay(batches()), 3):
        free.step(functional.cross_entropy(model(x), y))
    return free, free.state_dict()


X = torch.full((8, 2, 5, 5), 0.05)
REFUSED = {  # what replaces the entry at a path of the state, and the phrase of the refusal
    "no dict": ((), [1], "state must be a dict, got list"),
    "an entry too many": (("more",), 1, "unknown entries"),
    "a version that is no number": (("version",), "1", "version '1', but this release reads"),
    "a version of yes": (("version",), True, "version True"),
    "settings that are none": (("settings",), [1], r"\['settings'\] must be a dict, got \[1\]"),
    "a setting that is a tensor": (
        ("settings", "eps"),
        torch.ones(2),
        "eps must be a number",
    ),
    "a setting that is lacking": (("settings",), {"eps": 0.1}, "norm=None, but this object has"),
    "bounds of another length": (("settings", "bounds"), [0.0], r"bounds=\[0.0\], but this object"),
    "a rank that is none": (("rank",), [0, "1"], r"\['rank'\] must be \[rank, number of ranks\]"),
    "a delta that is one tensor": (("delta",), X, "must be a list of tensors, got tensor"),
    "a delta of numbers": (("delta",), [1.0, X], "must be a list of tensors, got .1.0"),
    "a delta of integers": (("delta", 0), X.long(), "must hold float32 or float64 .* torch.int64"),
    "a delta of halves": (("delta", 0), X.half(), "must hold float32 or float64 .* torch.float16"),
    "a delta of complex numbers": (("delta", 0), X + 0j, "must hold float32 .* torch.complex64"),
    "a sparse delta": (("delta", 0), X.to_sparse(), "torch.sparse_coo"),
    "a delta without values": (("delta", 0), X.to("meta"), "on meta"),
    "a delta without rows": (("delta", 0), torch.tensor(0.0), r"of shape \(rows, ...\), got"),
    "a delta out of the ball": (("delta", 0), 3 * X, "leaves the ball of radius eps=0.1"),
    "a delta of NaN": (("delta", 0), X * torch.nan, "leaves the ball"),
    "a delta of infinity": (("delta", 0), X / 0, "leaves the ball"),
    "places that are no numbers": (("places",), ["x"], "must be a place for each delta"),
    "a delta without a place": (("places",), [], "must be a place for each delta"),
    "two deltas of one shape": (
        (),
        {**used()[1], "delta": [X * 0, X * 0], "places": [(0, 0, 0)] * 2, "begun": [0, 0]},
        "several tensors for one shape and place",
    ),
    "a delta of another shape": (
        ("delta",),
        [torch.zeros(8, 7)] * 2,
        r"state has delta of shape \(8, 7\), but this object has shape \(8, 2, 5, 5\)",
    ),
    "a delta too short": (
        ("delta", 0),
        X[:3],
        r"\(8, 2, 5, 5\) .* delta has shapes \[\(3, 2, 5, 5\), \(8, 2, 5, 5\)\]",
    ),
    "no batches": (("minibatches",), [], "must be a number of updates made"),
    "batches that are no list": (("minibatches",), {"x": X}, "must be a list of minibatches"),
    "more batches than accumulate": (("minibatches",), [[(X, X)] * 3], "up to 3 .* accumulate=2"),
    "a batch without an input": (("minibatches",), [[{"x": 1}]], "no key=0"),
    "a batch of text": (("minibatches",), [["text"]], "no key=0"),
    "an input that is a number": (("minibatches", 0, 0), (1.0, X), "must be a tensor, got float"),
    "an input without values": (
        ("minibatches", 0, 0),
        (X.to("meta"), X),
        "without values: .* on meta",
    ),
    "an input of integers": (("minibatches", 0, 0), (X.long(), X), "must be floating point"),
    "an input of another shape": (("minibatches", 0, 0), (X[:, :1], X), "but its delta has shapes"),
    "an input of NaN in a new shape": (("minibatches", 0, 0), (X[0] * torch.nan, X), "not finite"),
    "a number of replays below 0": (("done",), -1, r"\['done'\] must be a number of updates made"),
    "a number of replays above m": (("done",), 4, "must be a number of updates made, got 4"),
    "half a replay": (("done",), 0.5, "must be a number of updates made, got 0.5"),
    "replays of no minibatch": (("minibatches",), None, "must be a number of updates made, got 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_state_is_refused_and_the_object_left_as_it_was(name):
    (free, state), (path, value, phrase) = used(), REFUSED[name]
    before = free.state_dict()
    broken = through_a_file(state)
    node = broken
    for key in path[:-1]:
        node = node[key]
    if path:
        node[path[-1]] = value
    with pytest.raises((ValueError, TypeError), match=phrase):
        free.load_state_dict(broken if path else value)
    assert equal(free.state_dict(), before)
    free.load_state_dict(state)


def test_a_state_that_contains_itself_is_refused():
    free, state = used()
    loop = [X, X]
    loop.append(loop)
    with pytest.raises(ValueError, match="state cannot be read: maximum recursion depth exceeded"):
        free.load_state_dict({**state, "minibatches": [[loop]]})


def spots(value, path=()):
    """The paths of everything in a state."""
    yield path
    if isinstance(value, dict | list | tuple):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from spots(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    twin = dict(value) if isinstance(value, dict) else list(value)
    twin[path[0]] = replaced(value[path[0]], path[1:], new)
    return twin if isinstance(value, dict) else type(value)(twin)


FREE, STATE = used()
JUNK = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    0.05,
    float("nan"),
    "",
    "text",
    b"\0",
    [],
    {},
    (),
    [[]],
    {1: 2},
]
JUNK += [X, X[:0], X * torch.nan, X.long(), X.to_sparse(), X.to("meta"), torch.tensor(1.0), [X, X]]


@pytest.mark.filterwarnings("ignore:the state is that of rank")
@given(path=st.sampled_from(list(spots(STATE))), junk=st.sampled_from(JUNK))
def test_junk_anywhere_in_a_state_is_refused_or_harmless(path, junk):
    before = FREE.state_dict()
    try:
        FREE.load_state_dict(replaced(STATE, path, junk))
    except (ValueError, TypeError):
        assert equal(FREE.state_dict(), before)
    state = FREE.state_dict()
    assert all(delta.abs().max() <= 0.1 + 1e-6 for delta in state["delta"])
    FREE.load_state_dict(STATE)


@dataclasses.dataclass
class Labelled:
    image: torch.Tensor
    label: torch.Tensor


Named = collections.namedtuple("Named", "image label")


@pytest.mark.parametrize("kind", [Labelled, Named])
def test_a_batch_of_a_class_goes_through_a_file_once_torch_is_told_of_it(kind):
    free = FreeAdversarial(eps=0.1, replays=2, key="image")
    next(iter(free.replay([kind(torch.rand(4, 3), torch.arange(4))])))
    with pytest.raises(pickle.UnpicklingError, match="add_safe_globals"):
        through_a_file(free.state_dict())
    with told_of(kind):
        state = through_a_file(free.state_dict())
    free.load_state_dict(state)
    assert type(next(iter(free.replay([])))) is kind


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"norm": "l2"}, "norm='linf', but this object has norm='l2'"),
        ({"replays": 4}, "replays=3, but this object has replays=4"),
        ({"mean": 0.5, "std": 0.5}, r"mean=None, but this object has mean=\(0.5,\)"),
    ],
)
def test_a_state_made_with_other_settings_is_refused(change, phrase):
    state = make()[2].state_dict()
    with pytest.raises(ValueError, match=phrase):
        make(**change)[2].load_state_dict(state)


def test_a_state_that_is_none_is_refused_and_nothing_is_changed():
    model, _, free = make()
    for x, y in free.replay(batches()):
        free.step(functional.cross_entropy(model(x), y))
    before = free.state_dict()
    with pytest.raises(ValueError, match=r"state lacks .*'delta'"):
        free.load_state_dict({})
    with pytest.raises(ValueError, match="version 2, but this release reads version 3; load it"):
        free.load_state_dict({**before, "version": 2})
    with pytest.raises(ValueError, match="no key=0"):
        free.load_state_dict(
            {
                **before,
                "delta": [],
                "places": [],
                "begun": [],
                "noise": [],
                "minibatches": [[{"x": 1}]],
            }
        )
    assert torch.equal(free.state_dict()["delta"][0], before["delta"][0])


def test_loading_ends_the_loop_that_runs_and_forgets_its_latest_batch():
    _, _, free = make()
    state = free.state_dict()
    replay = iter(free.replay(batches()))
    next(replay)
    free.load_state_dict(state)
    assert free.delta is free.clean is None
    with pytest.raises(RuntimeError, match="replaced by a newer one"):
        next(replay)


def test_the_minibatch_of_a_state_is_replayed_by_the_first_loop_alone():
    model, _, free = make()
    replay = iter(free.replay(batches()))
    x, y = next(replay)
    free.step(functional.cross_entropy(model(x), y))
    free.load_state_dict(free.state_dict())
    for expected in (2 + 9, 9):
        replay = free.replay(batches())
        for x, y in replay:  # a first look at it, and away
            free.step(functional.cross_entropy(model(x), y))
            break
        state = free.state_dict()
        assert state["done"] == (2 if expected == 11 else 1)


def test_a_state_of_a_wider_window_leaves_no_delta_that_cannot_be_used():
    wide = FreeAdversarial(eps=0.1, replays=2, window=4, accumulate=2)
    for x, _ in wide.replay(batches((4,) * 8)):
        x.sum().backward()
    assert len(wide.state_dict()["delta"]) == 8
    narrow = FreeAdversarial(eps=0.1, replays=2)
    narrow.load_state_dict(wide.state_dict())
    assert narrow.state_dict()["places"] == [(0, 0, "[0]")]


@pytest.mark.parametrize("stop", range(1, 8))
def test_what_has_begun_is_kept_with_its_own_delta_whatever_the_order_of_use(stop):
    """A minibatch of two shapes, of which the second was last in use before; each begins at random, once."""
    loader = [(torch.rand(2, 3), torch.rand(2, 4)), (torch.rand(2, 4), torch.rand(2, 3))] * 2

    def run(free, source, stop=None):
        seen = []
        for i, (one, two) in enumerate(free.replay(source)):
            seen += [one.detach(), two.detach()]
            (one.sum() + two.sum()).backward()
            if i + 1 == stop:
                break
        return seen

    def make():
        return FreeAdversarial(eps=0.1, replays=2, start="uniform", key=[0, 1], accumulate=2)

    torch.manual_seed(0)
    whole = run(make(), loader)
    torch.manual_seed(0)
    source, free = iter(loader), make()
    seen = run(free, source, stop)[: 4 * (stop // 2)]  # a group that is not through comes again
    other, state = make(), free.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    seen += run(other, source)
    assert equal(seen, whole)
