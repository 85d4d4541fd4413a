"""Processes that are killed, workers that die, memory that runs out, Ctrl-C: real ones, and nothing is lost."""

import concurrent.futures
import contextlib
import copy
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from free_adv import FreeAdversarial
from free_adv.minibatch import Minibatch
from free_adv.optimizers import Optimizers
from free_adv.replay import _Source
from free_adv.slot import Slot
from tests.reference import batches, network

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", 200))  # of the long form


def loss_of(model, x, y):
    return functional.cross_entropy(model(x), y)


def same(one, other):
    """Whether nested states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# A training process that is killed at random.


class Job:
    """tests/training_job.py in a process of its own."""

    def __init__(self, out, *options):
        command = [sys.executable, ROOT / "tests" / "training_job.py", "--out", out, *options]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def wait_for(self, line):
        for found in self.process.stdout:
            if found.strip() == line:
                return
        raise AssertionError(f"no {line!r}: {self.end()[1]}")

    def kill(self, after):
        """Kill it and the workers of its loader, unless it ends before; whether it was killed."""
        try:
            self.process.wait(after)
        except subprocess.TimeoutExpired:
            workers = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        code, errors = self.end()
        assert code in (0, -signal.SIGKILL), errors
        return code != 0

    def end(self):
        code = self.process.wait()
        self.process.stdout.close()
        self.errors.seek(0)
        errors = self.errors.read()
        self.errors.close()
        return code, errors


def final(folder):
    state = torch.load(folder / "last.pt", weights_only=True)
    state["loader"] = None  # it has counters of its own that tell nothing of the data
    return state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The state at the end of a job that nothing has stopped, and the seconds between its first line and its last."""
    out = tmp_path_factory.mktemp("undisturbed")
    job = Job(out)
    job.wait_for("begins")
    start = time.monotonic()
    assert job.kill(after=100) is False
    return final(out), time.monotonic() - start


def killed_at_random(out, undisturbed, draw, kills):
    """A job that is killed so many times while it trains and then let run; what it ended with, and figures.

    Where it ends before, another one begins.
    """
    expected, seconds = undisturbed
    counts = {"kills": 0, "before the first checkpoint": 0, "while writing": 0, "runs": 0}
    while counts["kills"] < kills:
        folder = out / str(counts["runs"])
        left = True
        while left:
            job = Job(folder)
            job.wait_for("begins")
            after = draw.uniform(0, seconds) if counts["kills"] < kills else 100
            torn = set(folder.glob("*.new"))
            left = job.kill(after)
            counts["kills"] += left
            counts["before the first checkpoint"] += left and not (folder / "last.pt").exists()
            counts["while writing"] += bool(set(folder.glob("*.new")) - torn)
        counts["runs"] += 1
        assert same(final(folder), expected)
    return counts


def test_a_process_that_is_killed_at_random_moments_ends_where_one_ends_that_was_not(
    undisturbed, tmp_path
):
    counts = killed_at_random(tmp_path, undisturbed, random.Random(0), kills=2)
    assert counts["kills"] == 2


@pytest.mark.slow
def test_a_process_that_is_killed_many_times_ends_where_one_ends_that_was_not(
    undisturbed, tmp_path, capsys
):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        halves = pool.map(
            lambda seed: killed_at_random(
                tmp_path / str(seed), undisturbed, random.Random(seed), KILLS // 2
            ),
            (1, 2),
        )
        one, two = halves
    counts = {name: one[name] + two[name] for name in one}
    assert counts["kills"] >= KILLS // 2 * 2
    assert counts["while writing"]
    with capsys.disabled():
        sys.stdout.write(f"\n{counts}\n")


@pytest.mark.parametrize("place", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_ctrl_c_in_a_replay_saves_and_the_job_goes_on_bit_equal(place, undisturbed, tmp_path):
    job = Job(tmp_path, "--wait", f"{place} 5", "--save-updates", "100")
    job.wait_for("waits")
    job.process.send_signal(signal.SIGINT)
    code, errors = job.end()
    assert code == 130, errors
    assert len(final(tmp_path)["order"]) == 4
    assert final(tmp_path)["free"]["done"] == 1  # the fifth replay is the second of its minibatch
    assert Job(tmp_path).kill(after=100) is False
    assert same(final(tmp_path), undisturbed[0])


# Loaders that fail.


class Images(Dataset):
    """Of which one can't be read, or kills its reader, as long as `fault` exists."""

    def __init__(self, fault=None, kind=None):
        (x, self.labels), self.kind = batches((24,))[0], kind
        self.images, self.fault = x, fault

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index == 17 and self.fault and self.fault.exists():
            if self.kind == "dies":
                time.sleep(1)  # the error may come at any moment: let the loop wait for this batch
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("cannot read image 17")
        return self.images[index], self.labels[index]


@pytest.mark.parametrize(
    ("kind", "workers", "error", "phrase"),
    [
        ("dies", True, RuntimeError, "DataLoader worker .* (is killed|exited unexpectedly)"),
        ("raises", True, OSError, "cannot read image 17"),
        ("raises", False, OSError, "cannot read image 17"),
    ],
)
def test_after_a_loader_that_fails_the_run_goes_on_from_the_last_minibatch(
    kind, workers, error, phrase, tmp_path
):
    def begin():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, FreeAdversarial(optimizer, eps=0.1, replays=3)

    def train(model, free, loader):
        for x, y in free.replay(loader):
            free.step(loss_of(model, x, y))

    expected, _, whole = begin()
    train(expected, whole, DataLoader(Images(), 4))

    fault = tmp_path / "fault"
    fault.touch()
    how = {"num_workers": 1, "prefetch_factor": 1} if workers else {}
    loader = DataLoader(Images(fault, kind), 4, **how)
    model, optimizer, free = begin()
    with pytest.raises(error, match=phrase):
        train(model, free, loader)
    assert free.state_dict()["minibatch"] is None
    fresh = begin()
    for new, old in zip(fresh, (model, optimizer, free), strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    fault.unlink()
    for to_go_on, with_free in ((model, free), (fresh[0], fresh[2])):
        rest = itertools.islice(DataLoader(Images(), 4), 4, None)  # 16 images are behind it
        train(to_go_on, with_free, rest)
        assert all(map(torch.equal, to_go_on.parameters(), expected.parameters()))
        assert torch.equal(with_free.delta, whole.delta)


# Memory that runs out.


class Hungry(torch.nn.Module):
    """A network that needs more memory than there is for some of its batches."""

    def __init__(self, hungry):
        super().__init__()
        self.net, self.hungry, self.passes = network(), hungry, 0

    def forward(self, x):
        self.passes += 1
        if self.passes in self.hungry:
            x = x + torch.empty(2**58)[: len(x)].sum()
        return self.net(x)


OUT_OF_MEMORY = "can't allocate memory|not enough memory"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("own_backward", [False, True], ids=["step", "own backward"])
def test_a_minibatch_that_does_not_fit_into_memory_is_left_out_and_the_next_goes_on(
    accumulate, own_backward
):
    loader = batches((4, 4, 4, 4, 4, 4))
    m = 3

    def train(hungry, loader):
        model = Hungry(hungry)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        free = FreeAdversarial(
            None if own_backward else optimizer, eps=0.1, replays=m, accumulate=accumulate
        )
        caught = 0
        for x, y in free.replay(loader):
            try:
                loss = loss_of(model, x, y)
                if own_backward:
                    (loss / accumulate).backward()
                    if free.last:
                        optimizer.step()
                        optimizer.zero_grad()
                else:
                    free.step(loss)
            except RuntimeError as error:
                assert re.search(OUT_OF_MEMORY, str(error))
                optimizer.zero_grad()
                free.skip()
                caught += 1
        return list(model.parameters()), free.state_dict()["delta"][0], caught

    # The second minibatch fails in its first replay, at its first or its second micro-batch.
    for at in range(1, accumulate + 1):
        weights, delta, caught = train({m * accumulate + at}, loader)
        rest = loader[:accumulate] + loader[2 * accumulate :]
        expected, its_delta, none = train((), rest)
        assert (caught, none) == (1, 0)
        assert all(map(torch.equal, weights, expected))
        assert torch.equal(delta, its_delta)


def test_what_replays_have_made_before_one_fails_is_kept():
    model, reference = Hungry({2}), network()
    free = FreeAdversarial(torch.optim.SGD(model.parameters(), 0.1), eps=0.1, replays=3)
    with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
        for x, y in free.replay(batches((4,))):
            free.step(loss_of(model, x, y))
    free.skip()
    once = FreeAdversarial(torch.optim.SGD(reference.parameters(), 0.1), eps=0.1, replays=1)
    for x, y in once.replay(batches((4,))):
        once.step(loss_of(reference, x, y))
    assert all(map(torch.equal, model.parameters(), reference.parameters()))
    assert torch.equal(free.state_dict()["delta"][0], once.state_dict()["delta"][0])


def test_without_skip_the_next_replay_says_what_to_call():
    model = Hungry({2})
    free = FreeAdversarial(torch.optim.SGD(model.parameters(), 0.1), eps=0.1)
    with pytest.raises(RuntimeError, match=r"(?s)replay 2 of 4 .*on purpose.*call free.skip\(\)"):
        for x, y in free.replay(batches((4,))):
            with contextlib.suppress(RuntimeError):
                free.step(loss_of(model, x, y))


def test_skip_outside_a_loop_says_where_it_belongs():
    free = FreeAdversarial(eps=0.1)
    with pytest.raises(RuntimeError, match="expects a minibatch in flight: call it inside"):
        free.skip()


def test_a_step_that_failed_may_be_made_again():
    expected, model = network(), network()
    hook = model[0].weight.register_hook(lambda grad: torch.empty(2**58))
    for net in (expected, model):
        free = FreeAdversarial(torch.optim.SGD(net.parameters(), 0.1), eps=0.1, replays=3)
        for x, y in free.replay(batches((4, 4))):
            if net is model and hook:
                with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
                    free.step(loss_of(net, x, y))
                hook = hook.remove()
            free.step(loss_of(net, x, y))
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


class Failing(torch.optim.SGD):
    """Raises at the given step, before it moves anything."""

    steps, at = 0, None

    def step(self):
        self.steps += 1
        if self.steps == self.at:
            raise MemoryError
        super().step()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_state_taken_after_an_optimizer_has_failed_makes_that_replay_again(accumulate):
    def begin(at=None):
        model = network()
        optimizer = Failing(model.parameters(), 0.1)
        optimizer.at = at
        return model, FreeAdversarial(optimizer, eps=0.1, replays=3, accumulate=accumulate)

    def train(model, free, loader):
        for x, y in free.replay(loader):
            free.step(loss_of(model, x, y))

    expected, whole = begin()
    train(expected, whole, batches((4, 4, 4, 4)))
    (model, free), source = begin(at=2), iter(batches((4, 4, 4, 4)))
    with pytest.raises(MemoryError):
        train(model, free, source)
    assert free.state_dict()["done"] == 1
    again, fresh = begin()
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(free.state_dict())
    train(again, fresh, source)
    assert all(map(torch.equal, again.parameters(), expected.parameters()))


# An interrupt at each line.


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that runs inside the package."""

    def __init__(self, n):
        self.n, self.place, self.codes = n, None, ()

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(str(ROOT / "free_adv")):
            return None
        if event == "line":
            self.n -= 1
            if self.n == 0:
                self.place = frame.f_code.co_name, frame.f_lineno
                self.codes = {f.f_code for f, _ in traceback.walk_stack(frame)}
                raise KeyboardInterrupt
        return self.trace


# Inside these an interrupt may count a replay whose weights have not moved, or the other way round; and what has been
# read from a loader and is not yet in flight is lost.
INEXACT = {
    f.__code__
    for f in (Optimizers._step, Minibatch.take_in, Slot.ascend, Slot.forget, _Source.read)
}


def interrupted_at_every(stride, norm, accumulate):
    """Interrupt a run at every so many lines; how often it went on bit-equal, and how often it need not."""
    eps, loader = 0.1, batches((2, 2) * accumulate)

    def begin():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return model, FreeAdversarial(
            optimizer, eps=eps, norm=norm, replays=2, accumulate=accumulate
        )

    def train(model, free, source):
        for x, y in free.replay(source):
            free.step(loss_of(model, x, y))

    expected, whole = begin()
    train(expected, whole, loader)
    exact = inexact = 0
    for n in itertools.count(1, stride):
        (model, free), source = begin(), iter(loader)
        with Interrupt(n) as interrupt, contextlib.suppress(KeyboardInterrupt):
            train(model, free, source)
        torch.set_grad_enabled(True)  # one at the end of a `with` leaves it as it is inside
        if interrupt.place is None:
            return exact, inexact
        state = free.state_dict()
        for delta in state["delta"]:
            assert delta.isfinite().all()
            assert free.threat.distance(delta).max() <= eps + 1e-6
        weights = copy.deepcopy(model.state_dict())
        train(model, free, loader[:accumulate])  # the same objects are of use as well
        if INEXACT & interrupt.codes:
            inexact += 1
            continue
        again, fresh = begin()
        again.load_state_dict(weights)
        fresh.load_state_dict(state)
        train(again, fresh, source)
        ends = map(torch.equal, again.parameters(), expected.parameters())
        assert all(ends), interrupt.place
        exact += 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_interrupt_at_any_line_leaves_delta_in_the_ball_and_a_state_to_go_on_from(
    norm, accumulate
):
    exact, inexact = interrupted_at_every(23, norm, accumulate)
    assert exact > 5
    assert inexact > 2


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_interrupt_at_every_line_leaves_a_state_to_go_on_from(norm, accumulate, capsys):
    exact, inexact = interrupted_at_every(1, norm, accumulate)
    with capsys.disabled():
        sys.stdout.write(f"\n{exact} interrupts went on bit-equal, {inexact} need not\n")
