"""The model that is attacked is the one that people run: found, switched, given copies, and left as it was."""

import copy
import functools
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torchvision.models.feature_extraction import create_feature_extractor

from free_adv import ThreatModel, evaluate, pgd

THREAT = ThreatModel(8 / 255)
TINY = ThreatModel(1e-6)  # moves nothing


def images(n=20, seed=1):
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


X = images()


def linear(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *between, nn.Linear(48, 10))


def live():
    return linear(nn.BatchNorm1d(48), nn.Dropout(0.9))


def judged(model, y, x=X, threat=TINY, **arguments):
    return evaluate(model, [(x, y)], threat, **{"steps": 1, "progress": False, **arguments})


def in_eval(net, x=X):
    """The classes of a module in evaluation mode, computed on a copy."""
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x.clone()).argmax(1)


# By its own eval() and train().


class Unit(nn.Linear):
    """Weights of length 1, computed once in evaluation mode; train() and eval() drop them."""

    kept = None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training or self.kept is None:
            self.kept = functional.normalize(self.weight, dim=1).detach()
        return functional.linear(x, self.kept)


class Two(nn.Module):
    """Its train() chooses between two graphs, as torchvision's feature extractors do."""

    def __init__(self):
        super().__init__()
        self.graphs = nn.ModuleList([linear(nn.Dropout(0.9)), linear()])
        self.train()

    def train(self, mode=True):
        self.graph = self.graphs[0 if mode else 1]
        return super().train(mode)

    def forward(self, x):
        return functional.dropout(self.graph(x), 0.5, self.graph is self.graphs[0])


def test_what_eval_drops_is_computed_anew_for_each_evaluation():
    net = nn.Sequential(nn.Flatten(), Unit(48, 10, bias=False))
    for _ in range(2):
        nn.init.normal_(net[1].weight)
        y = functional.linear(X.flatten(1), functional.normalize(net[1].weight, dim=1)).argmax(1)
        assert judged(net, y).clean == 1
        assert net[1].kept is None


@pytest.mark.parametrize("training", [False, True])
def test_a_model_with_two_graphs_runs_that_of_evaluation_and_gets_its_own_back(training):
    net = Two().train(training)
    was = net.graph
    y = net.graphs[1](X).argmax(1)
    assert judged(net, y).clean == 1
    pgd(net, X, y, THREAT, steps=2)
    assert net.graph is was
    assert net.training == training


def test_a_part_that_is_found_before_its_whole_gets_its_own_mode_back():
    part = Two().eval()
    whole = nn.Sequential(nn.Dropout(0.9), part)
    whole.training = whole[0].training = True  # and the part is not
    y = part.graphs[1](X).argmax(1)
    assert judged(lambda x, part=part, whole=whole: whole(x), y).clean == 1
    assert (whole.training, part.training) == (True, False)
    assert part.graph is part.graphs[1]


class Freezes(nn.Module):
    """Its train() freezes a stage, as those of detectors do."""

    def __init__(self):
        super().__init__()
        self.net = linear()
        self.train()

    def train(self, mode=True):
        self.net.requires_grad_(not mode)
        return super().train(mode)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("run", ["pgd", "evaluate"])
@pytest.mark.parametrize("training", [False, True])
def test_weights_are_trained_or_not_as_they_were_whatever_train_does(training, run):
    net = Freezes().train(training)
    net.net[1].bias.requires_grad_(training)
    y = in_eval(net)
    pgd(net, X, y, THREAT, steps=1) if run == "pgd" else judged(net, y)
    assert net.net[1].weight.requires_grad is not training
    assert net.net[1].bias.requires_grad is training


def test_weights_that_an_attack_has_frozen_are_trained_again():
    net = linear()

    def attack(model, x, y):
        model.requires_grad_(False)
        return x

    judged(net, in_eval(net), attack=attack)
    assert all(p.requires_grad for p in net.parameters())


def test_a_feature_extractor_of_torchvision_is_measured_by_its_graph_for_evaluation():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = live()

        def forward(self, x):
            return functional.dropout(self.net(x), 0.9, training=self.training)

    net = create_feature_extractor(Dropped(), {"dropout": "logits"}).train()

    def model(x):
        return net(x)["logits"]

    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        y = copy.deepcopy(net).eval()(X)["logits"].argmax(1)
    assert judged(model, y).clean == 1
    assert net.training
    assert net.graph is net.train_graph
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Adapter(nn.Module):
    """Adds its product to a weight for evaluation, and takes it out again for training."""

    def __init__(self, exact=False, by_data=False):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.exact, self.by_data = nn.Linear(48, 10), exact, by_data
        self.more = nn.Parameter(torch.randn(10, 48))
        self.merged, self.was = False, None

    @torch.no_grad()
    def train(self, mode=True):
        weight = self.base.weight.data if self.by_data else self.base.weight
        if self.merged == mode:
            if self.exact and mode:
                weight.copy_(self.was)
            else:
                self.was = weight.clone()
                weight += (-1 if mode else 1) * 0.3 * self.more
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        x = x.flatten(1)
        return self.base(x) + (0 if self.merged else 0.3 * functional.linear(x, self.more))


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("run", ["pgd", "evaluate"])
def test_an_adapter_whose_weights_come_back_with_another_rounding_is_told(run, by_data):
    net = Adapter(by_data=by_data)
    y = net(X).argmax(1)

    def attacked():
        if run == "pgd":
            return pgd(net, X, y, THREAT, steps=1)
        return judged(net, y)

    with pytest.warns(UserWarning, match=r"changed 1 of its weights, base.weight first") as told:
        attacked()
    assert len(told) == 1
    assert told[0].filename == __file__
    assert not net.merged


def test_an_adapter_whose_weights_come_back_exactly_is_not_told():
    net = Adapter(exact=True)
    before = net.base.weight.clone()
    assert judged(net, net(X).argmax(1)).clean == 1
    assert torch.equal(net.base.weight, before)


# Copies.


class Centred(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x[:, 0].mul_(0.5)  # a view
        return self.net(x.sub_(0.5).mul_(4))


@pytest.mark.parametrize("attack", [None, lambda model, x, y: x, "autoattack"])
def test_a_model_that_works_in_place_is_measured_on_the_images_of_the_loader(attack):
    net = Centred(linear())
    x, y = X.clone(), in_eval(Centred(linear()))
    result = judged(net, y, x, ThreatModel(0.5), attack=attack)
    assert result.clean == 1
    assert callable(attack) == (result.robust == 1)
    assert torch.equal(x, X)


def test_pgd_on_a_model_that_works_in_place_is_that_on_one_that_does_not():
    net = linear()
    y = in_eval(Centred(net))

    def plain(x):
        return Centred(net)(x.clone())

    x = X.clone()
    found = pgd(Centred(net), x, y, THREAT, restarts=2)
    assert torch.equal(found, pgd(plain, X, y, THREAT, restarts=2))
    assert torch.equal(x, X)


# Found wherever a callable leads.


class Slots:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


class Base:
    def __call__(self, x):
        return type(self).net[0](x)


class Hidden(nn.Module):
    """Holds another module where parameters are not looked for."""

    def __init__(self, net):
        super().__init__()
        self.scale, self.nets = nn.Identity(), [{"net": (net,)}]

    def forward(self, x):
        return self.nets[0]["net"][0](self.scale(x))


NETS = {}


def by_name(x):
    def inner():
        return NETS["net"]

    return inner()(x)


def with_defaults(net):
    def model(x, *, net=net):
        return net(x)

    return model


def decorated(net):
    @functools.wraps(by_name)
    def model(*args):
        return net(*args)

    return functools.lru_cache(functools.partial(model))


def hooked(net):
    front = nn.Identity()
    front.register_forward_hook(lambda module, args, out: net(out))
    return front


def cached(net):
    @functools.lru_cache
    def load():
        return net.__class__.forward.__get__(net)

    return lambda x: load()(x)


def named(net):
    NETS["net"] = net
    return by_name


def weak(net):
    reference = weakref.ref(net)
    return lambda x: reference()(x)


class Late:
    """Runs a module that nothing leads to, from the n-th call on, or where gradients are taken."""

    def __init__(self, net, first=0, with_gradients=False):
        self.other, self.first, self.with_gradients = linear(), first, with_gradients
        self.calls, self.key = 0, id(net)
        STORE[self.key] = net

    def __call__(self, x):
        self.calls += 1
        late = x.requires_grad if self.with_gradients else self.calls > self.first
        return load(self.key)(x) if late else self.other(x)


STORE = weakref.WeakValueDictionary()
load = eval("lambda key: __import__('tests.test_subject').test_subject.STORE[key]")
WRAPPERS = {
    "a default": lambda net: lambda x, net=net: net(x),
    "a default by name": with_defaults,
    "a slot": Slots,
    "a class": lambda net: type("Wrapper", (Base,), {"net": [net]})(),
    "a method of a class": lambda net: (
        type("Wrapper", (), {"run": staticmethod(net.forward)})().run
    ),
    "a decorated partial": decorated,
    "a cache": cached,
    "a hook": hooked,
    "a module that hides it": Hidden,
    "a global name in a function inside": named,
    "an iterator": lambda net: (lambda nets: lambda x: next(nets)(x))(itertools.cycle([net])),
    "a weak reference": weak,
    "nothing that leads there": Late,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wherever_a_callable_leads_modules_are_still_and_left_as_they_were(name):
    net = live()
    net[1].eval()  # a mode of its own
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    front, wrapped, y = nn.Identity(), WRAPPERS[name](net), in_eval(net)

    def model(x):  # beside a module that is easily found
        return wrapped(front(x))

    assert judged(model, y).clean == 1
    pgd(model, X, y, THREAT, steps=1)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_module_that_first_runs_where_gradients_are_taken_is_caught():
    net = live()
    before = copy.deepcopy(net.state_dict())
    model = Late(net, with_gradients=True)
    judged(model, in_eval(model.other), steps=3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())


def test_once_a_model_has_hidden_a_module_all_its_calls_are_watched():
    first, second = live(), live()
    before = copy.deepcopy(second.state_dict())
    one, two = Late(first), Late(second)
    calls = []

    def model(x):
        calls.append(x)
        return two(x) if len(calls) % 5 == 4 else one(x)

    judged(model, in_eval(first), steps=6)
    assert len(calls) > 4
    assert all(torch.equal(v, before[k]) for k, v in second.state_dict().items())


@pytest.mark.parametrize("run", ["pgd", "evaluate"])
def test_what_another_thread_runs_meanwhile_is_left_alone(run):
    net, other, modes = linear(), live(), []
    STORE["other"] = other

    def train():
        load("other")(X).sum().backward()
        modes.append(load("other").training)

    def model(x):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        return net(x)

    y = in_eval(net)
    pgd(model, X, y, THREAT, steps=2) if run == "pgd" else judged(model, y)
    assert len(modes) >= 2
    assert all(modes)
    assert other[1].num_batches_tracked == len(modes)
    assert other[3].weight.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_hidden_module_beside_a_compiled_one_is_caught_and_nothing_is_compiled_anew():
    torch._dynamo.reset()
    net, counter = linear(), CompileCounter()
    compiled = torch.compile(net, backend=counter)
    for _ in range(3):
        pgd(compiled, X, in_eval(net), TINY, steps=2)
    once = counter.frame_count
    hidden = live()
    model = Late(hidden)
    before = copy.deepcopy(hidden.state_dict())
    for _ in range(2):
        pgd(lambda x: compiled(x) + 0 * model(x), X, in_eval(net), TINY, steps=2)
        pgd(compiled, X, in_eval(net), TINY, steps=2)
    assert counter.frame_count == once
    assert all(torch.equal(v, before[k]) for k, v in hidden.state_dict().items())


# Buffers.


class Seen(nn.Module):
    """Writes to its buffer in every forward pass, in one way or another."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("seen", None if how == "comes" else torch.zeros(2))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.how == "in place":
            self.seen += 1
        elif self.how == "data":
            self.seen.data.add_(1)
        elif self.how == "replaced":
            self.seen = self.seen + 1
        elif self.how == "grows":
            self.seen.resize_(len(self.seen) + 1)
        elif self.how == "goes":
            self.seen = None
        elif self.how == "comes":
            self.seen = torch.ones(3)
        elif self.how == "cache":
            self.cache = self.cache + 1
        return x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("run", ["pgd", "evaluate"])
@pytest.mark.parametrize("how", ["in place", "data", "replaced", "grows", "goes", "comes", "cache"])
def test_buffers_that_move_in_evaluation_mode_are_put_back(how, run, fails):
    seen = Seen(how)
    net = nn.Sequential(seen, linear())
    y, before, cache = in_eval(net[1]), seen.seen, seen.cache

    def model(x):
        out = net(x)
        if fails:
            raise OSError("no memory today")
        return out

    for _ in range(2):
        if fails:
            with pytest.raises(OSError, match="no memory today"):
                pgd(model, X, y, THREAT) if run == "pgd" else judged(model, y)
        else:
            pgd(model, X, y, THREAT) if run == "pgd" else judged(model, y)
        assert seen.seen is before
        assert before is None or before.tolist() == [0, 0]
        assert seen.cache is cache


def test_a_cache_that_has_grown_stays_with_what_its_module_knows_of_it():
    class Table(nn.Module):
        size = 1

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(1), persistent=False)

        def forward(self, x):
            if len(x) > self.size:
                self.table, self.size = torch.zeros(len(x)), len(x)
            return x + self.table[: len(x), None, None, None]

    net = nn.Sequential(Table(), linear())
    for n in (5, 20, 10):
        judged(net, in_eval(net[1], X[:n]), X[:n])


def test_buffers_that_eval_fills_are_those_of_evaluation_until_the_end():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.zeros(1))

        def train(self, mode=True):
            self.scale.fill_(0.0 if mode else 1.0)
            return super().train(mode)

        def forward(self, x):
            return x * self.scale

    net = nn.Sequential(linear(), Filled())
    y = in_eval(net[0])
    assert judged(net, y, attack=lambda model, x, y: x).robust == 1
    assert net[1].scale == 0


def test_buffers_that_cannot_be_written_to_are_no_hindrance():
    net = linear()
    with torch.inference_mode():
        net.register_buffer("inference", torch.zeros(3))
    net.register_buffer("expanded", torch.zeros(1).expand(4))
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    net.register_buffer("meta", torch.zeros(3, device="meta"))
    y = in_eval(linear())
    assert judged(net, y).clean == 1
    pgd(net, X, y, THREAT)


def test_between_a_forward_and_its_backward_pass_an_evaluation_does_not_disturb():
    net = live()
    net[1].eval()  # its statistics are in the graph
    loss = net(X).sum()
    judged(net, in_eval(net))
    pgd(net, X, in_eval(net), THREAT, steps=1)
    loss.backward()


def test_a_lazy_model_is_evaluated_before_its_first_call():
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10), nn.LazyBatchNorm1d())
    assert 0 <= judged(net, torch.arange(20) % 10).clean <= 1


# Any device.


@pytest.fixture
def meta():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_default_device_decides_nothing(norm, meta):
    with torch.device("cpu"):
        net, x = linear(), images(10)
        y = in_eval(net, x)
    threat = ThreatModel(8 / 255, norm, mean=0.4, std=0.2)
    x = (x - 0.4) / 0.2
    loader = list(zip(x.split(5), y.split(5), strict=True))
    runs = [{"loss": "cw", "restarts": 2}]
    found = [evaluate(net, loader, threat, progress=False, **settings) for settings in runs]
    moved = pgd(net, x, y, threat, restarts=2)
    torch.set_default_device(None)
    assert found == [evaluate(net, loader, threat, progress=False, **settings) for settings in runs]
    assert torch.equal(moved, pgd(net, x, y, threat, restarts=2))


def test_the_default_device_does_not_decide_where_autoattack_draws(meta):
    with torch.device("cpu"):
        net, x = linear(), images(8)
        y = in_eval(net, x)

    def model(x):
        scale = torch.ones(1)  # on the default device, as the model's author may rely on
        return net(x) if scale.is_meta else x

    result = judged(model, y, x, ThreatModel(0.5), attack="autoattack")
    assert (result.clean, result.robust) == (1, 0)


def test_the_default_precision_decides_nothing():
    net = linear()
    y = in_eval(net)
    settings = {"steps": 2, "restarts": 2}
    moved, found = pgd(net, X, y, THREAT, **settings), judged(net, y, threat=THREAT, **settings)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(pgd(net, X, y, THREAT, **settings), moved)
        assert judged(net, y, threat=THREAT, **settings) == found
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    net, size = linear().eval(), torch.export.Dim("n", min=1, max=64)
    return net, torch.export.export(net, (X,), dynamic_shapes=({0: size},)).module()


@pytest.mark.parametrize("name", ["alone", "in a function", "inside another"])
def test_an_exported_module_has_no_mode_and_is_measured_all_the_same(name, exported):
    net, without = exported
    whole = nn.Sequential(nn.Dropout(0.9), without, nn.Dropout(0.9))
    model = {"alone": without, "in a function": lambda x: without(x)}.get(name, whole)
    modes = [m.training for m in whole.modules()]
    y = in_eval(net)
    assert judged(model, y, threat=THREAT) == judged(net, y, threat=THREAT)
    torch.testing.assert_close(pgd(model, X, y, THREAT), pgd(net, X, y, THREAT))
    assert [m.training for m in whole.modules()] == modes


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
@pytest.mark.parametrize("inside", [False, True])
def test_a_frozen_script_has_no_mode_and_is_measured_all_the_same(inside):
    net = linear().eval()
    frozen = torch.jit.freeze(torch.jit.script(net))
    model = nn.Sequential(nn.Identity(), frozen) if inside else frozen
    y = in_eval(net)
    assert judged(model, y, threat=THREAT) == judged(net, y, threat=THREAT)
    torch.testing.assert_close(pgd(model, X, y, THREAT), pgd(net, X, y, THREAT))


def test_a_skeleton_on_meta_is_not_the_models_device():
    members = [linear() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")

    def model(x):
        def call(p, b):
            return torch.func.functional_call(base, (p, b), (x,))

        return torch.func.vmap(call)(params, buffers).mean(0)

    assert judged(model, in_eval(members[0])).clean == 1
    pgd(model, X, in_eval(members[0]), THREAT, steps=1)


def test_a_module_that_is_called_with_other_tensors_keeps_its_own():
    net = live()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    STORE["functional"] = net

    def model(x):
        return torch.func.functional_call(load("functional"), state, (x,))

    own = {k: v.data_ptr() for k, v in net.state_dict(keep_vars=True).items()}
    judged(model, in_eval(net))
    assert {k: v.data_ptr() for k, v in net.state_dict(keep_vars=True).items()} == own
    assert all(m.training for m in net.modules())


# What is no input.


@pytest.mark.parametrize("run", ["pgd", "evaluate"])
@pytest.mark.parametrize(
    "x", [(X, X), [X], {"image": X}, X.numpy()], ids=["tuple", "list", "dict", "array"]
)
def test_inputs_that_are_no_tensor_are_refused_with_their_cure(x, run):
    y = torch.arange(20) % 10
    with pytest.raises(TypeError, match=r"inputs x must be one tensor.*(from_numpy|lambda x)"):
        pgd(linear(), x, y, THREAT) if run == "pgd" else judged(linear(), y, x)
