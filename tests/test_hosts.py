"""Frameworks that own the training loop: with the loader wrapped they end where Algorithm 1 ends."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from free_adv import FreeAdversarial, ThreatModel, evaluate
from tests.internals import ascents
from tests.reference import batches, network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # lightning 2.6 with torch 2.15
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # lightning's advice
]

EPS, M, EPOCHS, LR = 0.1, 3, 2, 0.1
SIZES = (8, 8, 3)  # with two micro-batches per update, the last group is short


def algorithm_1(
    k=1, sizes=SIZES, clip=None, *, ahead=False, shrink=False, autocast=None, turns=1, climbs=0
):
    """The paper's loop with k micro-batches per update, each slot of a window of `turns` groups with its own delta.

    Before its first replay a micro-batch `climbs` by the gradient of its input alone. A host counts its micro-batches through the epoch and updates after k of them, or at the end; it takes
    those of one update `ahead`, or each when it comes, and divides the loss by k or, if the last update
    has fewer and it does not `shrink` that one, by their number.
    """
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    deltas = [torch.zeros(max(sizes), 2, 5, 5) for _ in range(k * turns)]
    loader = batches(sizes)
    for _ in range(EPOCHS):
        groups = [loader[i : i + k * turns] for i in range(0, len(loader), k * turns)]
        order = [(t, *slot) for group in groups for t in range(M) for slot in enumerate(group)]
        for first in range(0, len(order), k):
            window = [slot for _, *slot in order[first : first + k]]
            for turn, slot, (x, y) in order[first : first + k]:
                for _ in range(climbs if turn == 0 else 0):
                    delta = deltas[slot][: len(x)]
                    x_adv = (x + delta).clamp(0, 1).requires_grad_()
                    with torch.autocast("cpu", autocast, enabled=autocast is not None):
                        loss = functional.cross_entropy(model(x_adv), y)
                    (grad,) = torch.autograd.grad(loss, x_adv)
                    delta.add_(EPS * grad.sign()).clamp_(-EPS, EPS)
            held = [(x + deltas[slot][: len(x)]).clamp(0, 1) for slot, (x, _) in window]
            for (slot, (x, y)), x_adv in zip(window, held, strict=True):
                delta = deltas[slot][: len(x)]
                if not ahead:
                    x_adv = (x + delta).clamp(0, 1)
                x_adv.requires_grad_()
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = functional.cross_entropy(model(x_adv), y)
                (loss / (k if shrink else len(window))).backward()
                delta.add_(EPS * x_adv.grad.sign()).clamp_(-EPS, EPS)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def agree(model, reference, tolerance=0):
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=0)


def all_taken_in(free, taken, sizes=SIZES):
    free.state_dict()  # the gradient of the very last replay is taken in when somebody asks
    assert len(taken) == len(sizes) * M * EPOCHS


# Lightning, with automatic optimisation.


def lightning(free, k=1, model=None, **arguments):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model or network()

        def training_step(self, batch, index):
            x, y = batch
            return functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), LR, momentum=0.9)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        accumulate_grad_batches=k,
        enable_model_summary=False,
        **quiet,
        **arguments,
    )
    trainer.fit(module, free.replay(batches(SIZES)))
    return module.net


@pytest.mark.parametrize(
    ("k", "clip", "turns"), [(1, None, 1), (2, None, 1), (1, 0.05, 1), (1, None, 2), (2, None, 2)]
)
def test_lightning_ends_at_the_weights_of_algorithm_1(k, clip, turns):
    free = FreeAdversarial(eps=EPS, replays=M, accumulate=k, window=turns)
    taken = ascents(free)
    model = lightning(free, k, gradient_clip_val=clip)
    agree(model, algorithm_1(k, clip=clip, shrink=True, turns=turns))
    all_taken_in(free, taken)


def test_a_data_module_of_lightning_is_refused_with_the_loader_to_wrap():
    module = pytest.importorskip("lightning").LightningDataModule()
    with pytest.raises(
        TypeError, match=r"got LightningDataModule: wrap what its train_dataloader\("
    ):
        FreeAdversarial(eps=EPS).replay(module)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_trains_in_mixed_precision(precision):
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    free = FreeAdversarial(eps=EPS, replays=M)
    taken = ascents(free)
    if precision == "16-mixed":  # on the CPU it would take bfloat16 unless told otherwise
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = plugins.MixedPrecision(precision, device="cpu", scaler=scaler)
        model = lightning(free, plugins=[plugin])
    else:
        model = lightning(free, precision=precision)
    autocast = torch.float16 if precision == "16-mixed" else torch.bfloat16
    agree(model, algorithm_1(autocast=autocast), tolerance=1e-6)
    all_taken_in(free, taken)


# Accelerate.


def accelerated(free, k=1, sizes=SIZES, model=None, **arguments):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=k, **arguments)
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    loader = DataLoader(batches(sizes), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loader = free.replay(loader)
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("sizes", [SIZES, (8, 8, 8, 3)], ids=["short group", "full groups"])
@pytest.mark.parametrize(("k", "turns"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_accelerate_ends_at_the_weights_of_algorithm_1(k, turns, sizes):
    free = FreeAdversarial(eps=EPS, replays=M, accumulate=k, window=turns)
    taken = ascents(free)
    agree(accelerated(free, k, sizes), algorithm_1(k, sizes, shrink=True, turns=turns))
    all_taken_in(free, taken, sizes)


def test_accelerate_saves_and_loads_the_state(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def made():
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
        loader = DataLoader(batches(SIZES), batch_size=None)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        free = FreeAdversarial(eps=EPS, replays=M)
        accelerator.register_for_checkpointing(free)
        return accelerator, model, optimizer, loader, free

    def train(accelerator, model, optimizer, loader, free):
        for x, y in free.replay(loader):
            accelerator.backward(functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()

    first = made()
    train(*first)
    first[0].save_state(tmp_path)
    train(*first)
    second = made()
    second[0].load_state(tmp_path)
    train(*second)
    agree(second[1], first[1], tolerance=0)
    assert torch.equal(second[4].delta, first[4].delta)


# The Trainer of transformers.


class Classifier(nn.Module):
    def __init__(self, net=None):
        super().__init__()
        self.net = net or network()

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def transformers_trainer(free, path, k=1, model=None, **arguments):
    transformers = pytest.importorskip("transformers")

    class FreeTrainer(transformers.Trainer):
        def get_train_dataloader(self):
            return free.replay(super().get_train_dataloader())

    data = [
        {"pixel_values": image, "labels": label}
        for x, y in batches(SIZES)
        for image, label in zip(x, y, strict=True)
    ]
    settings = transformers.TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=k,
        num_train_epochs=EPOCHS,
        lr_scheduler_type="constant",
        learning_rate=LR,
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **arguments,
    )
    model = model or Classifier()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    trainer = FreeTrainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    return model.net


@pytest.mark.parametrize(("k", "turns"), [(1, 1), (2, 1), (2, 2)])
def test_the_trainer_of_transformers_ends_at_the_weights_of_algorithm_1(k, turns, tmp_path):
    free = FreeAdversarial(eps=EPS, replays=M, accumulate=k, window=turns, key="pixel_values")
    taken = ascents(free)
    model = transformers_trainer(free, tmp_path, k)
    agree(model, algorithm_1(k, ahead=True, turns=turns))
    all_taken_in(free, taken)


def test_the_trainer_of_transformers_trains_in_bfloat16(tmp_path):
    free = FreeAdversarial(eps=EPS, replays=M, key="pixel_values")
    taken = ascents(free)
    model = transformers_trainer(free, tmp_path, bf16=True)
    agree(model, algorithm_1(autocast=torch.bfloat16), tolerance=1e-6)
    all_taken_in(free, taken)


def test_accelerate_trains_in_bfloat16():
    state = pytest.importorskip("accelerate").state.AcceleratorState
    state._reset_state(True)  # it is one for the whole process
    free = FreeAdversarial(eps=EPS, replays=M)
    taken = ascents(free)
    model = accelerated(free, mixed_precision="bf16")
    state._reset_state(True)
    agree(model, algorithm_1(autocast=torch.bfloat16), tolerance=1e-6)
    all_taken_in(free, taken)


# Ignite, and fastai with its own image type.


def test_ignite_ends_at_the_weights_of_algorithm_1():
    engine = pytest.importorskip("ignite.engine")
    free = FreeAdversarial(eps=EPS, replays=M)
    taken = ascents(free)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    trainer = engine.create_supervised_trainer(model, optimizer, functional.cross_entropy)
    trainer.run(free.replay(batches(SIZES)), max_epochs=EPOCHS)
    agree(model, algorithm_1())
    all_taken_in(free, taken)


@pytest.mark.filterwarnings("ignore")  # fastai's own
def test_fastai_ends_at_the_weights_of_algorithm_1():
    vision = pytest.importorskip("fastai.vision.all")
    free = FreeAdversarial(eps=EPS, replays=M, bounds=(0, 1))
    taken = ascents(free)
    model = network()
    loader = [(vision.TensorImage(x), vision.TensorCategory(y)) for x, y in batches(SIZES)]

    class Loader(DataLoader):
        """A loader of fastai gives images of its own type."""

        def __iter__(self):
            return iter(loader)

        def __len__(self):
            return len(loader)

    replay = free.replay(Loader(loader, batch_size=None))
    data = vision.DataLoaders(replay, Loader(loader, batch_size=None))
    sgd = vision.partial(vision.OptimWrapper, opt=torch.optim.SGD, momentum=0.9)
    learner = vision.Learner(
        data, model, loss_func=functional.cross_entropy, opt_func=sgd, cbs=[], train_bn=True
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(EPOCHS, LR, wd=0.0)
    agree(model, algorithm_1(), tolerance=1e-6)
    all_taken_in(free, taken)


# Fabric, and the train.py of timm.


@pytest.mark.parametrize("climbs", [0, 2])
def test_fabric_ends_at_the_weights_of_algorithm_1(climbs):
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    free = FreeAdversarial(eps=EPS, replays=M, ascents=climbs, objective=climbed(model))
    taken = ascents(free)
    loader = fabric.setup_dataloaders(DataLoader(batches(SIZES), batch_size=None))
    for _ in range(EPOCHS):
        for x, y in free.replay(loader):
            optimizer.zero_grad()
            fabric.backward(functional.cross_entropy(model(x), y))
            optimizer.step()
    agree(model, algorithm_1(climbs=climbs))
    free.state_dict()
    assert len(taken) == len(SIZES) * (M + climbs) * EPOCHS


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_pieces_of_timms_training_script_end_at_the_weights_of_algorithm_1(autocast):
    utils = pytest.importorskip("timm.utils")
    optim = pytest.importorskip("timm.optim")
    model = network()
    optimizer = optim.create_optimizer_v2(model, "momentum", lr=LR, weight_decay=0, momentum=0.9)

    def loss_of(batch):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return functional.cross_entropy(model(batch[0]), batch[1])

    free = FreeAdversarial(eps=EPS, replays=M, ascents=2, objective=loss_of)
    scaler = utils.NativeScaler("cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", enabled=False)
    average, updates = utils.ModelEmaV3(model, decay=0.9), 0
    for _ in range(EPOCHS):
        for batch in free.replay(batches(SIZES)):
            loss = loss_of(batch)
            scaler(loss, optimizer, parameters=model.parameters(), create_graph=False)
            optimizer.zero_grad()
            updates += 1
            average.update(model, step=updates)
    tolerance = 0 if autocast is None else 1e-6
    agree(model, algorithm_1(climbs=2, autocast=autocast), tolerance)


# An objective, in the hosts.


def climbed(model):
    """What the ascents climb, written as the loop's own loss."""
    return lambda batch: functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(("k", "turns"), [(1, 1), (2, 1), (2, 2)])
def test_lightning_climbs_before_each_minibatch(k, turns):
    model = network()
    how = {"accumulate": k, "window": turns, "ascents": 2, "objective": climbed(model)}
    trained = lightning(FreeAdversarial(eps=EPS, replays=M, **how), k, model)
    agree(trained, algorithm_1(k, shrink=True, turns=turns, climbs=2))


@pytest.mark.parametrize(("k", "turns"), [(1, 1), (2, 1), (2, 2)])
def test_accelerate_climbs_before_each_minibatch(k, turns):
    model = network()
    how = {"accumulate": k, "window": turns, "ascents": 2, "objective": climbed(model)}
    trained = accelerated(FreeAdversarial(eps=EPS, replays=M, **how), k, model=model)
    agree(trained, algorithm_1(k, shrink=True, turns=turns, climbs=2))


@pytest.mark.parametrize(("k", "turns"), [(1, 1), (2, 1), (2, 2)])
def test_the_trainer_of_transformers_climbs_before_each_minibatch(k, turns, tmp_path):
    model = Classifier()
    how = {"accumulate": k, "window": turns, "ascents": 2, "key": "pixel_values"}
    how["objective"] = lambda batch: model(**batch)["loss"]
    free = FreeAdversarial(eps=EPS, replays=M, **how)
    trained = transformers_trainer(free, tmp_path, k, model)
    agree(trained, algorithm_1(k, ahead=True, turns=turns, climbs=2))


def test_hosts_climb_in_the_precision_in_which_they_train(tmp_path):
    """Accelerate and the Trainer patch the model; Lightning opens autocast round its own step only."""
    state = pytest.importorskip("accelerate").state.AcceleratorState
    reference = algorithm_1(autocast=torch.bfloat16, climbs=1)
    how = {"eps": EPS, "replays": M, "ascents": 1}
    models = {name: network() for name in ("accelerate", "lightning")}
    state._reset_state(True)
    free = FreeAdversarial(objective=climbed(models["accelerate"]), **how)
    trained = [accelerated(free, model=models["accelerate"], mixed_precision="bf16")]
    state._reset_state(True)

    def in_autocast(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return climbed(models["lightning"])(batch)

    free = FreeAdversarial(objective=in_autocast, **how)
    trained.append(lightning(free, model=models["lightning"], precision="bf16-mixed"))
    model = Classifier()
    free = FreeAdversarial(
        objective=lambda batch: model(**batch)["loss"], key="pixel_values", **how
    )
    trained.append(transformers_trainer(free, tmp_path, model=model, bf16=True))
    for model in trained:
        agree(model, reference, tolerance=1e-6)


# What bites in all of them.


def test_a_loader_without_a_length_is_refused_where_lightning_looks_ahead():
    pytest.importorskip("lightning")
    free = FreeAdversarial(eps=EPS, replays=M)

    class Unsized:
        def __iter__(self):
            return iter(batches(SIZES))

    replay = free.replay
    object.__setattr__(free, "replay", lambda loader: replay(Unsized()))
    with pytest.raises(RuntimeError, match="a wrapper round the replay that takes batches ahead"):
        lightning(free)


def test_the_models_of_the_hosts_would_differ_without_the_adversary():
    assert not torch.allclose(
        algorithm_1().get_parameter("0.weight"), network().get_parameter("0.weight"), atol=1e-2
    )
    weights = [p for k in (1, 2) for p in [algorithm_1(k).get_parameter("0.weight")]]
    assert not torch.allclose(*weights, atol=1e-3)


# The best checkpoint by robust accuracy.

PASSES, NATURAL, RADIUS, RATE = 6, 3, 0.2, 0.1  # from epoch 3 on training is natural
DIGITS = ThreatModel(RADIUS, mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits, normalised: 400 to train on and 200 to choose by."""
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    data = TensorDataset(x, torch.tensor(labels))
    return Subset(data, range(400)), Subset(data, range(400, 600))


def of_digits():
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 16, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))


def free_of_digits(**arguments):
    """One gradient of the input before each update, until somebody takes eps away."""
    return FreeAdversarial(
        eps=RADIUS,
        mean=DIGITS.mean,
        std=DIGITS.std,
        replays=1,
        ascents=1,
        start="zero",
        noise=1,
        **arguments,
    )


def judged(net, loaders):
    """Accuracy, clean and robust, over loaders of as many images, and a copy of the weights."""
    found = [evaluate(net, loader, DIGITS, steps=5, progress=False) for loader in loaders]
    clean, robust = (
        sum(f) / len(found) for f in zip(*((f.clean, f.robust) for f in found), strict=False)
    )
    return clean, robust, copy.deepcopy(net.state_dict())


def the_most_robust(epochs):
    """The number and the weights of that epoch, which is not the last one, nor the best on clean images."""
    clean, robust, weights = zip(*epochs, strict=True)
    best = robust.index(max(robust))
    assert len(epochs) == PASSES
    assert best < NATURAL
    assert clean[best] < max(clean)
    return best, weights[best]


def test_lightnings_best_checkpoint_is_that_of_the_epoch_with_the_best_robust_accuracy(
    digits, tmp_path
):
    lightning = pytest.importorskip("lightning")
    train, held_out = digits[0], DataLoader(digits[1], 100)
    epochs = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = of_digits()

        def training_step(self, batch, index):
            x, y = batch
            return functional.cross_entropy(self.net(x), y)

        def validation_step(self, batch, index):
            found = evaluate(self.net, [batch], DIGITS, steps=5, progress=False)
            self.log("robust", found.robust, batch_size=found.count, sync_dist=True)

        def on_train_epoch_start(self):
            if self.current_epoch == NATURAL:
                free.eps = 1e-6

        def on_train_epoch_end(self):
            epochs.append(judged(self.net, [[batch] for batch in held_out]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    free = free_of_digits(objective=lambda batch: module.training_step(batch, 0))
    best = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="robust", mode="max")
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=PASSES, callbacks=[best], **quiet)
    loader = DataLoader(train, 20, shuffle=True)
    trainer.fit(module, free.replay(loader), held_out)
    epoch, weights = the_most_robust(epochs)
    kept = torch.load(best.best_model_path, weights_only=True)
    assert kept["epoch"] == epoch
    for name, value in weights.items():
        assert torch.equal(kept["state_dict"][f"net.{name}"], value)
    with pytest.raises(RuntimeError, match=r"in Lightning, Trainer\(inference_mode=False\)"):
        trainer.validate(module, held_out, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu", inference_mode=False, enable_checkpointing=False, **quiet
    )
    module.net.load_state_dict(weights)
    (found,) = trainer.validate(module, held_out, verbose=False)
    assert found["robust"] == pytest.approx(epochs[epoch][1])


def test_the_trainers_best_checkpoint_is_that_of_the_epoch_with_the_best_robust_accuracy(
    digits, tmp_path
):
    transformers = pytest.importorskip("transformers")
    held_out = DataLoader(digits[1], 100)
    epochs, model = [], Classifier(of_digits())
    free = free_of_digits(key="pixel_values", objective=lambda batch: model(**batch)["loss"])

    class Robust(transformers.Trainer):
        def get_train_dataloader(self):
            return free.replay(super().get_train_dataloader())

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            pairs = ((b["pixel_values"], b["labels"]) for b in self.get_eval_dataloader())
            logits = lambda x: model(pixel_values=x)["logits"]  # noqa: E731
            found = evaluate(logits, pairs, DIGITS, steps=5, progress=False)
            self.log({"eval_robust": found.robust})
            return metrics | {"eval_robust": found.robust}

    class Watch(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if round(state.epoch) == NATURAL:
                free.eps = 1e-6

        def on_epoch_end(self, args, state, control, **kwargs):
            epochs.append(judged(model.net, [held_out]))

    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=20,
        per_device_eval_batch_size=100,
        num_train_epochs=PASSES,
        eval_strategy="epoch",
        save_strategy="epoch",
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        metric_for_best_model="robust",
        report_to=[],
        disable_tqdm=True,
    )
    data = [[{"pixel_values": x, "labels": y} for x, y in part] for part in digits]
    trainer = Robust(
        model,
        settings,
        train_dataset=data[0],
        eval_dataset=data[1],
        callbacks=[Watch()],
        optimizers=(torch.optim.SGD(model.parameters(), RATE, momentum=0.9), None),
    )
    trainer.train()
    epoch, weights = the_most_robust(epochs)
    assert trainer.state.best_metric == epochs[epoch][1]
    assert trainer.state.best_model_checkpoint.endswith(f"-{(epoch + 1) * 20}")
    for name, value in weights.items():
        assert torch.equal(trainer.model.net.state_dict()[name], value)
    robust = [e["eval_robust"] for e in trainer.state.log_history if "eval_robust" in e]
    assert robust == [found for _, found, _ in epochs]
