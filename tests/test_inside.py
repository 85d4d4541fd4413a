"""Perturbing the output of a module, `at`, in place of the input."""

import copy
import gc
import io
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from free_adv import FreeAdversarial, ThreatModel, evaluate
from tests.helpers import joined
from tests.internals import buffers, delta_of
from tests.reference import batches, free_training, network


class Reader(nn.Module):
    """Embeds words and classifies their mean."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(20, 6, dtype=dtype)
        self.head = nn.Sequential(
            nn.Linear(6, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, 4, dtype=dtype)
        )

    def forward(self, words):
        return self.head(self.embedding(words).mean(1))


def texts(lengths=(5, 5, 7), size=4):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "words": torch.randint(0, 20, (size, length), generator=generator),
            "label": torch.randint(0, 4, (size,), generator=generator),
        }
        for length in lengths
    ]


def loss_of(model, batch):
    return functional.cross_entropy(model(batch["words"]), batch["label"])


def reader(optimizer=True, **arguments):
    model = Reader()
    arguments = {"eps": 0.3, "replays": 3, "norm": "l2", "at": model.embedding, **arguments}
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return model, sgd, FreeAdversarial(sgd if optimizer else None, **arguments)


def test_at_the_first_layer_it_is_algorithm_1_of_the_paper():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.net = nn.Identity(), network(torch.float64)

        def forward(self, x):
            return self.net(self.stem(x))

    loader = batches(dtype=torch.float64)
    plain, model = network(torch.float64), Images()
    reference = free_training(
        plain, torch.optim.SGD(plain.parameters(), 0.1), loader, eps=0.1, m=3, epochs=2
    )
    free = FreeAdversarial(
        torch.optim.SGD(model.parameters(), 0.1), eps=0.1, replays=3, at=model.stem, bounds=(0, 1)
    )
    for _ in range(2):
        for x, y in free.replay(loader):
            free.step(functional.cross_entropy(model(x), y))
            assert torch.equal(free.state_dict()["delta"][0], next(reference))
            for mine, theirs in zip(model.net.parameters(), plain.parameters(), strict=True):
                assert torch.equal(mine, theirs)


def test_an_embedding_moves_as_the_l2_rule_says_and_its_own_weights_train():
    model, _, free = reader()
    other = Reader()
    theirs = torch.optim.SGD(other.parameters(), 0.1)
    deltas = {}
    for batch in texts():
        delta = deltas.setdefault(
            batch["words"].shape[1], torch.zeros(4, batch["words"].shape[1], 6)
        )
        deltas[batch["words"].shape[1]] = delta = delta.double()
        for _ in range(3):
            embedded = other.embedding(batch["words"])
            moved = (embedded + delta).requires_grad_()
            moved.retain_grad()
            loss = functional.cross_entropy(other.head(moved.mean(1)), batch["label"])
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            step = moved.grad / moved.grad.flatten(1).norm(dim=1)[:, None, None]
            delta += 0.3 * step
            delta *= (0.3 / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    for batch in free.replay(texts()):
        assert not batch["words"].is_floating_point()
        free.step(loss_of(model, batch))
    for mine, their in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, their, atol=1e-12, rtol=0)
    assert free.state_dict()["settings"]["bounds"] is None
    for mine in free.state_dict()["delta"]:
        torch.testing.assert_close(mine, deltas[mine.shape[1]], atol=1e-12, rtol=0)


def test_step_and_a_loop_with_its_own_backward_pass_agree():
    model, _, free = reader()
    other, sgd, loader_only = reader(optimizer=False)
    for batch in free.replay(texts()):
        free.step(loss_of(model, batch))
    for batch in loader_only.replay(texts()):
        sgd.zero_grad()
        loss_of(other, batch).backward()
        sgd.step()
    assert torch.equal(free.state_dict()["delta"][1], loader_only.state_dict()["delta"][1])
    assert torch.equal(model.embedding.weight, other.embedding.weight)


@pytest.mark.filterwarnings("ignore:the batches that were taken ahead")
@pytest.mark.parametrize("start", ["carry", "zero", "uniform"])
@pytest.mark.parametrize("short", [1, 2])
def test_a_window_over_the_replays_of_a_short_group_keeps_to_the_rows_of_the_group(short, start):
    model, _, free = reader(optimizer=False, accumulate=3, start=start)
    used = [[] for _ in range(short)]
    replay, left = iter(free.replay(texts((5,) * short))), 3 * short
    while left:
        window = list(itertools.islice(replay, min(left, 3)))
        for i, batch in enumerate(window):
            loss_of(model, batch).backward()
            used[(3 * short - left + i) % short].append(free.delta)
        left -= len(window)
    state = free.state_dict()["delta"]
    assert [len(d) for d in state] == [4] * short
    for slot, deltas in enumerate(used):
        if short == 1:  # all three were moved before a gradient was taken in
            assert torch.equal(deltas[0], deltas[1])
        assert not torch.equal(state[slot], deltas[-1])


@pytest.mark.filterwarnings("ignore:samples that the module given as at has seen under")
def test_it_is_active_only_between_a_batch_and_its_gradient():
    model, _, free = reader()
    words = texts()[0]["words"]
    clean = Reader()
    with torch.no_grad():
        before = clean(words)
    assert torch.equal(model(words), before)
    for i, batch in enumerate(free.replay(texts((5,)))):
        moving = i > 0  # delta starts at zero
        with torch.no_grad():
            model.load_state_dict(clean.state_dict())
            assert torch.equal(model(words), before)
        assert torch.equal(model(batch["words"]), before) != moving
        free.step(loss_of(model, batch))
        model.load_state_dict(clean.state_dict())
        assert torch.equal(model(words), before)
    assert torch.equal(model(words), before)


def test_evaluation_in_the_middle_of_an_epoch_sees_the_plain_model():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.net = nn.Identity(), network()

        def forward(self, x):
            return self.net(self.stem(x))

    model = Images()
    free = FreeAdversarial(
        torch.optim.SGD(model.parameters(), 0.1), eps=0.1, at=model.stem, bounds=(0, 1)
    )
    for x, y in free.replay(batches()):
        loss = functional.cross_entropy(model(x), y)
        results = [
            evaluate(net, batches(), ThreatModel(0.05), steps=2, progress=False)
            for net in (copy.deepcopy(model), model)
        ]
        free.step(loss)
    assert results[0].clean == results[1].clean
    assert (free.delta != 0).any()


def test_a_copied_or_saved_module_is_not_perturbed():
    model, _, free = reader()
    words = texts()[0]["words"]
    for batch in free.replay(texts((5,))):
        average = copy.deepcopy(model)
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        assert torch.equal(average(words), average.head(average.embedding.weight[words].mean(1)))
        assert torch.equal(average(words), saved(words))
        free.step(loss_of(model, batch))


def plain(model, words):
    return model.head(model.embedding.weight[words].mean(1))


def test_a_loop_that_was_left_and_an_object_that_is_gone_leave_the_module_alone():
    model, _, free = reader()
    for batch in free.replay(texts((5, 5))):
        free.step(loss_of(model, batch))
    for batch in free.replay(texts((5,))):
        assert not torch.equal(model(batch["words"]), plain(model, batch["words"]))
        break
    words = batch["words"]
    assert torch.equal(model(words), plain(model, words))
    replay = iter(free.replay(texts((5,))))
    words = next(replay)["words"]
    assert not torch.equal(model(words), plain(model, words))
    del free, replay
    gc.collect()
    assert torch.equal(model(words), plain(model, words))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_run_stopped_at_any_replay_goes_on_bit_equal(stop, accumulate):
    def run(model, free, source, stop=None):
        for i, batch in enumerate(free.replay(source)):
            free.step(loss_of(model, batch))
            if i + 1 == stop:
                break

    model, sgd, free = reader(accumulate=accumulate)
    run(model, free, iter(texts()))
    straight = [*model.parameters(), *free.state_dict()["delta"]]

    model, sgd, free = reader(accumulate=accumulate)
    source = iter(texts())
    run(model, free, source, stop)
    states = [copy.deepcopy(o.state_dict()) for o in (model, sgd, free)]
    fresh = reader(accumulate=accumulate)
    for new, state in zip(fresh, states, strict=True):
        new.load_state_dict(state)
    run(fresh[0], fresh[2], source)
    stopped = [*fresh[0].parameters(), *fresh[2].state_dict()["delta"]]
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_a_group_of_micro_batches_equals_the_large_batch():
    model, _, free = reader()
    other, _, grouped = reader(accumulate=2)
    small = texts((5, 5, 5), 4)
    large = [
        {k: torch.cat([b[k] for b in small[:2]]) for k in small[0]},
        small[2],
    ]
    for batch in free.replay(large):
        free.step(loss_of(model, batch))
    for batch in grouped.replay(small):
        grouped.step(loss_of(other, batch))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    torch.testing.assert_close(joined(grouped), joined(free), atol=1e-12, rtol=0)


@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_delta_starts_anew_at_each_minibatch_if_asked_to(start):
    model, _, free = reader(start=start)
    for i, batch in enumerate(free.replay(texts((5, 5)))):
        loss = loss_of(model, batch)
        if i % 3 == 0:
            assert (free.delta == 0).all() == (start == "zero")
            begun = free.delta
        elif i % 3 == 1:
            assert not torch.equal(free.delta, begun)
        free.step(loss)


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4 inside
def test_a_checkpointed_module_runs_twice_and_is_moved_once():
    class Checkpointed(Reader):
        def forward(self, words):
            return checkpoint(super().forward, words, use_reentrant=False)

    results = []
    for kind in (Reader, Checkpointed):
        model = kind()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        free = FreeAdversarial(sgd, eps=0.3, norm="l2", at=model.embedding)
        for batch in free.replay(texts()):
            free.step(loss_of(model, batch))
        results.append([*model.parameters(), *free.state_dict()["delta"]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("start", ["carry", "uniform"])
def test_calls_before_a_backward_pass_have_rows_of_their_own(start):
    model, _, free = reader(start=start)
    first, second = texts((5, 5))
    seen = []
    model.embedding.register_forward_hook(lambda module, arguments, out: seen.append(out))
    for batch in free.replay([first]):
        seen.clear()
        loss = loss_of(model, batch) - loss_of(model, second)
        clean = torch.cat([model.embedding.weight[b["words"]] for b in (batch, second)])
        torch.testing.assert_close(torch.cat(seen), clean + free.delta, atol=1e-12, rtol=0)
        assert torch.equal(free.clean, clean)
        assert len(free.delta) == 8
        free.step(loss)
    one, two = free.delta.split(4)
    assert (one != 0).any()
    assert (two != 0).any()
    assert not torch.equal(one, two)


@pytest.mark.parametrize("k", [1, 2])
def test_a_host_that_cuts_micro_batches_trains_as_one_that_does_not(k):
    """The rows go on after each backward pass: two halves are the whole batch, for each of k batches."""
    results = []
    for cuts in (1, 2):
        model, sgd, free = reader(optimizer=False, accumulate=k)
        for i, batch in enumerate(free.replay(texts((5, 5, 7, 7)))):
            for part in range(cuts):
                rows = slice(part * 4 // cuts, (part + 1) * 4 // cuts)
                half = {name: value[rows] for name, value in batch.items()}
                (loss_of(model, half) / cuts).backward()
            assert free.delta.shape[0] == 4
            if i % k == k - 1:
                sgd.step()
                sgd.zero_grad()
        results.append([*model.parameters(), *free.state_dict()["delta"]])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_a_second_pass_over_the_batch_begins_again_and_its_gradient_adds_up():
    """As the second pass of SAM, or a closure that LBFGS calls again."""
    model, _, free = reader(optimizer=False, replays=1, norm="linf", start="uniform")
    for batch in free.replay(texts((5,))):
        loss_of(model, batch).backward()
        before = free.delta
        (-3 * loss_of(model, batch)).backward()
        assert torch.equal(free.delta, before)
    other, _, once = reader(optimizer=False, replays=1, norm="linf", start="zero")
    for batch in once.replay(texts((5,))):
        other.load_state_dict(model.state_dict())
        for p in other.parameters():
            p.grad = None
        for buffer in buffers(once).values():
            buffer.copy_(before)
        (-2 * loss_of(other, batch)).backward()
    # The sum of both gradients points where -2 times the loss does.
    expected = (before + 0.3 * (once.delta - before).sign()).clamp(-0.3, 0.3)
    torch.testing.assert_close(free.delta, expected)


def test_a_forward_pass_that_was_given_up_takes_no_rows():
    model, _, free = reader(optimizer=False)
    for batch in free.replay(texts((5,))):
        model(batch["words"])  # for a log, say
        loss_of(model, batch).backward()
        assert len(free.delta) == 4
    assert (free.delta != 0).any()


def test_a_call_whose_output_the_loss_does_not_use_is_refused():
    model, _, free = reader(optimizer=False)
    with pytest.raises(RuntimeError, match="output the loss does not use"):
        for batch in free.replay(texts((5,))):
            unused = model(batch["words"].clone())  # other samples, by all that can be known
            loss_of(model, batch).backward()
    del unused


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4 inside
@pytest.mark.parametrize("together", [False, True])
def test_checkpointed_calls_of_one_shape_are_moved_again_as_they_were(together):
    first, second = texts((5, 5))
    results = []
    for checkpointed in (False, True):
        model, sgd, free = reader(optimizer=False)

        def part(words, model=model):
            return model.head(model.embedding(words).mean(1))

        def both(one, two, part=part):
            return part(one) - part(two)

        for batch in free.replay([first]):
            words = batch["words"], second["words"]
            if not checkpointed:
                logits = both(*words)
            elif together:
                logits = checkpoint(both, *words, use_reentrant=False)
            else:
                one, two = (checkpoint(part, w, use_reentrant=False) for w in words)
                logits = one - two
            sgd.zero_grad()
            functional.cross_entropy(logits, batch["label"]).backward()
            sgd.step()
        results.append([*model.parameters(), *free.state_dict()["delta"]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4 inside
def test_a_checkpoint_of_two_calls_that_cannot_be_told_apart_is_refused():
    model, _, free = reader(optimizer=False)
    with pytest.raises(RuntimeError, match="which of its calls"):
        for batch in free.replay(texts((5,))):

            def twice(words):
                one, two = (model.embedding(words.clone()).mean(1) for _ in range(2))
                return one * two

            checkpoint(twice, batch["words"], use_reentrant=False).square().sum().backward()


def test_outputs_of_several_shapes_have_a_delta_each():
    model, _, free = reader()
    for batch in free.replay(texts((5,))):
        longer = torch.cat([batch["words"], batch["words"]], 1)
        free.step(loss_of(model, batch) + loss_of(model, {**batch, "words": longer}))
    assert sorted(d.shape[1] for d in free.state_dict()["delta"]) == [5, 10]
    assert all((d != 0).any() for d in free.state_dict()["delta"])


def test_integer_images_are_perturbed_after_the_layer_that_makes_floats_of_them():
    class Scale(nn.Module):
        def forward(self, x):
            return x.float() / 255

    model = nn.Sequential(Scale(), network())
    free = FreeAdversarial(
        torch.optim.SGD(model.parameters(), 0.1), eps=8 / 255, at=model[0], bounds=(0, 1)
    )
    loader = [((x * 255).to(torch.uint8), y) for x, y in batches()]
    for x, y in free.replay(loader):
        assert x.dtype == torch.uint8
        free.step(functional.cross_entropy(model(x), y))
    assert free.delta.abs().max() == pytest.approx(8 / 255)
    assert free.clean.max() <= 1


def test_half_precision_outputs_have_a_float32_delta():
    model = Reader(torch.float32)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    free = FreeAdversarial(sgd, eps=0.3, at=model.head[0], scaler=scaler)
    for batch in free.replay(texts()):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch)
        free.step(loss)
    assert free.clean.dtype == torch.float16
    assert free.delta.dtype == torch.float32
    assert free.delta.isfinite().all()
    assert free.delta.abs().max() == pytest.approx(0.3)


def test_a_batch_that_does_not_pass_the_module_is_refused():
    model, _, free = reader()
    with pytest.raises(RuntimeError, match="with at=module: a forward pass without that module"):
        for batch in free.replay(texts()):
            embedded = functional.embedding(batch["words"], model.embedding.weight)
            free.step(functional.cross_entropy(model.head(embedded.mean(1)), batch["label"]))


def test_what_is_no_module_or_has_no_tensor_for_output_is_refused():
    with pytest.raises(TypeError, match=r"at must be a torch.nn.Module, got str"):
        FreeAdversarial(eps=0.1, at="embedding")
    recurrent = nn.LSTM(6, 4)
    free = FreeAdversarial(eps=0.1, at=recurrent)
    for _ in free.replay([torch.zeros(2)]):
        with pytest.raises(TypeError, match="LSTM gave tuple; choose one inside it"):
            recurrent(torch.zeros(5, 1, 6))
        break


def test_what_is_yielded_is_fresh_in_every_replay():
    loader = texts((5,))
    model, _, free = reader()
    for batch in free.replay(loader):
        assert torch.equal(batch["words"], texts((5,))[0]["words"])
        free.step(loss_of(model, batch))
        batch["words"].zero_()
        batch["label"].zero_()


def test_unequal_micro_batches_equal_one_large_batch():
    small = [texts((5,), 4)[0], {k: v[:1] for k, v in texts((5,), 4)[0].items()}]
    large = [{k: torch.cat([b[k] for b in small]) for k in small[0]}]
    model, _, free = reader()
    other, _, grouped = reader(accumulate=2)
    for batch in free.replay(large):
        free.step(loss_of(model, batch))
    for batch in grouped.replay(small):
        grouped.step(loss_of(other, batch))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4 inside
@pytest.mark.parametrize("backwards", [1, 2])
def test_checkpointed_calls_of_two_shapes_are_moved_again_as_they_were(backwards):
    class Twice(Reader):
        def part(self, words):
            return self.head(self.embedding(words).mean(1))

        def forward(self, words):
            parts = (words, torch.cat([words, words], 1))
            if self.checkpointed:
                return sum(checkpoint(self.part, p, use_reentrant=False) for p in parts)
            return sum(self.part(p) for p in parts)

    results = []
    for checkpointed in (False, True):
        model = Twice()
        model.checkpointed = checkpointed
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        free = FreeAdversarial(eps=0.3, norm="l2", at=model.embedding)
        for batch in free.replay(texts()):
            sgd.zero_grad()
            loss = loss_of(model, batch)
            for again in reversed(range(backwards)):
                loss.backward(retain_graph=again > 0)
            sgd.step()
        results.append([*model.parameters(), *free.state_dict()["delta"]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4 inside
def test_a_reentrant_checkpoint_whose_forward_pass_was_not_moved_is_refused():
    model = Reader()
    free = FreeAdversarial(eps=0.3, at=model.head[0])
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        for batch in free.replay(texts()):
            embedded = model.embedding(batch["words"]).mean(1)
            logits = checkpoint(model.head, embedded, use_reentrant=True)
            functional.cross_entropy(logits, batch["label"]).backward()


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4 inside
def test_a_checkpoint_between_a_step_and_the_next_batch_is_left_alone():
    model, _, free = reader()
    for batch in free.replay(texts((5, 5))):
        free.step(loss_of(model, batch))
        grads = []
        for forward in (
            lambda words: checkpoint(
                lambda w: model.embedding(w).square(), words, use_reentrant=False
            ),
            lambda words: model.embedding.weight[words].square(),
        ):
            model.zero_grad()
            forward(batch["words"]).sum().backward()
            grads.append(model.embedding.weight.grad)
        torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_only_the_newest_object_perturbs_a_module():
    model, _, old = reader(optimizer=False)
    left = iter(old.replay(texts((5,))))
    for batch in left:
        loss_of(model, batch).backward()
        break
    batch = next(left)  # a cell that failed here would keep this iterator alive
    free = FreeAdversarial(eps=0.1, norm="l2", at=model.embedding, start="uniform")
    for batch in free.replay(texts((5,))):
        loss = loss_of(model, batch)
        moved = (free.clean - model.embedding.weight[batch["words"]]).abs().max()
        assert moved == 0
        loss.backward()


def test_the_move_keeps_nothing_for_the_backward_pass():
    model, _, free = reader(bounds=(-9, 9))
    kept = []
    for batch in free.replay(texts((5,))):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model.embedding(batch["words"])
        assert [t.dtype for t in kept] == [torch.int64]  # the words, for the embedding
        free.step(loss_of(model, batch))


def test_what_is_kept_of_an_object_that_is_gone_is_nothing():
    model, _, free = reader()
    for batch in free.replay(texts((5,))):
        free.step(loss_of(model, batch))
    delta = weakref.ref(delta_of(free))
    del free
    gc.collect()
    assert delta() is None


def test_a_loader_may_run_the_module_itself():
    model, _, free = reader()

    def source():
        for batch in texts():
            assert torch.equal(model(batch["words"]), plain(model, batch["words"]))
            yield batch

    for batch in free.replay(source()):
        free.step(loss_of(model, batch))


def test_what_is_kept_of_the_latest_output_has_no_graph():
    model, _, free = reader()
    for batch in free.replay(texts((5,))):
        free.step(loss_of(model, batch))
        assert not free.clean.requires_grad


def test_a_step_that_fails_and_is_tried_again_moves_the_same_rows():
    class Sgd(torch.optim.SGD):
        broken = False

        def step(self):
            if self.broken:
                raise InterruptedError
            super().step()

    runs = []
    for broken in (False, True):
        model = Reader()
        optimizer = Sgd(model.parameters(), 0.1)
        free = FreeAdversarial(optimizer, eps=0.3, replays=2, at=model.embedding)
        for batch in free.replay(texts()):
            if broken:
                optimizer.broken = True
                with pytest.raises(InterruptedError):
                    free.step(loss_of(model, batch))
                optimizer.broken = False
            free.step(loss_of(model, batch))
        runs.append([*model.parameters(), *free.state_dict()["delta"]])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("copied", [False, True])
def test_checkpoints_in_micro_batches_train_as_without(copied):
    results = []
    for checkpointed in (False, True):
        model, _, free = reader(accumulate=2)

        def run(words, model=model, checkpointed=checkpointed):
            words = words.clone() if copied else words
            return checkpoint(model, words, use_reentrant=False) if checkpointed else model(words)

        for batch in free.replay(texts((5, 5, 5))):
            free.step(functional.cross_entropy(run(batch["words"]), batch["label"]))
        results.append([*model.parameters()])
    assert all(map(torch.equal, *results))
