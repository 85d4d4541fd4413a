"""The promises of training and of evaluation on a second device, against the CPU.

FREE_ADV_DEVICE names it, such as cuda or xla: docs/contributing.md has the commands.
"""

import contextlib
import importlib
import io
import os

import pytest
import torch
from torch.nn import functional

from free_adv import FreeAdversarial, ThreatModel, evaluate, pgd
from tests.helpers import free_for, loss_of, sgd, weights
from tests.reference import batches, free_training, network

NAME = os.environ.get("FREE_ADV_DEVICE", "")
KIND = NAME.partition(":")[0]


def missing():
    """Why there is nothing to test on; nothing if there is."""
    if not NAME:
        return "FREE_ADV_DEVICE names no device, such as cuda or xla"
    try:
        if KIND == "xla":
            importlib.import_module("torch_xla")  # which makes the device known
        torch.zeros(1, device=NAME)
    except (ImportError, RuntimeError, AssertionError, NotImplementedError) as error:
        return f"there is no {NAME} here: {error}"
    return ""


def can(make):
    """Whether the device has something."""
    try:
        make()
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


ABSENT = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]
PRECISE = not ABSENT and can(lambda: torch.zeros(1, dtype=torch.float64, device=NAME))
DTYPE = torch.float64 if PRECISE else torch.float32
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
SCALE = {"mean": (0.4, 0.5), "std": (0.2, 0.3)}


def host(value):
    """Tensors, and lists of them, as one list on the CPU."""
    if KIND == "xla":
        importlib.import_module("torch_xla").sync()  # see `placed`
    if isinstance(value, torch.Tensor):
        return [value.detach().cpu()]
    return [t for part in value for t in host(part)]


def agree(one, other):
    """Whether two lists of tensors are equal up to rounding.

    In float32 the sign of a gradient that is zero but for rounding may be another, and delta with it.
    """
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        far = (
            (a.double() - b.double()).abs() > (1e-10 if a.dtype == torch.float64 else 1e-4)
        ) * 1.0
        assert far.mean() <= (0 if a.dtype == torch.float64 else 0.01)
    return True


def seed(number):
    """Seed the CPU and the device."""
    torch.manual_seed(number)
    if KIND == "xla":
        importlib.import_module("torch_xla").manual_seed(number)


def placed(model, place=NAME):
    """A model on a device."""
    if torch.device(place).type == "xla":
        # The host only notes what is to be done. As loops for XLA do once a step, begin a new program, or each
        # would hold all those before it.
        sync = importlib.import_module("torch_xla").sync
        model.register_forward_pre_hook(lambda *_: sync())
    return model.to(place)


def normalised(loader):
    mean, std = (torch.tensor(v, dtype=DTYPE).reshape(2, 1, 1) for v in SCALE.values())
    return [((x - mean) / std, y) for x, y in loader]


def run(place, loader=None, loss=loss_of, epochs=2, dtype=DTYPE, model=None, **arguments):
    """Train on a device; weights and delta after each call of `step`, on the CPU."""
    model = placed(network(dtype) if model is None else model, place)
    free = free_for(model, **{"device": place, "replays": 3, **arguments})
    seen = []
    for _ in range(epochs):
        for *x, y in free.replay(batches(dtype=dtype) if loader is None else loader):
            free.step(loss(model, *x, y))
            seen += host([weights(model), free.delta, free.clean])
    return seen


# Training.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64][: 1 + PRECISE], ids=str)
@pytest.mark.parametrize("window", [1, 2])
def test_training_on_the_device_is_algorithm_1_at_every_step(dtype, window):
    plain, model = network(dtype), placed(network(dtype))
    loader = batches((8, 8, 3), dtype)
    free = FreeAdversarial(sgd(model), eps=0.1, replays=3, window=window, device=NAME)
    steps = free_training(plain, sgd(plain), loader, eps=0.1, m=3, epochs=2, window=window)
    places = {1: [0] * 9, 2: [0, 1] * 3 + [0] * 3}[window]  # of the minibatches in the window
    for _ in range(2):
        for (x, y), place in zip(free.replay(loader), places, strict=True):
            assert x.device.type == y.device.type == KIND
            free.step(loss_of(model, x, y))
            delta = next(steps).split(8)[place][: len(x)]
            assert agree(host([weights(model), free.delta]), [weights(plain), delta])
    assert next(steps, None) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"step_size": 0.03},
        {"start": "zero"},
        {"bounds": None},
        {"bounds": (-1, 2), "eps": 0.3},
        {"window": 2},
        {"window": 5},
        {"accumulate": 2},
        {"accumulate": 2, "window": 2, "max_grad_norm": 0.1},
        {"max_grad_norm": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [{}, SCALE], ids=["plain", "normalised"])
@NORMS
def test_it_trains_as_on_the_cpu(norm, scale, arguments):
    arguments = {"norm": norm, **({"eps": 0.5} if norm == "l2" else {}), **scale, **arguments}
    loader = batches((8, 8, 8, 8, 3), DTYPE)
    if scale:
        loader = normalised(loader)
    assert agree(run(NAME, loader, **arguments), run("cpu", loader, **arguments))


def test_it_trains_as_on_the_cpu_on_batches_that_lie_there():
    loader = [(x.to(NAME), y.to(NAME)) for x, y in batches(dtype=DTYPE)]
    assert agree(run(NAME, loader, device=None), run("cpu"))


def test_a_loop_that_moves_the_batch_itself_trains_as_on_the_cpu_and_is_told_once():
    def loss(model, x, y):
        return loss_of(model, x.to(NAME), y.to(NAME))

    far = pytest.warns(UserWarning, match=f"device='{KIND}") if KIND != "cpu" else None
    with contextlib.nullcontext() if far is None else far as told:
        found = run(NAME, loss=loss, device=None)
    assert far is None or len(told) == 1
    assert agree(found, run("cpu"))


def test_batches_of_several_resolutions_have_a_delta_each():
    def pooled():
        torch.manual_seed(3)
        pool = torch.nn.AdaptiveAvgPool2d(1)
        layers = [torch.nn.Conv2d(2, 6, 3), torch.nn.ReLU(), pool, torch.nn.Flatten()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(6, 4)).to(DTYPE)

    loader = [(x[..., :size], y) for size in (5, 3) for x, y in batches((8, 3), DTYPE)]
    found = run(NAME, loader, model=pooled())
    assert agree(found, run("cpu", loader, model=pooled()))


def two(model, one, other, y):
    return loss_of(model, one, y) + loss_of(model, other, y) / 2


def test_several_inputs_have_a_delta_each():
    pairs = zip(batches(dtype=DTYPE), batches(dtype=DTYPE, seed=1), strict=True)
    loader = [(one, other, y) for (one, y), (other, _) in pairs]
    found = run(NAME, loader, two, key=[0, 1])
    assert agree(found, run("cpu", loader, two, key=[0, 1]))


def test_lists_of_samples_and_batches_in_containers_are_moved_and_perturbed():
    def loss(model, images, y):
        assert all(t.device.type == next(model.parameters()).device.type for t in images)
        return functional.cross_entropy(model(torch.stack(images)), torch.stack(y["class"]))

    loader = [([*x], {"class": [*y]}) for x, y in batches(dtype=DTYPE)]
    found = run(NAME, loader, loss, key=(0, ...))
    assert agree(found, run("cpu", loader, loss, key=(0, ...)))


def test_several_optimizers_are_driven():
    found = []
    for place in (NAME, "cpu"):
        model = placed(network(DTYPE), place)
        first = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
        second = torch.optim.AdamW(model[3].parameters(), 0.01)
        free = FreeAdversarial([first, second], eps=0.1, replays=3, device=place)
        for x, y in free.replay(batches(dtype=DTYPE)):
            free.step(loss_of(model, x, y))
        found.append(host([weights(model), free.delta]))
    assert agree(*found)


@pytest.mark.parametrize("arguments", [{}, {"window": 2}], ids=str)
def test_a_minibatch_that_is_skipped_leaves_all_as_on_the_cpu(arguments):
    found = []
    for place in (NAME, "cpu"):
        model = placed(network(DTYPE), place)
        free = free_for(model, replays=3, device=place, **arguments)
        for i, (x, y) in enumerate(free.replay(batches((8, 8, 8, 3), DTYPE))):
            loss = loss_of(model, x, y)
            if i == 4:
                free.skip()
            else:
                free.step(loss)
        found.append(host([weights(model), free.delta]))
    assert agree(*found)


def test_a_loop_with_a_backward_pass_of_its_own_trains_as_step_does():
    model = placed(network(DTYPE))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    free, seen = FreeAdversarial(eps=0.1, replays=3, device=NAME), []
    for _ in range(2):
        for x, y in free.replay(batches(dtype=DTYPE)):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            seen += host(weights(model))
    assert agree(seen, run("cpu")[::3])


@pytest.mark.skipif(KIND != "xla", reason="XLA counts its programs")
@NORMS
def test_after_the_first_minibatch_no_value_is_read_and_no_program_made(norm):
    metrics = importlib.import_module("torch_xla.debug.metrics")

    def counts():
        return metrics.metric_data("CompileTime")[0], metrics.counter_value(
            "aten::_local_scalar_dense"
        )

    model = placed(network())
    free = free_for(model, norm=norm, replays=3, device=NAME, **SCALE)
    loader = [(free.threat.from_pixels(x, x.dtype), y) for x, y in batches((8,) * 5)]
    for i, (x, y) in enumerate(free.replay(loader)):
        if i == 6:  # one more: what ends a minibatch and begins another is a program too
            before = counts()
        free.step(loss_of(model, x, y))
    assert counts() == before


def test_a_replay_without_a_gradient_raises():
    free = FreeAdversarial(eps=0.1, device=NAME)
    with pytest.raises(RuntimeError, match="received no gradient"):
        for _ in free.replay(batches()):
            pass


@NORMS
def test_a_uniform_start_fills_the_ball_and_comes_again_with_the_seed(norm):
    def draws():
        seed(5)
        free = FreeAdversarial(
            eps=0.1, norm=norm, start="uniform", replays=1, bounds=None, device=NAME
        )
        found = []
        for (x,) in free.replay([(torch.zeros(4096, 2),)] * 2):
            x.sum().backward()
            found += host(x)
        return found

    one, other = draws()
    assert not torch.equal(one, other)
    for x in (one, other):
        assert len(x.unique(dim=0)) > 4000
        assert x.mean(0).abs().max() < 0.005
        if norm == "linf":
            assert x.abs().max() <= 0.1
            assert x.std() == pytest.approx(0.1 / 3**0.5, rel=0.03)
        else:  # in two dimensions the mean radius of a disc is 2/3 of it
            assert x.norm(dim=1).max() <= 0.1 * (1 + 1e-6)
            assert x.norm(dim=1).mean() == pytest.approx(0.2 / 3, rel=0.03)
    assert all(map(torch.equal, draws(), (one, other)))


# What `at` perturbs.


class Text(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(20, 6, dtype=DTYPE)
        self.head = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(6, 4, dtype=DTYPE))

    def forward(self, *pieces):
        return self.head(torch.cat([self.embedding(ids).mean(1) for ids in pieces]))


def words(count=1, sizes=(8, 8, 3), lengths=(5, 5, 3)):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            *(torch.randint(20, (n, length), generator=generator) for _ in range(count)),
            torch.randint(4, (n,), generator=generator),
        )
        for n, length in zip(sizes, lengths, strict=True)
    ]


def read(place, loader, loss=loss_of, **arguments):
    model = Text()
    return run(place, loader, loss, model=model, at=model.embedding, norm="l2", **arguments)


def in_halves(model, ids, y):
    n = (len(ids) + 1) // 2
    return functional.cross_entropy(model(ids[:n], ids[n:]), y)


@pytest.mark.parametrize("arguments", [{}, {"accumulate": 2}, {"window": 2}], ids=str)
def test_the_output_of_a_module_is_perturbed_as_on_the_cpu(arguments):
    assert agree(read(NAME, words(), **arguments), read("cpu", words(), **arguments))


def test_two_tensors_that_go_through_the_module_have_a_delta_each():
    assert agree(read(NAME, words(2), two), read("cpu", words(2), two))


def test_pieces_of_a_batch_train_as_the_whole_batch_does():
    whole = read("cpu", words())[::3]
    assert agree(read(NAME, words(), in_halves)[::3], whole)


def test_a_copy_of_a_piece_is_known_by_its_order():
    def loss(model, ids, y):
        n = (len(ids) + 1) // 2
        return functional.cross_entropy(model(ids[:n].clone(), ids[n:].clone()), y)

    assert agree(read(NAME, words(), loss)[::3], read("cpu", words())[::3])


@pytest.mark.skipif(
    not ABSENT and not can(lambda: torch.zeros(1, device=NAME).untyped_storage().data_ptr()),
    reason="this device does not say where a tensor lies, so that a piece is known by its order",
)
def test_pieces_that_come_in_another_order_keep_their_rows():
    calls = []

    def loss(model, ids, y):
        calls.append(ids)
        if len(calls) % 2:
            return in_halves(model, ids, y)
        n = (len(ids) + 1) // 2
        return functional.cross_entropy(model(ids[n:], ids[:n]), torch.cat([y[n:], y[:n]]))

    loader = words(lengths=(5, 5, 5))
    assert agree(read(NAME, loader, loss)[::3], read("cpu", loader)[::3])


@pytest.mark.filterwarnings("ignore:samples that the module given as at has seen under")
def test_a_call_without_gradients_stays_clean():
    def loss(model, ids, y):
        with torch.no_grad():
            clean = model(ids)
        plain = model.head(functional.embedding(ids, model.embedding.weight).mean(1))
        assert torch.allclose(clean, plain)
        return loss_of(model, ids, y)

    assert agree(read(NAME, words(), loss), read("cpu", words()))


# Numbers.


@NORMS
def test_gradients_that_are_not_finite_move_nothing(norm):
    bad = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, 3.0, -4.0]])
    weight = torch.cat([bad, torch.full_like(bad, torch.nan), torch.zeros_like(bad)])
    free = FreeAdversarial(eps=0.1, norm=norm, replays=2, bounds=None, device=NAME)
    for (x,) in free.replay([(torch.zeros(3, 6),)]):
        (x * weight.to(NAME)).sum().backward()
    expected = torch.zeros(3, 6)
    expected[0, 4:] = torch.tensor([0.1, -0.1] if norm == "linf" else [0.06, -0.08])
    assert torch.allclose(free.delta.cpu(), expected, atol=1e-7)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_a_gradient_of_any_size_makes_a_step_of_the_same_length_in_l2(size):
    free = FreeAdversarial(eps=0.5, norm="l2", replays=1, bounds=None, device=NAME)
    weight = torch.tensor([[3.0, -4.0]]).to(NAME) * size
    for (x,) in free.replay([(torch.zeros(1, 2),)]):
        (x * weight).sum().backward()
    assert torch.allclose(free.delta.cpu(), torch.tensor([[0.3, -0.4]]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_network_sees_the_clean_input_and_delta_held_in_the_bounds_and_cast_last(dtype):
    free = FreeAdversarial(eps=0.1, replays=3, device=NAME)
    for x, _ in free.replay(batches((8, 3), dtype)):
        assert x.dtype == free.clean.dtype == dtype
        assert free.delta.dtype == torch.float32
        moved = free.clean.cpu().float() + free.delta.cpu()
        assert torch.equal(x.detach().cpu(), moved.clamp(0, 1).to(dtype))
        weight = torch.linspace(-1, 1, x[0].numel()).reshape(x[0].shape).to(NAME)
        (x.float() * weight).sum().backward()
    assert free.delta.abs().max().item() == pytest.approx(0.1)


def test_a_scaler_changes_nothing_and_an_overflow_moves_nothing():
    if not can(lambda: torch.amp.GradScaler(KIND)):
        pytest.skip("the device has no GradScaler")

    def train(place, scaler):
        model = placed(network(), place)  # XLA's scaler knows no float64
        free = free_for(model, replays=3, device=place, scaler=scaler, max_grad_norm=0.5)
        seen = []
        for i, (x, y) in enumerate(free.replay(batches((8, 8, 3)))):
            loss = loss_of(model, x, y)
            free.step(loss * torch.inf if scaler and i == 4 else loss)
            seen.append(host([weights(model), free.delta]))
        return seen

    scaler, other = (torch.amp.GradScaler(kind, init_scale=2.0**10) for kind in (KIND, "cpu"))
    found = train(NAME, scaler)
    assert scaler.get_scale() == 2.0**9
    assert agree(host(found), host(train("cpu", other)))
    assert other.get_scale() == 2.0**9
    assert all(map(torch.equal, found[4], found[3]))
    assert agree(host(found[:4]), host(train(NAME, None)[:4]))


def test_a_report_tells_what_it_does_on_the_cpu():
    found = []
    for place in (NAME, "cpu"):
        model = placed(network(DTYPE), place)
        free = free_for(model, replays=3, device=place)
        free.report()
        for x, y in free.replay(batches(dtype=DTYPE)):
            free.step(loss_of(model, x, y))
        found.append(free.report())
    one, other = found
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=1e-4, nan_ok=True)


# State.

PLACES = {"stays": (NAME, NAME), "goes to the CPU": (NAME, "cpu"), "comes from it": ("cpu", NAME)}


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "as saved"])
@pytest.mark.parametrize("arguments", [{}, {"window": 2}, {"norm": "l2", **SCALE}], ids=str)
@pytest.mark.parametrize(("first", "second"), PLACES.values(), ids=PLACES)
def test_a_run_goes_on_from_a_state_in_mid_minibatch(first, second, arguments, mapped):
    loader = batches((8, 8, 8, 3), DTYPE)
    if "mean" in arguments:
        loader = normalised(loader)

    def parts(place):
        model = placed(network(DTYPE), place)
        optimizer = sgd(model)
        free = FreeAdversarial(optimizer, eps=0.1, replays=3, device=place, **arguments)
        return {"model": model, "optimizer": optimizer, "free": free}

    def go(p, loader, stop=None):
        seen = []
        for x, y in p["free"].replay(loader):
            p["free"].step(loss_of(p["model"], x, y))
            seen += host([weights(p["model"]), p["free"].delta])
            if len(seen) == stop:
                break
        return seen

    whole = go(parts(first), loader)
    begun, file = parts(first), io.BytesIO()
    found = go(begun, loader, stop=8)  # the fourth replay of twelve
    torch.save({name: part.state_dict() for name, part in begun.items()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location="cpu" if mapped else None)
    again = parts(second)
    for name, part in again.items():
        part.load_state_dict(state[name])
    found += go(again, loader[2:])
    assert agree(found, whole)
    if first == second:
        assert all(map(torch.equal, found, whole))


def test_a_state_where_nothing_is_in_flight_changes_the_device_too():
    free = FreeAdversarial(eps=0.1, replays=2, device=NAME)
    for x, _ in free.replay(batches((8,))):
        (x * x).sum().backward()
    delta = free.delta.cpu()
    for place in ("cpu", NAME):
        other = FreeAdversarial(eps=0.1, replays=2, device=place)
        other.load_state_dict(free.state_dict())
        x, _ = next(iter(other.replay(batches((8,)))))
        assert x.device.type == torch.device(place).type
        assert torch.equal(other.delta.cpu(), delta)


# Evaluation.


def linear():
    """Two classes, of which the worst case in a ball is known: along the difference of the weights."""
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, 2)).to(DTYPE)


def two_classes():
    return [(x, y % 2) for x, y in batches((16, 16, 5), DTYPE)]


def worst(model, x, y, eps, norm):
    """Margins at the worst point of the ball."""
    weight = model[1].weight.detach()
    difference = weight[1 - y] - weight[y]
    margins = model(x).detach()
    margins = margins.gather(1, 1 - y[:, None]) - margins.gather(1, y[:, None])
    return margins[:, 0] + eps * difference.norm(p=1 if norm == "linf" else 2, dim=1)


EPS = {"linf": 0.02, "l2": 0.15}


@pytest.mark.parametrize("random_start", [True, False], ids=["random", "at x"])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("loss", ["ce", "cw"])
@NORMS
def test_pgd_finds_the_worst_case_of_a_linear_model(norm, loss, restarts, random_start):
    threat, model = ThreatModel(EPS[norm], norm, bounds=None), linear()
    (x, y), *_ = two_classes()
    expected = worst(model, x, y, threat.eps, norm)
    placed(model)
    given = {"loss": loss, "restarts": restarts, "random_start": random_start}
    x_adv = pgd(model, x.to(NAME), y.to(NAME), threat, steps=40, **given)
    assert x_adv.device.type == KIND
    assert x_adv.dtype == x.dtype
    moved = x_adv.cpu()
    assert (threat.distance(moved - x) <= threat.eps * (1 + 1e-6)).all()
    assert torch.allclose(worst(model.cpu(), moved, y, 0, norm), expected, atol=3e-3)


@pytest.mark.parametrize("scale", [{}, SCALE], ids=["plain", "normalised"])
@pytest.mark.parametrize("loss", ["ce", "cw"])
@NORMS
def test_pgd_from_the_input_is_that_of_the_cpu(norm, loss, scale):
    threat = ThreatModel(0.1 if norm == "linf" else 0.5, norm, **scale)
    (x, y), *_ = batches((8,), DTYPE)
    x = threat.from_pixels(x, x.dtype)
    found = [
        pgd(
            placed(network(DTYPE), place),
            x.to(place),
            y,
            threat,
            steps=5,
            loss=loss,
            random_start=False,
        )
        for place in (NAME, "cpu")
    ]
    assert agree(*map(host, found))


@NORMS
def test_random_starts_of_pgd_fill_the_ball_and_move_no_random_state(norm):
    threat, model = ThreatModel(0.1, norm, bounds=None), placed(torch.nn.Linear(2, 2))
    x, y = torch.zeros(4096, 2, device=NAME), torch.zeros(4096, dtype=torch.long, device=NAME)

    def numbers():
        return torch.cat([torch.rand(4), torch.rand(4, device=NAME).cpu()])

    seed(5)
    expected = numbers()
    seed(5)
    one = pgd(model, x, y, threat, steps=1, step_size=1e-8).cpu()
    assert torch.equal(numbers(), expected)
    seed(5)
    again = pgd(model, x, y, threat, steps=1, step_size=1e-8).cpu()
    assert torch.equal(one, again)
    assert len(one.unique(dim=0)) > 4000
    assert one.mean(0).abs().max() < 0.005
    assert (threat.distance(one) <= threat.eps * (1 + 1e-6)).all()
    inside = threat.distance(one).mean().item()  # of a square and of a disc 2/3 of the radius
    assert inside == pytest.approx(0.2 / 3, rel=0.03)


def test_a_generator_of_the_users_own_gives_other_starts_at_each_call():
    own = can(lambda: torch.Generator(NAME))
    generator = (torch.Generator(NAME) if own else torch.Generator()).manual_seed(0)
    (x, y), *_ = batches((8,), DTYPE)
    model, x = placed(network(DTYPE)), x.to(NAME)
    threat = ThreatModel(0.1)
    one, other = (
        pgd(model, x, y, threat, steps=1, step_size=1e-6, generator=generator).cpu()
        for _ in range(2)
    )
    assert not torch.allclose(one, other, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@NORMS
def test_pgd_stays_in_the_ball_in_half_precision(norm, dtype):
    threat = ThreatModel(0.1 if norm == "linf" else 0.5, norm)
    (x, y), *_ = batches((8,), dtype)
    model = placed(network())
    x_adv = pgd(lambda x: model(x.float()), x.to(NAME), y, threat).cpu()
    assert x_adv.dtype == dtype
    distance = threat.distance(x_adv.double() - x.double())
    assert (distance <= threat.eps * (1 + 1e-6)).all()
    assert (distance > threat.eps * 0.9).all()
    assert 0 <= x_adv.min() < x_adv.max() <= 1


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("where", ["the model's", "named", "the loader's"])
@NORMS
def test_evaluate_finds_which_images_of_a_linear_model_stand(norm, where, restarts):
    threat, model, loader = ThreatModel(EPS[norm], norm, bounds=None), linear(), two_classes()
    clean = torch.cat([worst(model, x, y, 0, norm) < 0 for x, y in loader])
    robust = torch.cat([worst(model, x, y, threat.eps, norm) < 0 for x, y in loader])
    assert 0 < robust.sum() < clean.sum() < len(clean)
    placed(model)
    if where == "the loader's":
        loader = [(x.to(NAME), y.to(NAME)) for x, y in loader]
    given = {"device": NAME} if where == "named" else {}
    result = evaluate(model, loader, threat, steps=40, restarts=restarts, progress=False, **given)
    assert result.count == 37
    assert result.clean_mask.device.type == result.robust_mask.device.type == "cpu"
    assert torch.equal(result.clean_mask, clean)
    assert torch.equal(result.robust_mask, robust)


def test_evaluate_leaves_model_and_random_numbers_as_they_were_and_repeats_itself():
    threat, loader = ThreatModel(0.02), batches((16, 16, 5), DTYPE)
    torch.manual_seed(1)
    layers = [torch.nn.BatchNorm2d(2), *network(), torch.nn.Dropout()]
    if KIND == "xla":  # 2.9 has no backward pass for batch norm in evaluation mode
        layers = layers[1:]
    model = placed(torch.nn.Sequential(*layers).to(DTYPE)).train()
    loss_of(model, *(t.to(NAME) for t in loader[0])).backward()

    def everything():
        grads = [p.grad for p in model.parameters()]
        return host([*model.state_dict().values(), *grads, torch.rand(4, device=NAME)])

    seed(5)
    before = everything()
    seed(5)
    one = evaluate(model, loader, threat, restarts=2, progress=False)
    assert all(module.training for module in model.modules())
    assert all(map(torch.equal, everything(), before))
    other = evaluate(model, loader, threat, restarts=2, progress=False)
    assert torch.equal(one.robust_mask, other.robust_mask)
    assert one.robust <= one.clean == other.clean
    on_cpu = evaluate(model.cpu(), loader, threat, restarts=2, progress=False)
    assert torch.equal(one.clean_mask, on_cpu.clean_mask)


def fgsm(model, x, y):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(model, x, y), x)
    return (x + 0.1 * grad.sign()).clamp(0, 1).detach()


def test_evaluate_runs_attacks_of_others_as_on_the_cpu():
    loader = batches((16, 16, 5), DTYPE)
    one, other = (
        evaluate(
            placed(network(DTYPE), place), loader, ThreatModel(0.1), attack=fgsm, device=place,
            progress=False,
        )
        for place in (NAME, "cpu")
    )  # fmt: skip
    assert torch.equal(one.clean_mask, other.clean_mask)
    assert torch.equal(one.robust_mask, other.robust_mask)


def test_evaluate_runs_under_autocast():
    if not can(lambda: torch.autocast(KIND, torch.bfloat16)):
        pytest.skip("the device has no autocast")
    model, loader = placed(network()), batches((16, 16, 5))
    given = {"progress": False, "autocast": torch.bfloat16}
    result = evaluate(model, loader, ThreatModel(0.02), **given)
    assert result.count == 37
    assert result.robust <= result.clean
