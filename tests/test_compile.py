"""`torch.compile`: the replays neither break the graph nor recompile it."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional

from free_adv import FreeAdversarial
from tests.reference import batches, network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),  # inductor's own
    # Dynamo looks at .grad of every tensor that enters a graph, as it does of any activation.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model, compiled, *, epochs=2, sizes=(8, 8, 8, 3), autocast=False, at=None, loader=None):
    free = FreeAdversarial(
        torch.optim.SGD(model.parameters(), 0.1), eps=0.1, replays=3, at=at, bounds=(0, 1)
    )
    frames = []
    for _ in range(epochs):
        for x, y in free.replay(loader or batches(sizes)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = functional.cross_entropy(compiled(x), y)
            free.step(loss)
            frames.append(counters["stats"]["unique_graphs"])
    return free, frames


@pytest.mark.parametrize(("backend", "sizes"), [("aot_eager", (8, 8, 8, 3)), ("inductor", (8, 8))])
def test_compiled_and_eager_training_agree_without_a_break_or_a_recompilation(backend, sizes):
    plain, model = network(), network()
    expected, _ = train(plain, plain, sizes=sizes)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    free, frames = train(model, compiled, sizes=sizes)
    assert not counters["graph_break"]
    assert counter.frame_count == len(set(sizes))  # one for each size of batch
    if backend == "aot_eager":
        assert frames == [1] * 9 + [2] * 15  # none from replay to replay, or epoch to epoch
    torch.testing.assert_close(free.delta, expected.delta, atol=1e-6, rtol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_compiled_model_trains_under_autocast_with_one_graph_per_shape():
    model = network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    free, _ = train(model, compiled, autocast=True, sizes=(8, 8))
    assert counter.frame_count == 1
    assert free.delta.abs().max() == pytest.approx(0.1)


def test_channels_last_and_evaluation_in_between_add_their_own_graphs_only():
    model = network().to(memory_format=torch.channels_last)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    loader = [(x.to(memory_format=torch.channels_last), y) for x, y in batches((8, 8))]
    for _ in range(2):
        free, _ = train(model, compiled, epochs=1, loader=loader)
        assert free.delta.is_contiguous(memory_format=torch.channels_last)
        model.eval()
        with torch.no_grad():
            compiled(loader[0][0])
        model.train()
    assert counter.frame_count == 2


def test_perturbing_inside_a_compiled_model_agrees_with_eager():
    class Images(
        nn.Module
    ):  # of a Sequential, whose loop the hook breaks, nothing would be compiled
        def __init__(self):
            super().__init__()
            self.stem, self.net = nn.Identity(), network()

        def forward(self, x):
            return self.net(self.stem(x))

    plain, model = Images(), Images()
    expected, _ = train(plain, plain, at=plain.stem)
    free, frames = train(model, torch.compile(model, backend="aot_eager"), at=model.stem)
    assert frames[-1] > 0
    torch.testing.assert_close(free.delta, expected.delta, atol=1e-6, rtol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert frames[-1] == frames[12]  # nothing is compiled after the first epoch's last shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reduce_overhead_agrees_with_eager_on_a_gpu():
    plain, model = network().cuda(), network().cuda()
    loader = [(x.cuda(), y.cuda()) for x, y in batches((8, 8, 8))]
    expected, _ = train(plain, plain, loader=loader)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    free, _ = train(model, compiled, loader=loader)
    torch.testing.assert_close(free.delta, expected.delta, atol=1e-4, rtol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=0)
