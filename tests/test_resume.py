"""A run that stops anywhere goes on bit-equal in new objects, with the loaders and file formats of others."""

import functools
import io
import itertools
import json
import os
import signal
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

from free_adv import FreeAdversarial
from tests.helpers import advance, equal, free_for, joined, on_two_ranks
from tests.reference import batches, network

pytest.importorskip("torchdata")
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import (
    RandomSampler,
    StatefulDistributedSampler,
)

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.02)
EPOCHS, M, SIZE, COUNT = 2, 3, 8, 45  # 45 samples: five batches of 8 and one of 5


# A run, and what is compared.


class Images(Dataset):
    """Images with the numbers of the samples, which tell the order of the data."""

    def __init__(self):
        ((self.x, self.y),) = batches((COUNT,))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i], i


class Augmented(Images):
    """A random number of its process darkens each image."""

    def __getitem__(self, i):
        x, y, i = super().__getitem__(i)
        return x * torch.rand(()), y, i


class Remembering(Augmented):
    """Its random state goes into the loader's state, worker by worker."""

    def state_dict(self):
        return {"random": torch.get_rng_state()}

    def load_state_dict(self, state):
        torch.set_rng_state(state["random"])


def layers(statistics):
    beside = [nn.BatchNorm2d(6), nn.Dropout(0.2)] if statistics else [nn.Identity()]
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), *beside, nn.ReLU(), nn.Flatten(), nn.Linear(150, 4)
    )


class Run:
    """A whole training: its objects, how far it is, and the samples of every replay that was made."""

    def __init__(
        self,
        seed=0,  # a resumed run begins with other weights, order and random numbers
        data=Images,
        workers=0,
        persistent=False,
        half=False,
        own_backward=False,
        inside=False,
        optimizer=SGD,
        accumulate=1,
        epochs=EPOCHS,
        **arguments,
    ):
        torch.manual_seed(seed)
        # A group that was begun is made again, which batch statistics and dropout would notice.
        self.model = layers(statistics=accumulate == 1)
        self.optimizer = optimizer(self.model.parameters())
        self.half, self.own_backward = half, own_backward
        # The first updates overflow, and later ones again.
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**26, growth_interval=4, enabled=half
        )
        if inside:
            arguments["at"] = self.model[0]
        self.free = FreeAdversarial(
            None if own_backward else self.optimizer,
            eps=0.1,
            replays=M,
            accumulate=accumulate,
            scaler=None if own_backward else self.scaler,
            **arguments,
        )
        # The order has a generator of its own: neither that of the loader nor that of all the rest.
        data = data()
        self.order = RandomSampler(data)
        self.loader = self.free.replay(
            StatefulDataLoader(
                data,
                SIZE,
                sampler=self.order,
                num_workers=workers,
                persistent_workers=persistent,
                generator=torch.Generator(),
            )
        )
        self.epoch, self.epochs = 0, epochs
        self.seen, self.inputs, self.made = [], [], 0

    def train(self):
        """Go on to the end, with a halt wherever the run may be stopped."""
        while self.epoch < self.epochs:
            for x, y, numbers in self.loader:
                yield "before the forward pass"
                with torch.autocast("cpu", torch.float16, enabled=self.half):
                    loss = functional.cross_entropy(self.model(x), y)
                self.step(loss)
                self.seen.append(numbers.tolist())
                self.inputs.append(self.free.clean)
                if self.free.last:
                    self.made = len(self.seen)
                yield "after the step"
            self.epoch += 1
            yield "between epochs"

    def step(self, loss):
        if not self.own_backward:
            return self.free.step(loss)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        return self.scaler.update()

    def parts(self):
        names = ("model", "optimizer", "scaler", "free", "loader")
        return {name: getattr(self, name) for name in names}

    def state(self):
        states = {name: part.state_dict() for name, part in self.parts().items()}
        return {**states, "epoch": self.epoch, "random": torch.get_rng_state()}

    def load(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.epoch = state["epoch"]
        torch.set_rng_state(state["random"])

    def outcome(self):
        """What two runs must agree on in the end; the order is that of the epochs to come."""
        state = {**self.state(), "order": self.order.generator.get_state()}
        del state["loader"]  # how it counts is its own business
        return state


class Stop(NamedTuple):
    """A place where a run may be stopped, and the file that it leaves there."""

    when: str
    made: int  # the replays, whole groups with `accumulate`, that are not made again
    file: bytes


def pack(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def unpack(file):
    return torch.load(io.BytesIO(file), weights_only=True)


def differences(one, other, path=""):
    """Where two states are not bit-equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if type(one) is type(other) and one == other else [path]


RUNS = {
    "BatchNorm and dropout": {},
    "float16": {"half": True, "optimizer": ADAMW},
    "float16, own backward": {"half": True, "own_backward": True},
    "accumulated": {"half": True, "accumulate": 2},
    "uniform": {"start": "uniform"},
    "inside": {"inside": True, "norm": "l2"},
    "inside, uniform": {"inside": True, "start": "uniform"},
    "augmented": {"data": Augmented},
    "workers": {"half": True, "workers": 2},
    "workers, accumulated": {"workers": 2, "accumulate": 2},
    # Only a third epoch would tell that the workers of a second one had begun with another seed.
    "workers, augmented": {"workers": 2, "persistent": True, "data": Remembering, "epochs": 3},
}


@functools.cache
def whole(name):
    """A run that nobody looks at: the order of its data, and its end."""
    run = Run(**RUNS[name])
    for _ in run.train():
        pass
    return run.seen, run.outcome()


@functools.cache
def stops(name):
    """Every place where that run may be stopped."""
    run, found = Run(**RUNS[name]), []
    for when in run.train():
        found.append(Stop(when, run.made, pack(run.state())))
    assert differences([run.seen, run.outcome()], whole(name)) == []  # saving disturbs nothing
    return found


def resumed(name, state):
    run = Run(seed=1, **RUNS[name])
    run.load(state)
    for _ in run.train():
        pass
    return run


def wrong(name, stop, change=lambda state: state):
    """What is not bit-equal after the run was resumed at that stop."""
    run = resumed(name, change(unpack(stop.file)))
    seen, outcome = whole(name)
    return differences([run.seen, run.outcome()], [seen[stop.made :], outcome])


# The stateful loader of torchdata.


EVERYWHERE = [pytest.param(n, marks=() if n == "float16" else pytest.mark.slow) for n in RUNS]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_run_goes_on_bit_equal_from_every_place_where_it_may_stop(name):
    places = stops(name)
    epochs = RUNS[name].get("epochs", EPOCHS)
    assert len(places) == epochs * (2 * M * -(-COUNT // SIZE) + 1)
    found = {(i, stop.when): wrong(name, stop) for i, stop in enumerate(places)}
    assert {place: where for place, where in found.items() if where} == {}


# In mid-minibatch, before a first replay, in the other epoch, between the epochs.
FEW = (7, 12, 44, 36)


KINDS = [name for name in RUNS if name != "float16"]
LONG = "workers, augmented", "workers, accumulated"


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=pytest.mark.slow if k in LONG else ()) for k in KINDS]
)
def test_a_run_of_any_kind_goes_on_bit_equal_from_a_few_places(name):
    found = {i: wrong(name, stops(name)[i]) for i in FEW}
    assert {place: where for place, where in found.items() if where} == {}


@pytest.mark.parametrize(
    ("name", "number"), [("float16", 9), ("float16", 36), ("accumulated", 45), ("workers", 10)]
)
def test_a_run_that_really_stops_goes_on_bit_equal_from_its_file(name, number, tmp_path):
    run = Run(**RUNS[name])
    training = run.train()
    for _ in range(number + 1):
        next(training)
    torch.save(run.state(), tmp_path / "run.pt")
    made = run.made
    del run, training
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    seen, outcome = whole(name)
    run = resumed(name, state)
    assert differences([run.seen, run.outcome()], [seen[made:], outcome]) == []


def killed(name, number, file):
    torch.set_num_threads(1)
    run = Run(**RUNS[name])
    training = run.train()
    for _ in range(number + 1):
        next(training)
    torch.save(run.state(), file)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 21, 36, 50])
def test_a_process_that_was_killed_goes_on_bit_equal_in_another(number, tmp_path):
    file = tmp_path / "run.pt"
    process = torch.multiprocessing.get_context("spawn").Process(
        target=killed, args=("float16", number, file)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    stop = stops("float16")[number]
    assert wrong("float16", stop._replace(file=file.read_bytes())) == []


def test_the_scale_of_those_runs_falls_and_rises():
    scales = [unpack(stop.file)["scaler"]["scale"] for stop in stops("float16")]
    steps = [(a, b) for a, b in itertools.pairwise(scales) if a != b]
    assert sum(a > b for a, b in steps) >= 2
    assert sum(a < b for a, b in steps) >= 2


def test_those_comparisons_see_each_part_of_a_state():
    stop = stops("float16")[21]

    def assert_seen(part, broken):
        assert wrong("float16", stop, lambda state: {**state, part: broken(state[part])}), part

    fresh = Run(seed=1, **RUNS["float16"])
    assert_seen("random", lambda state: fresh.state()["random"])
    assert_seen("loader", lambda state: {})
    assert_seen("free", lambda state: {**state, "delta": [-d for d in state["delta"]]})
    assert_seen("free", lambda state: {**state, "done": state["done"] - 1})
    assert_seen("free", lambda state: {**state, "minibatches": None, "done": 0})
    assert_seen("scaler", lambda state: {**state, "scale": state["scale"] / 2})
    assert_seen("scaler", lambda state: {**state, "_growth_tracker": state["_growth_tracker"] + 1})
    assert_seen("optimizer", lambda state: {**state, "state": {}})
    for name in ("1.running_mean", "0.bias"):
        assert_seen("model", lambda state, name=name: {**state, name: 1.001 * state[name] + 1e-3})


def test_the_minibatch_in_flight_keeps_its_augmentation_though_a_worker_forgets_its_random_state():
    run = Run(data=Augmented, workers=2)
    for when in run.train():
        if when == "after the step" and run.made == M + 1:
            state = pack(run.state())
    again = Run(seed=1, data=Augmented, workers=2)
    again.load(unpack(state))
    for _ in again.train():
        pass
    assert again.seen == run.seen[M + 1 :]
    same = [torch.equal(a, b) for a, b in zip(again.inputs, run.inputs[M + 1 :], strict=True)]
    assert same[: M - 1] == [True] * (M - 1)
    assert not all(same)  # later minibatches are drawn anew: other ones, as good


# The loader of torch itself.


@pytest.mark.parametrize("own_backward", [False, True])
def test_an_epoch_that_is_left_and_skipped_goes_on_bit_equal_from_behind_the_loop(own_backward):
    def begin():
        model = network()
        free = free_for(model, replays=M)
        return model, free

    def train(model, free, epochs):
        optimizer = torch.optim.SGD(model.parameters(), 0.1) if own_backward else None
        for _ in range(epochs):
            for number, (x, y) in enumerate(free.replay(batches((4, 4, 4)))):
                if number == M + 1:
                    break
                advance(model, free, x, y, optimizer)
            free.skip()

    whole, first, second = begin(), begin(), begin()
    train(*whole, 2)
    train(*first, 1)
    for one, other in zip(second, first, strict=True):
        one.load_state_dict(other.state_dict())
    train(*second, 1)
    assert equal(second[0].state_dict(), whole[0].state_dict())
    assert torch.equal(joined(second[1]), joined(whole[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_goes_on_bit_equal_from_the_end_of_an_epoch(workers):
    epochs = 3

    def begin(seed=0):
        torch.manual_seed(seed)
        model = layers(statistics=True)
        optimizer = SGD(model.parameters())
        free = FreeAdversarial(optimizer, eps=0.1, replays=M)
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            Augmented(), SIZE, shuffle=True, generator=generator, num_workers=workers
        )
        return (model, optimizer, free), loader

    def state(objects, loader):
        random_states = [loader.generator.get_state(), torch.get_rng_state()]
        return [[o.state_dict() for o in objects], random_states]

    def train(objects, loader, first=0):
        model, _, free = objects
        seen, files = [], []
        for _ in range(first, epochs):
            for x, y, numbers in free.replay(loader):
                free.step(functional.cross_entropy(model(x), y))
                seen.append(numbers.tolist())
            files.append((len(seen), pack(state(objects, loader))))
        return seen, files

    seen, files = train(*begin())
    for epoch, (made, file) in enumerate(files[:-1], 1):
        objects, loader = begin(seed=1)
        states, (order, everything) = unpack(file)
        for o, s in zip(objects, states, strict=True):
            o.load_state_dict(s)
        loader.generator.set_state(order)
        torch.set_rng_state(everything)
        rest, later = train(objects, loader, epoch)
        assert rest == seen[made:]
        assert differences(unpack(later[-1][1]), unpack(files[-1][1])) == []


# Files of safetensors.


def save_safetensors(state, file):
    """The tensors of a state as they are, and all the rest as JSON beside them."""
    from safetensors.torch import save_file

    tensors = {}

    def name(tensor):  # json asks what to write for what it does not know
        tensors[key := str(len(tensors))] = tensor.contiguous()
        return {"tensor": key}

    rest = json.dumps(state, default=name)
    save_file(tensors, file, metadata={"state": rest})


def load_safetensors(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return json.loads(
            f.metadata()["state"],
            object_hook=lambda d: f.get_tensor(d["tensor"]) if d.keys() == {"tensor"} else d,
        )


@pytest.mark.parametrize("name", ["float16", "accumulated"])
def test_a_state_goes_through_a_file_of_safetensors_and_the_run_on_bit_equal(name, tmp_path):
    pytest.importorskip("safetensors")

    def through(state):
        save_safetensors(state["free"], tmp_path / "free.safetensors")
        loaded = load_safetensors(tmp_path / "free.safetensors")
        assert differences(loaded, state["free"]) == []
        return {**state, "free": loaded}

    for stop in stops(name)[1::8]:
        assert wrong(name, stop, through) == []


def test_what_json_does_not_know_is_refused_by_the_safetensors_recipe(tmp_path):
    pytest.importorskip("safetensors")
    free = FreeAdversarial(eps=0.1, replays=2)
    next(iter(free.replay([(torch.rand(4, 3), [b"a name"])])))
    with pytest.raises(AttributeError, match="'bytes' object has no attribute 'contiguous'"):
        save_safetensors(free.state_dict(), tmp_path / "free.safetensors")
    assert not list(tmp_path.iterdir())


# Distributed checkpoints.


class OnARank:
    """A run with DDP, each rank with its share of the data."""

    def __init__(self, seed=0):
        model = network()
        with torch.no_grad():
            model[0].bias += seed
        self.model = DDP(model)
        self.optimizer = ADAMW(self.model.parameters())
        self.free = FreeAdversarial(self.optimizer, eps=0.1, replays=M)
        self.order = StatefulDistributedSampler(Images())  # six batches on either rank
        self.loader = self.free.replay(StatefulDataLoader(Images(), 4, sampler=self.order))
        self.epoch, self.seen = 0, []

    def train(self):
        while self.epoch < EPOCHS:
            self.order.set_epoch(self.epoch)
            for x, y, numbers in self.loader:
                self.free.step(functional.cross_entropy(self.model(x), y))
                self.seen.append(numbers.tolist())
                yield
            self.epoch += 1

    def shared(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "epoch": self.epoch}

    def save(self, folder):
        rank = distributed.get_rank()
        own = pack({"free": self.free.state_dict(), "loader": self.loader.state_dict()})
        dcp.save({**self.shared(), f"rank.{rank}": own}, checkpoint_id=folder)

    def load(self, folder):
        rank = distributed.get_rank()
        state = {**self.shared(), f"rank.{rank}": b""}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        own = unpack(state[f"rank.{rank}"])
        self.free.load_state_dict(own["free"])
        self.loader.load_state_dict(own["loader"])
        self.epoch = state["epoch"]

    def outcome(self):
        return [o.state_dict() for o in (self.model, self.optimizer, self.free)]


STOPS = {"in mid-minibatch": 5, "at the end of a minibatch of the second epoch": 24}


def stopped_on_a_rank(folder, after):
    run = OnARank()
    for _ in itertools.islice(run.train(), after):
        pass
    run.save(folder)
    run = OnARank(seed=1)
    run.load(folder)
    for _ in run.train():
        pass
    return run.seen, run.outcome()


def with_one_key_for_all_ranks(folder):
    """What loads, or the error, where each rank saves its state under the same key."""
    run = OnARank()
    for _ in itertools.islice(run.train(), 5):
        pass
    mine = run.free.state_dict()
    dcp.save({"free": mine}, checkpoint_id=folder)
    results = {"mine": mine}
    for name, template in {
        "new": OnARank().free.state_dict(),
        "same": run.free.state_dict(),
    }.items():
        state = {"free": template}
        try:
            dcp.load(state, checkpoint_id=folder)
        except dcp.api.CheckpointException as error:
            results[name] = str(error)
            continue
        free = OnARank().free
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            free.load_state_dict(state["free"])
        results[name] = [str(w.message) for w in caught]
        results["loaded"] = state["free"]
    return results


def on_a_rank(rank, folder):
    run = OnARank()
    for _ in run.train():
        pass
    results = {"whole": (run.seen, run.outcome())}
    for name, after in STOPS.items():
        results[name] = stopped_on_a_rank(folder / name, after)
    results["one key"] = with_one_key_for_all_ranks(folder / "one key")
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What all of it gave on either rank, from one launch."""
    return on_two_ranks(on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", STOPS)
def test_two_ranks_go_on_bit_equal_from_a_distributed_checkpoint(name, ranks):
    deltas = []
    for results in ranks:
        (seen, outcome), (rest, end) = results["whole"], results[name]
        assert rest == seen[STOPS[name] :]
        assert differences(end, outcome) == []
        deltas.append(end[2]["delta"])
    assert differences(*deltas)  # each rank has its own


def test_a_distributed_checkpoint_with_one_key_for_all_ranks_is_refused_by_a_new_run(ranks):
    for results in ranks:
        assert "Missing key in checkpoint state_dict: free.delta" in results["one key"]["new"]


def test_a_distributed_checkpoint_with_one_key_for_all_ranks_loads_elsewhere_with_a_warning(ranks):
    one, other = (results["one key"] for results in ranks)
    assert differences(one["mine"]["delta"], other["mine"]["delta"])
    assert differences(one["loaded"], other["loaded"]) == []  # one and the same for both
    # Of the rank that the entry `rank` comes from the warning cannot know whether the rest is its own.
    (text,) = one["same"] + other["same"]
    assert "the state is that of rank" in text
    assert "save the state of each rank in a file of its own" in text


# Accelerate.


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(True)  # it is one for the whole process


def accelerated(accelerate, workers, seed=0):
    accelerate.state.AcceleratorState._reset_state(True)
    torch.manual_seed(seed)
    config = accelerate.utils.DataLoaderConfiguration(use_stateful_dataloader=True)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=config)
    loader = StatefulDataLoader(
        Images(),
        SIZE,
        sampler=RandomSampler(Images()),
        generator=torch.Generator(),
        num_workers=workers,
    )
    model = layers(statistics=True)
    optimizer = SGD(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    free = FreeAdversarial(eps=0.1, replays=M)
    accelerator.register_for_checkpointing(free)
    return accelerator, model, optimizer, free, free.replay(loader)


def train_accelerated(objects, first=0, rest=False, after_step=lambda *_: None):
    accelerator, model, optimizer, free, loader = objects
    seen = []
    # Accelerate reads one batch ahead: at the last minibatch its loader says that the epoch is over.
    sources = [free.replay([])] if rest else []
    for epoch, source in enumerate(sources + [loader] * (EPOCHS - first), first):
        for x, y, numbers in source:
            accelerator.backward(functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            seen.append(numbers.tolist())
            after_step(epoch, len(seen))
    optimizers = optimizer.state_dict()
    return seen, [model.state_dict(), optimizers, free.state_dict(), torch.get_rng_state()]


@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate_goes_on_bit_equal_from_a_state_saved_in_mid_epoch(
    workers, accelerate, tmp_path
):
    places = []

    def save(epoch, made):
        if made % length in (5, length - M, length - 1, 0):
            folder = tmp_path / str(len(places))
            objects[0].save_state(folder)
            places.append((folder, epoch, made))

    length = M * -(-COUNT // SIZE)
    objects = accelerated(accelerate, workers)
    seen, outcome = train_accelerated(objects, after_step=save)
    for folder, epoch, made in places:
        objects = accelerated(accelerate, workers, seed=1)
        objects[0].load_state(folder)
        last = made - epoch * length > length - M
        again = train_accelerated(objects, epoch + last, rest=last)
        assert differences(again, (seen[made:], outcome)) == [], made
