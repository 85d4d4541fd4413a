"""Ascents of delta alone before a minibatch, and noise beside delta: each equal to a loop that is written out."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from free_adv import FreeAdversarial, ThreatModel
from tests.helpers import (
    equal,
    in_ball,
    loss_of,
    on_two_ranks,
    sgd,
    train,
    weights,
    with_batch_norm,
)
from tests.internals import optimizers_of
from tests.reference import batches, network

EPS, STEP, SIZES = 8 / 255, 3 / 255, (8, 8, 8, 3, 8)


def objective_of(model):
    return lambda batch: loss_of(model, batch[0], batch[1])


def free_with(model, optimizer=None, **arguments):
    settings = {"eps": EPS, "step_size": STEP, "objective": objective_of(model), **arguments}
    return FreeAdversarial(optimizer or sgd(model), **settings)


def written_out(
    model, optimizer, loader, threat, *, k, m, w=1, step=STEP, start="carry", noise=0.0
):
    """k gradients of the input alone right before a minibatch's first turn, then m updates; w minibatches take turns."""
    deltas = [torch.zeros_like(loader[0][0]) for _ in range(w)]
    beside = [None] * w
    for first in range(0, len(loader), w):
        for turn in range(m):
            for i, (x, y) in enumerate(loader[first : first + w]):
                n = len(x)
                delta = deltas[i][:n]
                if turn == 0:
                    if start == "zero":
                        delta.zero_()
                    if start == "uniform":
                        delta.uniform_(-threat.eps, threat.eps)
                    beside[i] = torch.zeros_like(delta)
                    if noise:
                        beside[i].uniform_(-noise * threat.eps, noise * threat.eps)

                def leaf(x=x, delta=delta, i=i):
                    return threat.perturb(x, delta + beside[i]).requires_grad_()

                for _ in range(k if turn == 0 else 0):
                    z = leaf()
                    (g,) = torch.autograd.grad(loss_of(model, z, y), z)
                    threat.ascend(delta, g, step)
                z = leaf()
                optimizer.zero_grad()
                loss_of(model, z, y).backward()
                optimizer.step()
                threat.ascend(delta, z.grad, step)
                yield z.detach(), weights(model)


WAYS = {
    "Free": {"k": 0, "m": 4},
    "FGSM-RS": {"k": 1, "m": 1, "start": "uniform", "step": 1.25 * EPS},
    "N-FGSM": {"k": 1, "m": 1, "start": "zero", "step": EPS, "noise": 2.0},
    "PGD-7": {"k": 7, "m": 1, "start": "uniform", "step": EPS / 4},
    "carried": {"k": 1, "m": 1},
    "one ascent, two turns": {"k": 1, "m": 2, "w": 2},
    "two ascents, three turns, noise": {"k": 2, "m": 3, "w": 3, "noise": 0.5},
}


@pytest.mark.parametrize("own", [False, True], ids=["step", "own backward"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_each_method_is_bit_equal_to_a_loop_written_out(way, dtype, norm, own):
    if norm == "l2" and (way.get("start") == "uniform" or way.get("noise")):
        pytest.skip("drawn otherwise in l2: see the test of the draw")
    loader, (model, twin) = batches(SIZES, dtype=dtype), (network(dtype), network(dtype))
    threat = ThreatModel(EPS, norm)
    torch.manual_seed(3)
    expected = list(written_out(twin, sgd(twin), loader, threat, **way))
    optimizer = sgd(model)
    free = FreeAdversarial(
        None if own else optimizer,
        eps=EPS,
        norm=norm,
        step_size=way.get("step", STEP),
        replays=way["m"],
        window=way.get("w", 1),
        start=way.get("start", "carry"),
        noise=way.get("noise", 0.0),
        ascents=way["k"],
        objective=objective_of(model),
    )
    torch.manual_seed(3)
    assert len(free.replay(loader)) == len(expected)
    for (x, y), (z, after) in zip(free.replay(loader), expected, strict=True):
        assert torch.equal(x, z)
        loss = loss_of(model, x, y)
        if own:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            free.step(loss)
        assert torch.equal(weights(model), after)
        assert in_ball(free)


def test_normalised_images_climb_as_raw_ones_with_the_normalisation_in_the_model():
    mean, std = [0.4, 0.5], [0.2, 0.3]
    view = torch.tensor([mean, std], dtype=torch.float64)[:, None, :, None, None]
    raw = batches(SIZES, dtype=torch.float64)
    results = []
    for normalised in (False, True):
        net = network(torch.float64)
        model = net if normalised else lambda x, net=net: net((x - view[0]) / view[1])
        loader = [((x - view[0]) / view[1], y) for x, y in raw] if normalised else raw
        scale = {"mean": mean, "std": std} if normalised else {}
        free = FreeAdversarial(
            torch.optim.SGD(net.parameters(), 0.1),
            eps=EPS,
            replays=2,
            ascents=1,
            noise=1.0,
            objective=objective_of(model),
            **scale,
        )
        torch.manual_seed(0)
        for x, y in free.replay(loader):
            free.step(loss_of(model, x, y))
        results.append(weights(net))
    torch.testing.assert_close(*results, atol=1e-8, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("at", [False, True])
def test_noise_is_uniform_in_its_ball_once_a_minibatch_and_delta_stays_in_its_own(norm, at):
    torch.manual_seed(0)
    module = nn.Identity()
    free = FreeAdversarial(
        eps=0.01,
        norm=norm,
        replays=3,
        noise=3.0,
        start="zero",
        bounds=None,
        at=module if at else None,
    )
    clean = torch.full((500, 4), 0.5, dtype=torch.float64)
    draws = []
    for (x,) in free.replay([(clean,)] * 2):
        z = module(x)
        draws.append((z - free.clean - free.delta).detach())
        (z * torch.randn(4)).sum().backward()
        assert in_ball(free)
    torch.testing.assert_close(draws[0], draws[2], atol=1e-12, rtol=0)
    assert not torch.equal(draws[0], draws[3])
    radii = free.threat.distance(draws[0]) / 0.03
    assert radii.max() <= 1 + 1e-9
    # The radius of a uniform draw from a ball in four dimensions has the mean 4/5.
    assert radii.mean() == pytest.approx(0.8, abs=0.03)


def test_noise_is_held_in_the_bounds_and_the_gradient_is_taken_there():
    free = FreeAdversarial(eps=0.1, replays=1, noise=5.0, start="zero")
    x, _ = next(iter(free.replay(batches((64,)))))
    assert x.min() == 0
    assert x.max() == 1
    x.sum().backward()
    list(free.replay([]))
    assert (free.state_dict()["delta"][0] == 0.1).all()  # saturated pixels too


def test_micro_batches_equal_one_large_batch():
    results = []
    for sizes, accumulate in (((8, 8), 1), ((4, 4, 4, 4), 2)):
        model = network(torch.float64)
        whole = batches((16,), torch.float64)[0]
        loader = [*zip(*(t.split(sizes[0]) for t in whole), strict=True)]
        free = free_with(model, ascents=2, replays=2, accumulate=accumulate)
        for x, y in free.replay(loader):
            free.step(loss_of(model, x, y))
        results.append(weights(model))
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


@pytest.mark.parametrize("key", [[0, 1], (0, ...)], ids=str)
def test_several_inputs_climb_together(key):
    single = key != [0, 1]
    generator = torch.Generator().manual_seed(0)
    one, two = torch.rand(2, 4, 6, generator=generator, dtype=torch.float64)
    model = nn.Linear(12, 3).double()

    def loss(batch):
        a, b = (torch.stack(batch[0][:4]), torch.stack(batch[0][4:])) if single else batch
        return functional.cross_entropy(model(torch.cat([a, b], 1)), torch.arange(4) % 3)

    free = FreeAdversarial(
        eps=0.1, step_size=0.03, replays=1, ascents=2, objective=loss, key=key, bounds=None
    )
    batch = ([*one, *two],) if single else (one, two)
    found = next(iter(free.replay([batch])))
    moved = torch.stack([*found[0]]).view(2, 4, 6) if single else torch.stack([*found])
    delta = torch.zeros(2, 4, 6, dtype=torch.float64)
    for _ in range(2):
        z = (torch.stack([one, two]) + delta).requires_grad_()
        answer = functional.cross_entropy(model(torch.cat([*z], 1)), torch.arange(4) % 3)
        (g,) = torch.autograd.grad(answer, z)
        delta = (delta + 0.03 * g.sign()).clamp(-0.1, 0.1)
    torch.testing.assert_close(moved - torch.stack([one, two]), delta)


@pytest.mark.filterwarnings("ignore:the batches that were taken ahead")
def test_a_consumer_that_takes_batches_ahead_gets_those_that_climbed_before_each():
    model = network()
    free = free_with(model, ascents=1, replays=2, accumulate=2)
    replay, turns = iter(free.replay(batches((8, 8)))), []
    for _ in range(2):
        ahead = []
        for _ in range(2):
            ahead.append(next(replay))
            turns.append((free.turn, (free.delta != 0).any().item()))
        for x, y in ahead:
            (loss_of(model, x, y) / 2).backward()
    assert list(replay) == []
    assert turns == [(0, True), (0, True), (1, True), (1, True)]


def test_a_skipped_minibatch_of_a_window_does_not_climb_again():
    model, looks = network(), []
    free = FreeAdversarial(
        sgd(model),
        eps=EPS,
        replays=3,
        window=2,
        ascents=1,
        objective=lambda b: (looks.append(free.turn), loss_of(model, *b))[1],
    )
    seen = []
    for i, (x, y) in enumerate(free.replay(batches((8, 8)))):
        if i == 2:
            free.skip()
            continue
        seen.append(free.turn)
        free.step(loss_of(model, x, y))
    assert seen == [0, 0, 1, 2]
    assert looks == [0, 0]


def test_what_the_objective_raises_comes_out_of_the_loop_and_the_object_goes_on():
    model, broken = network(), [True]

    def objective(batch):
        if broken[0]:
            raise MemoryError("no room")
        return loss_of(model, *batch)

    free = free_with(model, ascents=1, replays=2, objective=objective)
    with pytest.raises(MemoryError, match="no room"):
        train(model, free, batches())
    broken[0] = False
    train(model, free, batches())
    other = network()
    train(other, free_with(other, ascents=1, replays=2), batches())
    assert torch.equal(weights(model), weights(other))


def test_the_model_runs_in_its_mode_and_gradients_of_weights_stay():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), network())
    free = free_with(model, ascents=2, replays=1, start="zero")
    first, (x, y) = batches((8, 8))
    replay = iter(free.replay([first, (x, y)]))
    loss_of(model, *next(replay)).backward()
    before, twin = [p.grad.clone() for p in model.parameters()], copy.deepcopy(model)
    torch.manual_seed(0)
    found, _ = next(replay)
    assert equal([p.grad for p in model.parameters()], before)
    torch.manual_seed(0)
    delta, threat = torch.zeros_like(x), ThreatModel(EPS)
    for _ in range(2):
        z = threat.perturb(x, delta).requires_grad_()
        (g,) = torch.autograd.grad(loss_of(twin, z, y), z)
        threat.ascend(delta, g, STEP)
    assert torch.equal(found, threat.perturb(x, delta))
    assert torch.equal(model[0].running_mean, twin[0].running_mean)
    assert model[0].num_batches_tracked == (2 + 1) + 2


@pytest.mark.filterwarnings("ignore:the input gradient of")
@pytest.mark.parametrize("scaled", [False, True])
def test_the_loss_of_the_objective_is_scaled_so_that_float16_does_not_flush_its_gradient(scaled):
    """A loss so small that its gradient is below the smallest number of float16, in which the input is."""
    x = torch.full((4, 8), 0.5, dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20) if scaled else None
    free = FreeAdversarial(
        eps=0.1, replays=1, ascents=1, scaler=scaler, objective=lambda b: (b.float() * 1e-9).sum()
    )
    found = next(iter(free.replay([x])))
    assert (found.detach() != x).all().item() == scaled


def test_a_scaler_for_the_objective_alone_is_no_mistake():
    model, (x, y) = nn.Linear(4, 2), (torch.rand(3, 4), torch.arange(3) % 2)
    scaler = torch.amp.GradScaler("cpu")
    objective = lambda batch: functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    free = FreeAdversarial(eps=0.1, replays=2, ascents=1, scaler=scaler, objective=objective)
    for x_adv, label in free.replay([(x, y)] * 2):  # warnings are errors
        scaler.scale(functional.cross_entropy(model(x_adv), label)).backward()


def test_an_objective_opens_autocast_itself_and_an_overflow_moves_nothing():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # everything overflows
    seen = []

    def objective(batch):
        with torch.autocast("cpu", torch.float16):
            logits = model(batch[0])
        seen.append(logits.dtype)
        return functional.cross_entropy(logits, batch[1])

    free = free_with(model, ascents=2, replays=1, scaler=scaler, objective=objective)
    x, _ = next(iter(free.replay(batches((8,)))))
    assert seen == [torch.float16] * 2
    assert torch.equal(x, batches((8,))[0][0])
    scaler.update(2.0**10)
    x, _ = next(iter(free.replay(batches((8,)))))
    assert not torch.equal(x, batches((8,))[0][0])
    assert in_ball(free)


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4 inside
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("at", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_climb_as_without_and_reentrant_ones_are_refused_with_the_cure(reentrant, at):
    results = []
    for checkpointed in (False, True):
        model = network(torch.float64)

        def run(x, model=model, checkpointed=checkpointed):
            return checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)

        where = {"at": model[0], "bounds": (-9, 9)} if at else {}
        free = FreeAdversarial(
            sgd(model),
            eps=EPS,
            replays=2,
            ascents=1,
            objective=lambda b, run=run: loss_of(run, *b),
            **where,
        )
        if checkpointed and reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                next(iter(free.replay(batches(dtype=torch.float64))))
            return
        for x, y in free.replay(batches(dtype=torch.float64)):
            free.step(loss_of(run, x, y))
        results.append(weights(model))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


@pytest.mark.parametrize("stop", range(1, 12))
@pytest.mark.parametrize("how", [{}, {"window": 2}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("at", [False, True])
def test_a_run_goes_on_bit_equal_from_any_replay_and_does_not_climb_again(at, how, stop):
    loader = batches((4, 4, 4, 4))

    def make():
        net = nn.Sequential(nn.Identity(), network())
        calls = []

        def objective(batch):
            calls.append(1)
            return loss_of(net, *batch)

        where = {"at": net[0], "bounds": (0, 1)} if at else {}
        free = free_with(
            net, ascents=1, replays=3, noise=1.0, start="zero", objective=objective, **where, **how
        )
        return net, free, calls

    def run(net, free, source, stop=None):
        for i, (x, y) in enumerate(free.replay(source)):
            free.step(loss_of(net, x, y))
            if i + 1 == stop:
                return

    torch.manual_seed(0)
    net, free, calls = make()
    run(net, free, loader)
    torch.manual_seed(0)
    source, (one, before, first) = iter(loader), make()
    run(one, before, source, stop)
    random = torch.get_rng_state()
    if not before.last:
        pytest.skip(
            "a group of micro-batches that is not through begins anew, with gradients of its own"
        )
    other, after, second = make()
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    other.load_state_dict(one.state_dict())
    after_optimizer(after, before)
    torch.set_rng_state(random)
    run(other, after, source)
    assert torch.equal(weights(other), weights(net))
    assert len(first) + len(second) == len(calls) == 4


def after_optimizer(after, before):
    """The optimizer of one object with the state of another's."""
    mine, theirs = (optimizers_of(free)[0] for free in (after, before))
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))


def test_ascents_and_noise_may_be_assigned_and_hold_from_the_next_minibatch_on():
    model, calls = network(), []
    free = free_with(
        model,
        replays=2,
        start="zero",
        bounds=None,
        objective=lambda b: (calls.append(1), loss_of(model, *b))[1],
    )
    seen = []
    for i, (x, y) in enumerate(free.replay(batches((8,) * 3))):
        seen.append((len(calls), (x.detach() - free.clean - free.delta).abs().max() > 1e-6))
        if i == 0:
            free.ascents, free.noise = 3, 0.5
        if i == 2:
            free.ascents = 0
        free.step(loss_of(model, x, y))
    assert [n for n, _ in seen] == [0, 0, 3, 3, 3, 3]
    assert [bool(noisy) for _, noisy in seen[:3]] == [False, False, True]
    assert (free.ascents, free.noise) == (0, 0.5)
    free.ascents = 2
    other = free_with(network(), bounds=None, replays=2)
    other.load_state_dict(free.state_dict())
    assert (other.ascents, other.noise) == (2, 0.5)
    with pytest.raises(ValueError, match="ascents must be at least 0, got -1"):
        free.ascents = -1
    with pytest.raises(ValueError, match="noise must be finite and not negative, got -1"):
        free.noise = -1
    with pytest.raises(ValueError, match=r"ascents=1 needs an objective.*criterion\(model"):
        FreeAdversarial(eps=0.1).ascents = 1
    with pytest.raises(ValueError, match="ascents=2 needs an objective"):
        FreeAdversarial(eps=EPS, replays=2, bounds=None).load_state_dict(free.state_dict())


@pytest.mark.parametrize(
    ("objective", "error", "phrase"),
    [
        (lambda b: None, TypeError, "objective must return a loss, a tensor, got NoneType"),
        (lambda b: b[0].mean((1, 2, 3)), ValueError, r"must return a scalar, .* take its mean\(\)"),
        (lambda b: b[0].detach().mean(), RuntimeError, "the objective gave delta no gradient"),
        (
            lambda b: torch.ones((), requires_grad=True) * 2,
            RuntimeError,
            "must come from the batch",
        ),
    ],
    ids=["None", "one loss a sample", "detached", "of something else"],
)
def test_an_objective_that_cannot_be_climbed_is_refused(objective, error, phrase):
    free = FreeAdversarial(eps=0.1, ascents=1, objective=objective)
    with pytest.raises(error, match=phrase):
        next(iter(free.replay(batches())))
    with pytest.raises(TypeError, match="objective must be callable, got int"):
        FreeAdversarial(eps=0.1, objective=1)


def test_an_objective_that_does_not_pass_the_module_is_refused():
    free = FreeAdversarial(
        eps=0.1, at=nn.Identity(), ascents=1, objective=lambda b: (b[0] * 2).sum()
    )
    with pytest.raises(RuntimeError, match="and pass the module given as at"):
        next(iter(free.replay(batches())))


def test_the_report_has_the_alignment_of_each_ascent():
    model = network()
    free = free_with(model, ascents=2, replays=2, start="uniform")
    assert free.report()["ascents"] == []
    train(model, free, batches())
    first, second = free.report()["ascents"]
    assert abs(first) < second < 1  # from a random point, and from where the first has led
    assert free.report()["ascents"] == []
    assert all(map(math.isnan, free.report()["alignment"]))


def test_natural_training_is_one_of_the_settings():
    model, twin = network(), network()
    free = free_with(model, ascents=0, replays=1, start="zero")
    train(model, free, batches())
    optimizer = sgd(twin)
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(twin, x, y).backward()
        optimizer.step()
    assert torch.equal(weights(model), weights(twin))


# What is interrupted, mixed up or left behind.


def counted(model, stop=None, work=lambda: None):
    """An objective, the calls of it, and what it does in its call of that number."""
    calls = []

    def objective(batch):
        calls.append(1)
        if len(calls) == stop:
            work()
        return loss_of(model, *batch)

    return objective, calls


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("way", ["interrupt", "handler"])
def test_a_state_taken_in_the_middle_of_the_ascents_makes_all_of_them_again(way):
    def start(stop=None, work=lambda: None):
        model = network()
        objective, calls = counted(model, stop, work)
        free = free_with(
            model, optimizer := sgd(model), replays=1, start="zero", ascents=7, objective=objective
        )
        return model, optimizer, free, calls

    def go(model, free, source):
        for x, y in free.replay(source):
            free.step(loss_of(model, x, y))

    def save():
        saved.append(copy.deepcopy([part.state_dict() for part in stopped[:3]]))
        if way == "interrupt":
            interrupt()

    whole, saved = start(), []
    go(whole[0], whole[2], batches(SIZES))
    stopped = start(11, save)
    source = iter(batches(SIZES))
    if way == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            go(stopped[0], stopped[2], source)
    else:
        go(stopped[0], stopped[2], source)
        assert equal(weights(stopped[0]), weights(whole[0]))  # saving disturbs nothing
        source = iter(batches(SIZES)[2:])
    resumed = start()
    for part, state in zip(resumed, saved[0], strict=False):
        part.load_state_dict(state)
    go(resumed[0], resumed[2], source)
    assert equal(weights(resumed[0]), weights(whole[0]))
    assert len(resumed[3]) == 7 * (len(SIZES) - 1)


def test_ascents_that_fail_are_made_again_by_the_next_iterator():
    model = network()
    objective, calls = counted(model, 3, interrupt)
    free = free_with(model, replays=1, start="zero", ascents=4, objective=objective)
    ((x, y),) = batches((8,))
    with pytest.raises(KeyboardInterrupt):
        next(iter(free.replay([(x, y)])))
    free.load_state_dict(free.state_dict())
    z, _ = next(iter(free.replay([])))
    assert len(calls) == 3 + 4
    twin = free_with(model, replays=1, start="zero", ascents=4)
    assert torch.equal(z, next(iter(twin.replay([(x, y)])))[0])


@pytest.mark.parametrize("change", [{"ascents": 3}, {"noise": 1.0}], ids=["ascents", "noise"])
def test_a_window_from_a_state_goes_on_with_the_budget_with_which_it_was_read(change):
    def start():
        model = network()
        return model, free_with(model, replays=2, window=2, ascents=1, noise=0.5, start="zero")

    def go(model, free, source, first=True, stop=99):
        for i, (x, y) in enumerate(free.replay(source)):
            if first and i == 0:
                for name, value in change.items():
                    setattr(free, name, value)
            free.step(loss_of(model, x, y))
            if i == stop:
                return

    go(*(whole := start()), batches((4,) * 4))
    source = iter(batches((4,) * 4))
    go(*(stopped := start()), source, stop=0)
    random, resumed = torch.get_rng_state(), start()
    resumed[0].load_state_dict(stopped[0].state_dict())
    resumed[1].load_state_dict(stopped[1].state_dict())
    optimizers_of(resumed[1])[0].load_state_dict(optimizers_of(stopped[1])[0].state_dict())
    torch.set_rng_state(random)
    go(*resumed, source, first=False)
    assert equal(weights(resumed[0]), weights(whole[0]))


@pytest.mark.parametrize(
    "change", [torch.clone, lambda x: x.contiguous(memory_format=torch.channels_last)]
)
def test_calls_that_the_objective_makes_otherwise_than_the_loop_are_told(change):
    entrance, model = nn.Identity(), network()

    def trained(of_the_objective):
        def objective(batch):
            return loss_of(model, entrance(of_the_objective(batch[0])), batch[1])

        free = free_with(
            model,
            replays=1,
            ascents=1,
            start="zero",
            at=entrance,
            bounds=(0, 1),
            objective=objective,
        )
        with free:
            for x, y in free.replay(batches((4, 4))):
                free.step(loss_of(model, entrance(change(x)), y))

    with pytest.warns(
        UserWarning, match=r"the objective gives the module passed as at .*'\[0\]'.* \(0\)"
    ) as told:
        trained(lambda x: x)
    assert len(told) == 1
    trained(change)


def test_gradients_that_an_objective_leaves_on_the_weights_are_not_of_the_update():
    models = [network(torch.float64) for _ in range(2)]
    for model, leaves in zip(models, (False, True), strict=True):

        def objective(batch, model=model, leaves=leaves):
            if leaves:
                loss_of(model, *batch).backward(inputs=[*model.parameters()])
            return loss_of(model, *batch)

        free = free_with(model, replays=2, ascents=2, objective=objective)
        train(model, free, batches((4, 4), torch.float64))
    assert torch.equal(*map(weights, models))


@pytest.mark.parametrize("name", ["step", "skip"])
def test_an_objective_that_trains_is_refused(name):
    model = network()

    def objective(batch):
        free.step(loss_of(model, *batch)) if name == "step" else free.skip()
        return loss_of(model, *batch)

    free = free_with(model, replays=1, ascents=1, objective=objective)
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"{name}\(\) was called by the objective, which only"):
        train(model, free, batches())
    assert torch.equal(weights(model), before)


def test_a_scaler_for_the_objective_alone_is_no_mistake_though_the_ascents_begin_later():
    model = network()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    free = FreeAdversarial(
        eps=EPS, replays=1, ascents=1, objective=objective_of(model), scaler=scaler
    )
    free.ascents = 0
    for x, y in free.replay(batches((4, 4))):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_a_state_behind_a_skip_in_a_window_of_batches_of_several_sizes_is_loaded(noise):
    model = network()
    free = free_with(model, ascents=1, noise=noise, replays=2, window=2)
    iterator = iter(free.replay(batches((8, 4))))
    x, y = next(iterator)
    free.step(loss_of(model, x, y))
    next(iterator)
    free.skip()
    state = free.state_dict()
    again = free_with(model, ascents=1, noise=noise, replays=2, window=2)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again.replay([])))[0], next(iterator)[0])


def test_a_state_with_nothing_in_flight_needs_no_objective_for_ascents_of_the_past():
    model = network()
    free = free_with(model, ascents=1, noise=2.0, replays=1)
    train(model, free, batches())
    free.ascents = free.noise = 0
    FreeAdversarial(sgd(model), eps=EPS, replays=1).load_state_dict(free.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n * torch.nan,
        lambda n: n[:1],
        lambda n: torch.cat([n, n]),
        lambda n: n.long(),
    ],
    ids=["nan", "few rows", "many rows", "integers"],
)
def test_a_state_with_other_noise_than_delta_has_is_refused(change):
    model = network()
    free = free_with(model, ascents=1, noise=2.0, replays=2)
    next(iter(free.replay(batches())))
    state = free.state_dict()
    free.load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"state\['noise'\] must be finite, of the shape and dtype"
    ):
        free.load_state_dict({**state, "noise": [*map(change, state["noise"])]})
    with pytest.raises(ValueError, match=r"state\['begun'\] counts 99 rows of a delta that has 8"):
        free.load_state_dict({**state, "begun": [99]})


# Ranks.


def trained(rank, world, wrap, inner=False, loader=None, norm=False):
    model = wrap(with_batch_norm() if norm else network(torch.float64))
    asked = model.module if inner else model
    free = free_with(model, ascents=2, replays=2, objective=objective_of(asked))
    whole = batches((8, 8, 4), torch.float64)
    for x, y in free.replay(loader or [(x[rank::world], y[rank::world]) for x, y in whole]):
        free.step(loss_of(model, x, y))
    found = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in found]


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[-1]):
        fsdp.fully_shard(layer, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def with_uneven_ascents(rank):
    """Rank 1 climbs more often than rank 0: nobody waits."""
    model = DistributedDataParallel(network(torch.float64))
    free = free_with(model, ascents=1 + 2 * rank, replays=1)
    for x, y in free.replay(batches((4, 4), torch.float64)):
        free.step(loss_of(model, x, y))
    return weights(model)


def plain(model):
    return model


def on_a_rank(rank, _):
    return {
        "DDP": trained(rank, 2, DistributedDataParallel),
        "DDP, its module": trained(rank, 2, DistributedDataParallel, inner=True),
        "FSDP": trained(rank, 2, sharded),
        "batch norm": trained(rank, 2, DistributedDataParallel, norm=True),
        "uneven": with_uneven_ascents(rank),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has found, by name."""
    return on_two_ranks(on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("how", ["DDP", "DDP, its module", "FSDP"])
def test_ranks_train_as_one_process_whatever_the_objective_calls(how, ranks):
    expected = trained(0, 1, plain)
    for found in ranks:
        torch.testing.assert_close(found[how], expected, atol=1e-10, rtol=0)


def test_ddp_with_batch_norm_trains_and_its_ranks_agree(ranks):
    one, two = (found["batch norm"] for found in ranks)
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_ranks_do_not_wait_for_one_another_while_they_climb(ranks):
    one, two = (found["uneven"] for found in ranks)
    assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_climbs_and_trains_in_one_graph():
    torch._dynamo.reset()
    plain_model, model = network(), network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for net, run in ((plain_model, plain_model), (model, compiled)):
        free = free_with(net, ascents=2, replays=2, noise=0.5, objective=objective_of(run))
        torch.manual_seed(0)
        for _ in range(2):
            for x, y in free.replay(batches((8, 8))):
                free.step(loss_of(run, x, y))
    assert counter.frame_count == 1
    torch.testing.assert_close(weights(model), weights(plain_model), atol=1e-5, rtol=0)
    torch._dynamo.reset()
