"""Frameworks that are no dependency of the tests: trained as their users train, they end where Algorithm 1 ends.

docs/contributing.md has the line that installs them; what is missing is skipped.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from free_adv import FreeAdversarial
from tests.reference import batches, network

pytestmark = pytest.mark.slow

EPS, EPOCHS, LR = 0.1, 2, 0.1
SIZES = (8, 8, 3)
FREE = {"replays": 3}
N_FGSM = {"replays": 1, "ascents": 1, "start": "zero", "noise": 2}
both = pytest.mark.parametrize("way", [FREE, N_FGSM], ids=["Free", "N-FGSM"])


def needs(name):
    """The framework, or a skip; what it warns of while it is imported is its own affair."""
    return pytest.importorskip(name, reason=f"{name} is not installed: see docs/contributing.md")


def sgd(model):
    return torch.optim.SGD(model.parameters(), LR, momentum=0.9)


def free_for(model, way, **arguments):
    """As a user has it: the recommended setting has an objective, the paper's has none."""
    if way.get("ascents"):
        arguments.setdefault("objective", lambda b: functional.cross_entropy(model(b[0]), b[1]))
    return FreeAdversarial(eps=EPS, **way, **arguments)


def written_out(
    loss_of,
    optimizer,
    loader,
    way,
    *,
    eps=EPS,
    bounds=(0, 1),
    epochs=EPOCHS,
    clip=None,
    size=None,
):
    """Algorithm 1 of the paper, and N-FGSM, in plain torch, over pairs of an input and what belongs to it."""
    first = loader[0][0]
    delta = torch.zeros(size or len(first), *first.shape[1:], dtype=first.dtype)

    def leaf(x, d):
        return (x + d if bounds is None else (x + d).clamp(*bounds)).requires_grad_()

    def climb(d, grad):
        d.add_(eps * grad.sign()).clamp_(-eps, eps)

    for _ in range(epochs):
        for x, y in loader:
            d = delta[: len(x)]
            if way.get("start") == "zero":
                d.zero_()
            beside = torch.zeros_like(d)
            if way.get("noise"):
                beside.uniform_(-way["noise"] * eps, way["noise"] * eps)
            for _ in range(way.get("ascents", 0)):
                z = leaf(x, d + beside)
                climb(d, torch.autograd.grad(loss_of(z, y), z)[0])
            for _ in range(way["replays"]):
                z = leaf(x, d + beside)
                optimizer.zero_grad()
                loss_of(z, y).backward()
                if clip:
                    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
                optimizer.step()
                climb(d, z.grad)


def algorithm_1(way):
    """The small network of the tests, trained by hand."""
    model = network()
    torch.manual_seed(1)
    written_out(lambda x, y: functional.cross_entropy(model(x), y), sgd(model), batches(SIZES), way)
    return model


def dataset():
    """What the loop by hand reads, as a dataset of single images."""
    return TensorDataset(*(torch.cat(parts) for parts in zip(*batches(SIZES), strict=True)))


def loader():
    """Its minibatches; it takes no seed from the random numbers that noise comes from."""
    return DataLoader(dataset(), batch_size=8, generator=torch.Generator())


def agree(model, reference, tolerance=0.0):
    mine, theirs = list(model.parameters()), list(reference.parameters())
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def test_the_loops_by_hand_would_differ_without_the_adversary():
    natural = {"replays": 1, "start": "zero"}
    models = [algorithm_1(way) for way in (natural, {"replays": 3, "start": "zero"}, FREE, N_FGSM)]
    vectors = [nn.utils.parameters_to_vector(m.parameters()) for m in models]
    for i, one in enumerate(vectors):
        for other in vectors[:i]:
            assert (one - other).abs().max() > 1e-3


# The loader is wrapped, where the user makes it.


@both
def test_skorch_ends_at_the_weights_of_algorithm_1(way):
    skorch = needs("skorch")
    model = network()
    free = free_for(model, way)
    net = skorch.NeuralNetClassifier(
        model,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        lr=LR,
        max_epochs=EPOCHS,
        batch_size=8,
        train_split=None,
        iterator_train=lambda data, **k: free.replay(DataLoader(data, **k)),
        iterator_train__generator=torch.Generator(),
        verbose=0,
    )
    net.initialize()
    torch.manual_seed(1)
    net.partial_fit(*(t.numpy() for t in dataset().tensors))
    agree(net.module_, algorithm_1(way))


@both
def test_poutyne_ends_at_the_weights_of_algorithm_1(way):
    poutyne = needs("poutyne")
    model = network()
    free = free_for(model, way)
    host = poutyne.Model(model, sgd(model), nn.CrossEntropyLoss())
    torch.manual_seed(1)
    host.fit_generator(free.replay(loader()), epochs=EPOCHS, verbose=False)
    agree(model, algorithm_1(way))


@both
def test_monai_ends_at_the_weights_of_algorithm_1(way):
    engines, data = needs("monai.engines"), needs("monai.data")
    transforms = needs("monai.transforms")
    items = [{"image": x, "label": y} for x, y in dataset()]
    images = data.Dataset(items, transforms.EnsureTyped(keys="image"))
    model = network()
    free = free_for(
        model,
        way,
        key="image",
        objective=lambda b: functional.cross_entropy(model(b["image"]), b["label"]),
    )
    trainer = engines.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=EPOCHS,
        train_data_loader=free.replay(
            data.DataLoader(images, batch_size=8, generator=torch.Generator())
        ),
        network=model,
        optimizer=sgd(model),
        loss_function=nn.CrossEntropyLoss(),
    )
    torch.manual_seed(1)
    trainer.run()
    agree(model, algorithm_1(way))


@both
def test_a_loop_over_graphs_of_pyg_ends_at_the_weights_of_algorithm_1(way):
    data, loaders, layers = (needs(f"torch_geometric.{n}") for n in ("data", "loader", "nn"))

    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(7)
            self.one, self.two = layers.GCNConv(3, 8), nn.Linear(8, 4)

        def forward(self, x, graphs):
            x = self.one(x, graphs.edge_index).relu()
            return self.two(layers.global_mean_pool(x, graphs.batch, size=graphs.num_graphs))

    def graph(nodes):
        ring = torch.arange(nodes)
        edges = torch.stack([ring, ring.roll(1)])
        return data.Data(torch.randn(nodes, 3), edges, y=torch.randint(0, 4, (1,)))

    graphs = [graph(n) for n in (6, 5, 4, 4, 5, 3, 2)]
    loader = loaders.DataLoader(graphs, batch_size=3, generator=torch.Generator())
    model, twin = Graphs(), Graphs()

    def loss_of(batch):
        return functional.cross_entropy(model(batch.x, batch), batch.y)

    free = free_for(model, way, key="x", bounds=None, objective=loss_of)
    optimizer = sgd(model)
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for batch in free.replay(loader):
            optimizer.zero_grad()
            loss_of(batch).backward()
            optimizer.step()
    torch.manual_seed(1)
    written_out(
        lambda x, batch: functional.cross_entropy(twin(x, batch), batch.y),
        sgd(twin),
        [(batch.x, batch) for batch in loader],
        way,
        bounds=None,
    )
    agree(model, twin)


@both
def test_a_loop_with_segmentation_models_pytorch_ends_at_the_weights_of_algorithm_1(way):
    smp = needs("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 4))
    twin = copy.deepcopy(model)
    dice = smp.losses.DiceLoss("binary")
    loader = [(torch.rand(4, 3, 32, 32), (torch.rand(4, 1, 32, 32) > 0.5).float()) for _ in "12"]
    free = free_for(model, way, objective=lambda b: dice(model(b[0]), b[1]))
    optimizer = sgd(model)
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for images, masks in free.replay(loader):
            optimizer.zero_grad()
            dice(model(images), masks).backward()
            optimizer.step()
    torch.manual_seed(1)
    written_out(lambda x, y: dice(twin(x), y), sgd(twin), loader, way)
    agree(model, twin)


# The host makes the loader: the method that returns it is overridden.


@pytest.mark.filterwarnings("ignore:No loggers specified")
@both
def test_avalanche_ends_at_the_weights_of_algorithm_1(way):
    supervised = needs("avalanche.training.supervised")
    benchmarks, utils = needs("avalanche.benchmarks"), needs("avalanche.benchmarks.utils")
    plugins = needs("avalanche.training.plugins")
    data = dataset()
    data.targets = data.tensors[1].tolist()  # as torchvision's have
    model = network()
    quiet = way | {
        "noise": 0
    }  # the loader's seeds are drawn from the random numbers that noise comes from
    free = free_for(model, quiet)

    class FreeNaive(supervised.Naive):
        def make_train_dataloader(self, **kwargs):
            super().make_train_dataloader(**kwargs)
            self.dataloader = free.replay(self.dataloader)

    stream = benchmarks.benchmark_from_datasets(
        train=[utils.as_classification_dataset(data, transform_groups=None)]
    ).train_stream
    strategy = FreeNaive(
        model=model,
        optimizer=sgd(model),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=EPOCHS,
        evaluator=plugins.EvaluationPlugin(),
    )
    torch.manual_seed(1)
    for experience in stream:
        strategy.train(experience, shuffle=False)
    agree(model, algorithm_1(quiet))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@both
def test_darts_ends_at_the_weights_of_algorithm_1(way):
    darts, models = needs("darts"), needs("darts.models")
    lightning = needs("pytorch_lightning")
    before = {}

    class FreeTrainer(lightning.Trainer):
        def fit(self, model, datamodule, **kwargs):
            loader = datamodule.train_dataloader()
            before["model"], before["layer"] = model, copy.deepcopy(model.layer)
            before["loader"] = [(b.past_target, b.future_target) for b in loader]
            torch.manual_seed(1)
            super().fit(model, free.replay(loader), **kwargs)

    def loss_of(batch):
        output = before["model"](batch.to_module_input()).prediction[..., 0]
        return functional.mse_loss(output, batch.future_target)

    free = FreeAdversarial(eps=EPS, key="past_target", bounds=None, objective=loss_of, **way)
    forecaster = models.NLinearModel(
        input_chunk_length=8,
        output_chunk_length=2,
        normalize=False,
        batch_size=8,
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": LR, "momentum": 0.9},
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = FreeTrainer(accelerator="cpu", max_epochs=EPOCHS, enable_model_summary=False, **quiet)
    forecaster.fit(
        darts.TimeSeries.from_values(torch.rand(40, 1).numpy()),
        trainer=trainer,
        dataloader_kwargs={"shuffle": False, "pin_memory": False, "generator": torch.Generator()},
    )
    twin = before["layer"]
    torch.manual_seed(1)
    written_out(
        lambda x, y: functional.mse_loss(twin(x.flatten(1)), y.flatten(1)),
        sgd(twin),
        before["loader"],
        way,
        bounds=None,
    )
    agree(forecaster.model.layer, twin)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@both
def test_the_sft_trainer_of_trl_with_lora_ends_at_the_weights_of_algorithm_1(way, tmp_path):
    trl, peft, datasets = needs("trl"), needs("peft"), needs("datasets")
    transformers, tokenizers = needs("transformers"), needs("tokenizers")
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    texts = torch.randint(2, len(words), (11, 6)).tolist()
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).double()
    lora = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    twin = peft.get_peft_model(copy.deepcopy(model), lora)
    embed = model.get_input_embeddings()
    quiet = way | {"noise": 0}  # as for avalanche
    free = FreeAdversarial(eps=EPS, at=embed, **quiet, objective=lambda b: trainer.model(**b).loss)

    class FreeTrainer(trl.SFTTrainer):
        def get_train_dataloader(self):
            return free.replay(super().get_train_dataloader())

    trainer = FreeTrainer(
        model,
        trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            num_train_epochs=EPOCHS,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": texts}),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.optimizer = sgd(trainer.model)
    twin.load_state_dict(trainer.model.state_dict())
    loader = [torch.tensor(texts[i : i + 4]) for i in range(0, len(texts), 4)]
    torch.manual_seed(1)
    trainer.train()

    def loss_of(x, ids):
        scores = twin(inputs_embeds=x, attention_mask=torch.ones_like(ids)).logits
        return functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    moved = twin.get_input_embeddings()
    pairs = [(moved.forward(ids).detach(), ids) for ids in loader]
    torch.manual_seed(1)
    written_out(loss_of, sgd(twin), pairs, quiet, bounds=None)
    agree(trainer.model, twin, tolerance=1e-6)  # its loss is made chunk by chunk


# The replay is inside the step.


@both
def test_the_auto_unit_of_torchtnt_ends_at_the_weights_of_algorithm_1(way):
    framework = needs("torchtnt.framework")
    units = needs("torchtnt.framework.auto_unit")
    model = network()
    free = free_for(model, way)

    class FreeUnit(units.AutoUnit):
        def compute_loss(self, state, data):
            output = self.module(data[0])
            return functional.cross_entropy(output, data[1]), output

        def configure_optimizers_and_lr_scheduler(self, module):
            return sgd(module), None

        def train_step(self, state, data):
            for batch in free.replay([data]):
                result = super().train_step(state, batch)
            return result

    torch.manual_seed(1)
    unit = FreeUnit(module=model, device=torch.device("cpu"))
    framework.train(unit, loader(), max_epochs=EPOCHS)
    agree(model, algorithm_1(way))


@both
def test_keras_ends_at_the_weights_of_algorithm_1(way, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = needs("keras")
    net = network()
    free = free_for(net, way)

    class FreeModel(keras.Sequential):
        def train_step(self, data):
            for batch in free.replay([data]):
                logs = super().train_step(batch)
            return logs

    model = FreeModel([keras.Input((2, 5, 5)), keras.layers.TorchModuleWrapper(net)])
    model.compile(
        optimizer=keras.optimizers.SGD(LR, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    torch.manual_seed(1)
    model.fit(loader(), epochs=EPOCHS, shuffle=False, verbose=0)
    agree(net, algorithm_1(way), tolerance=1e-6)


# The perturbation is inside the model.


@pytest.mark.filterwarnings("ignore:Cannot split tensor")  # Composer's, of the short last batch
@both
def test_composer_ends_at_the_weights_of_algorithm_1(way):
    composer = needs("composer")
    models = needs("composer.models")
    net = nn.Sequential(nn.Identity(), *network())
    free = free_for(net, way, at=net[0], bounds=(0, 1))
    trainer = composer.Trainer(
        model=models.ComposerClassifier(net, num_classes=4),
        train_dataloader=free.replay(loader()),
        optimizers=sgd(net),
        max_duration=f"{EPOCHS}ep",
        device="cpu",
        progress_bar=False,
    )
    torch.manual_seed(1)
    trainer.fit()
    agree(net, algorithm_1(way))
