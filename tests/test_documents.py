"""Every snippet that a reader can copy runs, and the texts hold to what they promise."""

import ast
import copy
import functools
import importlib.util
import inspect
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import accelerate
import lightning
import losses
import pytest
import timm
import torch
import transformers
import tutorial
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset
from torch import distributed

from free_adv import FreeAdversarial, evaluate, pgd

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [str(p.relative_to(ROOT)) for p in FILES if "_build" not in p.parts]
GUIDE = [page for page in PAGES if page.startswith("docs/guide/")]


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.M | re.S)
    return [textwrap.dedent(block) for _, block in found]


class Images(torch.utils.data.Dataset):
    """Sixteen random images of ten classes; for the Trainer as it likes them."""

    def __init__(self, names=None):
        self.names = names

    def __len__(self):
        return 16

    def __getitem__(self, index):
        x, y = torch.rand(3, 8, 8), index % 10
        return dict(zip(self.names, (x, y), strict=True)) if self.names else (x, y)


def reader():
    """What somebody with a training script has before the first line of a snippet."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    return {
        "FreeAdversarial": FreeAdversarial,
        "torch": torch,
        "device": torch.device("cpu"),
        "epochs": 8,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "criterion": torch.nn.CrossEntropyLoss(),
        "loader": [(torch.rand(4, 3, 8, 8), torch.arange(4)) for _ in range(2)],
    }


# What a page's host brings along, beside that.


def of_timm(names, folder):
    for label in range(2):
        (folder / str(label)).mkdir()
        for i in range(4):
            image = torch.randint(256, (40, 40, 3), dtype=torch.uint8)
            Image.fromarray(image.numpy()).save(folder / str(label) / f"{i}.jpg")
    names["timm"], names["model"] = timm, timm.create_model("test_resnet", num_classes=2)
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), 0.1)
    names["dataset"] = create_dataset("", root=str(folder))
    names["settings"] = {
        "input_size": (3, 32, 32),
        "batch_size": 4,
        "is_training": True,
        "use_prefetcher": False,
        "num_workers": 0,
    }
    settings = names["settings"] | {"is_training": False}
    config = timm.data.resolve_model_data_config(names["model"])
    config = {name: config[name] for name in ("mean", "std")}
    names["test_loader"] = timm.data.create_loader(
        create_dataset("", str(folder)), **config, **settings
    )


def of_lightning(names, folder):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = names["model"]

        def training_step(self, batch, index):
            return names["criterion"](self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return names["optimizer"]

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    names["Trainer"] = functools.partial(lightning.Trainer, accelerator="cpu", **quiet)
    names["Module"], names["module"], names["data"] = Module, Module(), Images()
    names["DataLoader"] = torch.utils.data.DataLoader
    names["LightningDataModule"] = lightning.LightningDataModule
    names["loader"], names["val_loader"] = (torch.utils.data.DataLoader(Images(), 8) for _ in "12")


def of_accelerate(names, folder):
    names["accelerator"], names["accumulation"] = accelerate.Accelerator(cpu=True), 1
    names["loader"] = torch.utils.data.DataLoader(Images(), 8)
    names["test_loader"] = names["accelerator"].prepare(torch.utils.data.DataLoader(Images(), 8))


def loop_of_accelerate(names):
    for x, y in names["loader"]:
        names["accelerator"].backward(names["criterion"](names["model"](x), y))
        names["optimizer"].step()
        names["optimizer"].zero_grad()


def of_the_trainer(names, folder):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = names["model"]

        def forward(self, pixel_values, labels=None):
            logits = self.inner(pixel_values)
            loss = None if labels is None else names["criterion"](logits, labels)
            return transformers.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)

    settings = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    names["TrainingArguments"] = functools.partial(
        transformers.TrainingArguments, **settings, dataloader_pin_memory=False, logging_steps=1000
    )
    names["Trainer"], names["output_dir"] = transformers.Trainer, str(folder)
    names["accumulation"], names["data"] = 1, Images(("pixel_values", "labels"))
    names["held_out"] = names["data"]
    names["weights"], names["model"] = names["model"], Model()


def of_ranks(names, folder):
    store = torch.distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    names["DistributedDataParallel"] = torch.nn.parallel.DistributedDataParallel
    names["distributed"] = distributed
    share = torch.utils.data.DistributedSampler(Images(), shuffle=False)
    names["test_loader"] = torch.utils.data.DataLoader(Images(), 8, sampler=share)
    names["sampler"] = torch.utils.data.DistributedSampler(Images())
    names["loader"] = torch.utils.data.DataLoader(Images(), 8, sampler=names["sampler"])


def of_text(names, folder):
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    names["model"] = transformers.BertForSequenceClassification(config)
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
    names["loader"] = [(torch.randint(20, (4, 5)), torch.arange(4) % 3) for _ in range(2)]
    names["test_loader"] = names["loader"]
    names["tokenised"] = [
        {"input_ids": words, "attention_mask": (torch.arange(5) < 4) * torch.ones_like(words)}
        | {"labels": labels}
        for words, labels in names["loader"]
    ]


def of_logging(names, folder):
    first, held_out = dict(names), names["loader"]
    of_the_trainer(names, folder)
    classifier, data = names["model"], names["data"]
    names |= first
    of_lightning(names, folder)
    names |= {"lightning": lightning, "transformers": transformers, "held_out": held_out}
    names |= {"classifier": classifier, "data": data}


def of_reliability(names, folder):
    loader = names["loader"]
    of_ranks(names, folder)  # torch.distributed.checkpoint wants a process group
    names |= {"loader": loader, "rank": 0, "folder": str(folder / "checkpoint")}


SETTINGS = {
    "docs/guide/timm.md": of_timm,
    "docs/guide/lightning.md": of_lightning,
    "docs/guide/accelerate.md": of_accelerate,
    "docs/guide/trainer.md": of_the_trainer,
    "docs/guide/distributed.md": of_ranks,
    "docs/guide/text.md": of_text,
    "docs/guide/logging.md": of_logging,
    "docs/reliability.md": of_reliability,
}
# Pages whose Python goes on from the loop of their first diff.
AFTER_THE_LOOP = ["timm", "lightning", "accelerate", "trainer"]
# Excerpts from the middle of a script; tests/test_timm_script.py runs the script.
EXCERPTS = [("docs/guide/timm.md", 1), ("docs/guide/timm.md", 2)]


@pytest.fixture
def names_for(tmp_path, monkeypatch):
    """A reader's names for a page, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def names_for(page):
        names = reader()
        SETTINGS.get(page, lambda *_: None)(names, tmp_path)
        return names

    yield names_for
    if distributed.is_initialized():
        distributed.destroy_process_group()


OWN = ["docs/tutorial.md", "docs/guide/finetune.md"]  # these have tests of their own


LONG = "docs/guide/tasks.md"  # trains a segmentation and a detector
RUN = [p for p in PAGES if p not in (*OWN, LONG) and blocks(p, "python")]


@pytest.mark.parametrize("page", [*RUN, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # few workers, short epochs
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's datasets
def test_the_python_of_a_page_runs_from_top_to_bottom(page, names_for, capsys):
    names = names_for(page)
    if Path(page).stem in AFTER_THE_LOOP:
        run(blocks(page, "diff")[0], "+", names)
    for block in blocks(page, "python"):
        loggers = re.findall(r"import (wandb)|torch.utils.(tensorboard)", block)
        if all(importlib.util.find_spec(one or two) for one, two in loggers):
            exec(block, names)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # few workers, short epochs
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_the_loggers_get_the_report_of_every_epoch(names_for):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    names = names_for("docs/guide/logging.md")
    code = blocks("docs/guide/logging.md", "python")
    exec(code[0], names)
    assert len(names["logs"]) == 4
    wanted = {f"free/{name}_{i}" for name in ("alignment", "edge", "loss") for i in range(4)}
    assert wanted - {"free/alignment_0"} <= names["logs"][0].keys() <= wanted | {"clean", "robust"}
    assert names["logs"][1].keys() == wanted | {"clean", "robust"}
    exec(code[1], names)
    written = events.EventAccumulator("runs/free").Reload()
    assert [e.value for e in written.Scalars("free/edge_3")] == pytest.approx(
        [numbers["free/edge_3"] for numbers in names["logs"]]
    )
    exec(code[3], names)
    assert "free/alignment_3" in names["trainer"].callback_metrics
    exec(code[4], names)
    logged = [e for e in names["trainer"].state.log_history if "free/alignment_3" in e]
    assert len(logged) == 2


@pytest.fixture
def fine_tuning(tmp_path, monkeypatch):
    """The Python of that page, on a folder of small photographs."""
    monkeypatch.chdir(tmp_path)
    images, labels = load_digits(return_X_y=True)
    for label in (0, 1):
        for i, image in enumerate(images[labels == label][:24]):
            file = (
                tmp_path / "photographs" / ("train" if i < 16 else "val") / "ab"[label] / f"{i}.png"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (image.reshape(8, 8) * 255 / 16).astype("uint8")
            Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(file)
    codes = blocks("docs/guide/finetune.md", "python")
    for old, new in {  # no network, a smaller model, fewer and smaller images
        'create_model("resnet18", pretrained=True,': 'create_model("test_resnet", pretrained=False,',
        'passes, eps = "photographs", 20,': 'passes, eps = "photographs", 6,',
        "num_workers=2": "num_workers=0",
        "batch_size=64": "batch_size=16",
        "config = timm.data.resolve_model_data_config(model)": (
            "config = timm.data.resolve_model_data_config(model) | {'input_size': (3, 32, 32)}"
        ),
    }.items():
        assert old in codes[0]
        codes = [code.replace(old, new) for code in codes]
    return codes


def test_the_fine_tuning_of_a_pretrained_model_runs_from_a_folder_to_robust_weights(
    fine_tuning, capsys
):
    exec("\n".join(fine_tuning[:2]), names := {})
    assert len(re.findall(r"epoch \d of 4: clean", capsys.readouterr().out)) == 4
    assert names["free"].delta.abs().max() == pytest.approx(4 / 255)
    assert names["schedule"].get_last_lr()[0] < 1e-3  # from 1e-2
    plain = timm.create_model("test_resnet", num_classes=2)
    plain.load_state_dict(torch.load("robust.pt", weights_only=True))


def test_unfrozen_layers_train_from_their_time_on_and_delta_is_carried_over(fine_tuning):
    first, _, new_optimizer, new_group = fine_tuning
    exec(first.split("\nbest = ")[0], names := {})
    cross_entropy, seen = names["cross_entropy"], []

    def watched(output, y):
        free, body = names.get("unfrozen", names["free"]), next(names["model"].parameters())
        far = (names["x"] - free.clean).abs().max().item()
        seen.append((far, body.detach().clone(), body.grad is None))
        return cross_entropy(output, y)

    for code in (new_optimizer, new_group):
        seen.clear()
        names.pop("unfrozen", None)
        names["cross_entropy"] = watched
        exec(code, names)
        moved = [not torch.equal(a[1], b[1]) for a, b in itertools.pairwise(seen)]
        assert moved == [False] * 8 + [True] * 7  # two batches, four replays each
        assert [far > 0 for far, *_ in seen] == [False] + [True] * 15
        assert all(none for *_, none in seen[8:])  # no gradient from before


def test_the_ramp_of_the_guide_ends_at_the_whole_eps_and_is_judged_by_it(names_for, capsys):
    (code,) = (b for b in blocks("docs/guide/schedules.md", "python") if "ramp" in b)
    names, seen = names_for("docs/guide/schedules.md"), []
    criterion = names["criterion"]

    def watched(output, y):
        seen.append((names["free"].eps, (names["x"] - names["free"].clean).abs().max().item()))
        return criterion(output, y)

    names["criterion"] = watched
    exec(code, names)
    assert len(seen) == 64  # four replayed epochs of two batches, eight times each
    whole = 8 / 255
    assert [eps for eps, _ in seen[1:]] == pytest.approx(
        [whole * min(1, i / 32) for i in range(1, 64)]
    )
    assert seen[0][1] == 0
    for (eps, _), (_, far) in itertools.pairwise(seen[1:]):
        assert far == pytest.approx(eps, rel=1e-4)  # the step before, which was as long as its eps
    assert capsys.readouterr().out.count("eps=8/255") == 4


def test_the_teacher_of_the_guide_answers_each_minibatch_once(names_for):
    (code,) = (b for b in blocks("docs/guide/loop.md", "python") if "teacher" in b)
    names, asked, answers = names_for("docs/guide/loop.md"), [], []
    model, criterion = names["model"], names["criterion"]

    def watched(output, answer):
        answers.append(answer)
        return criterion(output, answer)

    names["criterion"] = watched

    def hear(module, args, out):
        if module is not model:
            asked.append((args[0].clone(), out))

    model.register_forward_hook(hear)
    exec(code, names)
    assert len(asked) == 2
    assert len(answers) == 16
    for i, answer in enumerate(answers):
        clean, out = asked[i // 8]
        assert torch.equal(clean, names["loader"][i // 8][0])
        assert torch.equal(answer, out.softmax(1))


def test_the_video_of_the_guide_moves_by_eps_in_every_channel(names_for):
    names = names_for("docs/guide/normalisation.md")
    for code in blocks("docs/guide/normalisation.md", "python")[1:]:
        exec(code, names)
    far = (names["x"] - names["video"]).abs() * names["std"]
    assert far[:, 0].amax((0, 2, 3)).tolist() == pytest.approx([8 / 255] * 3, rel=1e-4)
    assert far[:, 1:].max() == 0  # frames that the loss does not see


def test_cached_gradients_of_texts_are_those_of_the_whole_perturbed_batch(names_for):
    names = names_for("docs/guide/text.md")
    model, code = names["model"], blocks("docs/guide/text.md", "python")[0]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)
    exec(code, names)
    free = FreeAdversarial(
        torch.optim.AdamW(twin.parameters()),
        eps=0.3,
        step_size=0.1,
        norm="l2",
        at=twin.get_input_embeddings(),
    )
    for words, labels in free.replay(names["loader"]):
        free.step(names["contrast"](twin.bert(words).pooler_output, labels))
    assert free.delta.flatten(1).norm(dim=1).min() > 0.1
    torch.testing.assert_close(names["free"].delta, free.delta, rtol=1e-3, atol=1e-5)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_freelb_makes_one_update_a_batch_after_replays_with_one_dropout_mask(names_for):
    names = names_for("docs/guide/text.md")
    codes = blocks("docs/guide/text.md", "python")
    (code,) = (b for b in codes if "optimizer.step()" in b and "free.turn" in b)
    dropout, masks, updates = names["model"].bert.embeddings.dropout, [], []
    dropout.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    names["optimizer"].register_step_post_hook(lambda *_: updates.append(len(masks)))
    exec(code, names | {"embed": names["model"].get_input_embeddings()})
    assert updates == [3, 6]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(masks)] == [1, 1, 0, 1, 1]


def test_all_replays_of_a_text_have_one_dropout_mask(names_for):
    names = names_for("docs/guide/text.md")
    dropout = names["model"].bert.embeddings.dropout
    assert dropout.p > 0
    masks = []
    dropout.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    exec(blocks("docs/guide/text.md", "python")[1], names)
    assert len(masks) == 8
    for one, two in itertools.pairwise(masks):
        same = one is not masks[3]
        assert torch.equal(one, two) == same


@pytest.mark.slow
def test_the_script_that_measured_the_losses_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["losses.py", "--dry-run"])
    threads = torch.get_num_threads()
    losses.main()
    torch.set_num_threads(threads)
    assert len(re.findall(r"^\| Free, .*\d\.\d ± ", capsys.readouterr().out, re.M)) == 4


def test_a_run_from_the_checkpoints_of_the_guide_goes_on_bit_equal_though_the_loader_shuffles(
    names_for,
):
    (code,) = blocks("docs/guide/checkpoints.md", "python")

    def start():
        torch.manual_seed(0)
        names = names_for("docs/guide/checkpoints.md")
        names["model"].insert(1, torch.nn.Dropout(0.5))
        images = torch.utils.data.TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 10)
        names["loader"] = torch.utils.data.DataLoader(images, 4, shuffle=True)
        return names

    exec(code, whole := start())
    Path("last.pt").unlink()
    exec(code.replace("free.epochs(20)", "4"), start())
    exec(code, resumed := start())
    assert whole["epoch"] == resumed["epoch"] == 12
    assert torch.equal(whole["free"].delta, resumed["free"].delta)
    for one, two in zip(whole["model"].parameters(), resumed["model"].parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_losses_of_the_guide_are_those_that_were_measured():
    page = (ROOT / "docs/guide/losses.md").read_text(encoding="utf-8")
    for function in (losses.trades, losses.mart):
        assert inspect.getsource(function) in page


def test_the_clean_loss_of_a_text_is_that_of_its_clean_embeddings(names_for, monkeypatch):
    names = names_for("docs/guide/text.md")
    first, second = blocks("docs/guide/text.md", "python")[1:3]
    seen = []
    exec(first, names)
    body = names["model"].bert.embeddings
    body.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    before = [names["embed"].weight.detach().clone()]
    names["embed"].register_forward_hook(lambda module, args, out: before.append(out.detach()))
    exec(second, names)
    clean = [given for given in seen if given is not None]
    assert len(clean) == 8
    assert all((one - two).norm() > 0.05 for one, two in zip(clean, before[1:], strict=True))
    words = names["loader"][0][0]
    assert torch.equal(clean[0], torch.nn.functional.embedding(words, before[0]))


def test_the_mask_of_a_text_goes_along_with_its_embeddings_through_an_attack(names_for, capsys):
    names = names_for("docs/guide/text.md")
    (*_, code) = blocks("docs/guide/text.md", "python")
    model = names["model"].eval()
    free = FreeAdversarial(names["optimizer"], eps=0.3, norm="l2", at=model.bert.embeddings)
    names |= {"embed": model.get_input_embeddings(), "free": free, "evaluate": evaluate}
    exec(code, names)
    (x, y), batch = names["embedded"][0], names["tokenised"][0]
    assert not batch["attention_mask"].all()
    x_adv = pgd(names["logits"], x, y, free.threat, steps=3)
    for images in (x, x_adv):
        mask = batch["attention_mask"]
        wanted = model(inputs_embeds=images[..., :-1], attention_mask=mask).logits
        torch.testing.assert_close(names["logits"](images), wanted)
    whole = model(inputs_embeds=x[..., :-1]).logits
    assert not torch.allclose(names["logits"](x), whole)
    assert not torch.allclose(x_adv[..., -1], x[..., -1])


@pytest.mark.slow
def test_the_tutorial_runs_and_its_outputs_and_pictures_are_those_of_its_code(tmp_path, capsys):
    names = tutorial.run()
    printed = re.findall(r"clean +([\d.]+)% robust +([\d.]+)%", capsys.readouterr().out)
    text = "\n".join(blocks("docs/tutorial.md", "text"))
    shown = re.findall(r"clean +([\d.]+)% robust +([\d.]+)%", text)
    assert len(printed) == len(shown) == 3
    for mine, theirs in zip(printed, shown, strict=True):
        for value, other in zip(mine, theirs, strict=True):
            assert abs(float(value) - float(other)) < 6  # another machine, another rounding
    assert min(float(robust) for _, robust in printed[1:]) > float(printed[0][1]) + 35
    tutorial.draw(names, tmp_path)
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    pictures = set(re.findall(r"\(tutorial/(\w+\.png)\)", page))
    assert {p.name for p in tmp_path.iterdir()} == pictures
    assert {p.name for p in (ROOT / "docs/tutorial").iterdir()} == pictures


def test_the_notebook_is_the_tutorial_with_its_code_and_what_that_prints():
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    text = (ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8")
    assert text == runpy.run_path(str(ROOT / "docs/notebook.py"))["notebook"](page), (
        "run python docs/notebook.py"
    )
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    codes = [block.rstrip("\n") for block in blocks("docs/tutorial.md", "python")]
    assert ["".join(cell["source"]) for cell in cells] == codes
    printed = ["".join(out["text"]) for cell in cells for out in cell["outputs"]]
    assert printed == blocks("docs/tutorial.md", "text")


def test_the_loops_of_the_tutorial_differ_by_its_diff_and_by_their_object():
    plain, free, climbing = (blocks("docs/tutorial.md", "python")[i] for i in (0, 2, 3))
    (diff,) = blocks("docs/tutorial.md", "diff")
    for code, side in ((plain, "-"), (free, "+")):
        lines = [line[1:] for line in diff.splitlines() if line[:1] in (side, " ")]
        body = "\n".join(lines).split("def train(model, epochs):\n")[1]
        assert body in code
    loops = [
        code[code.index("    updates = ") : code.index("\n\n\n", 200)] for code in (free, climbing)
    ]
    assert loops[0] == loops[1]


def test_the_readme_has_python_to_run():
    assert len(blocks("README.md", "python")) == 1


def test_the_readme_is_short_and_its_lines_are_too():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 170
    assert not [line for line in lines if len(line) >= 160]


def run(diff, side, names):
    """Run one side of a diff; whether a weight has moved."""
    model = names.get("weights", names["model"])
    before = [p.detach().clone() for p in model.parameters()]
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (side, " ")]
    exec("\n".join(lines), names)
    if "accelerator" in names:
        loop_of_accelerate(names)
    return any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("side", ["-", "+"])
def test_the_loops_of_the_readme_train_before_and_after_the_change(side):
    diffs = blocks("README.md", "diff")
    assert len(diffs) == 2
    for diff, most in zip(diffs, (4, 5), strict=True):  # the paper's, and with an objective
        assert run(diff, side, reader())
        added = [line for line in diff.splitlines() if line[:1] == "+" and "import" not in line]
        assert len(added) <= most


@pytest.mark.parametrize("page", PAGES)
def test_every_diff_that_starts_free_divides_its_epochs_and_moves_batches_as_the_loop_did(page):
    for diff in blocks(page, "diff"):
        lines = diff.splitlines()
        added = "\n".join(line for line in lines if line[:1] == "+")
        shown = "\n".join(line for line in lines if line[:1] != "+")
        if "FreeAdversarial(" in added:
            assert "free.epochs(" in added, diff
        if ".to(device)" in shown:
            assert "device=device" in added, diff


DIFFS = [
    pytest.param(page, i, diff, id=f"{Path(page).stem}-{i}")
    for page in GUIDE
    for i, diff in enumerate(blocks(page, "diff"))
]


@pytest.mark.parametrize(
    ("page", "i", "diff"), [p for p in DIFFS if p.values[0] != "docs/guide/schedules.md"]
)
def test_a_host_needs_at_most_three_new_lines(page, i, diff):
    lines = diff.splitlines()
    for side in "-+":
        code = "\n".join(line[1:] for line in lines if line[:1] in (side, " "))
        ast.parse(textwrap.dedent(code))
    goes_on = "+" + " " * 20  # the arguments of a call
    added = [line for line in lines if line[:1] == "+" and "import" not in line]
    assert 1 <= len([line for line in added if not line.startswith(goes_on)]) <= 3


@pytest.mark.parametrize(
    ("page", "i", "diff"), [p for p in DIFFS if (p.values[0], p.values[1]) not in EXCERPTS]
)
@pytest.mark.parametrize("side", ["-", "+"])
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # few workers, short epochs
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's datasets
def test_the_loops_of_the_guide_train_before_and_after_the_change(
    page, i, diff, side, names_for, capsys
):
    names = names_for(page)
    assert run(diff, side, names)
    free = names.get("free") or getattr(names.get("Data"), "free", None)
    assert (free is not None) == (side == "+")


@pytest.mark.slow
def test_the_build_stops_if_a_public_name_is_not_in_the_api_page(tmp_path):
    pytest.importorskip("sphinx")
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=lambda *_: ["_build"])

    def build():
        command = [sys.executable, "-m", "sphinx", "-q", "-b", "dummy", docs, tmp_path / "out"]
        return subprocess.run(command, capture_output=True, text=True)

    assert build().returncode == 0
    page = docs / "api.md"
    page.write_text(
        page.read_text(encoding="utf-8").replace("skip, report, epochs", "report, epochs")
    )
    assert "not in docs/api.md: free_adv.FreeAdversarial.skip" in (failed := build()).stderr
    assert failed.returncode != 0


@pytest.mark.parametrize(
    ("i", "name", "epochs"), [(0, "schedule", 16), (1, "schedule", 200), (2, "warmup", 16)]
)
def test_the_schedules_of_the_guide_make_the_same_way_with_replays_as_without(i, name, epochs):
    ends = []
    for side in "-+":
        names = reader() | {"epochs": epochs}
        run(blocks("docs/guide/schedules.md", "diff")[i], side, names)
        ends.append((names[name].get_last_lr()[0], names[name].last_epoch))
    (rate, _), (mine, _) = ends
    assert mine == pytest.approx(rate, abs=1e-9)
    if epochs == 200:
        assert mine == pytest.approx(0.1 * 0.1**2)
    if name == "warmup":
        assert [steps for _, steps in ends] == [10, 10]  # five epochs of two batches


def test_the_schedule_of_the_page_about_accumulation_reaches_its_end():
    (code,) = blocks("docs/guide/accumulation.md", "python")
    for batches in (4, 5):  # the last group is full, or short
        names = reader()
        names["loader"] = names["loader"] * 2 + names["loader"][: batches - 4]
        exec(code, names)
        assert names["schedule"].get_last_lr()[0] < 1e-3  # from 0.1


def test_each_command_of_the_readme_is_one_line_from_install_to_run():
    commands = blocks("README.md", "sh")
    assert len(commands) == 3
    assert all(c.startswith("pip install") and c.count("\n") == 1 for c in commands)
    for name in ("quickstart", "pytest"):  # .ci/run finds them by these words
        assert len([c for c in commands if name in c]) == 1


def anchors(file):
    """The fragments of a page's headings, as the code host and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", [*PAGES, "examples/README.md"])
def test_the_files_and_headings_that_a_page_links_to_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = [ROOT, ROOT / "tests", ROOT / "examples", *(ROOT / "examples").iterdir()]
    for name in re.findall(r"`(?:python )?((?:\w+/)*\w+\.py)\b", text):
        assert any((place / name).exists() for place in places) or name == "train.py", name


def test_every_argument_is_in_the_table_of_the_guide():
    page = (ROOT / "docs/guide/arguments.md").read_text(encoding="utf-8")
    rows = "\n".join(re.findall(r"^\| `.*", page, re.M))
    for name in inspect.signature(FreeAdversarial).parameters:
        assert f"`{name}`" in rows, name


def test_every_argument_of_evaluate_and_pgd_is_on_the_page_about_them():
    text = (ROOT / "docs/guide/evaluation.md").read_text(encoding="utf-8")
    for function in (evaluate, pgd):
        for parameter in inspect.signature(function).parameters.values():
            assert re.search(rf"`(pgd\([^)]*\b)?{parameter.name}\b", text), parameter
    lines = re.findall(r"^\|(.*)\|$", text, re.M)
    rows = dict([cell.strip() for cell in line.split("|")[:2]] for line in lines)
    for name, parameter in inspect.signature(evaluate).parameters.items():
        ((names, defaults),) = ((k, v) for k, v in rows.items() if f"`{name}`" in k)
        if defaults:
            shown = dict(zip(names.split(", "), defaults.split(", "), strict=True))[f"`{name}`"]
            assert ast.literal_eval(shown) == parameter.default


def test_the_figures_of_cifar10_in_the_text_are_those_of_the_file():
    text = re.sub(r"\s+", " ", (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"))
    table = json.loads((ROOT / "docs/benchmarks/methods.json").read_text("utf-8"))["table"]
    cells = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in table)}
    natural, free, pgd7 = (
        [cell.split(" ")[0] for cell in cells[name]] for name in ("natural", "Free, m=8", "PGD-7")
    )
    assert f"[{free[2]} % under PGD-50]" in text
    assert f"natural training has {natural[2]} % and PGD-7, in {float(pgd7[0]):g} times" in text
    assert f"the time, {pgd7[2]} %" in text
    assert (
        f"**Clean accuracy**: {free[1]} % where natural training has {natural[1]} % and PGD-7 {pgd7[1]} %"
        in text
    )


def test_the_comparisons_on_the_residual_network_are_those_of_the_file():
    text = re.sub(r"\s+", " ", (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"))
    table = json.loads((ROOT / "docs/benchmarks/frontier.json").read_text("utf-8"))["table"][2:]
    rows = (line.strip("| ").split(" | ") for line in table)
    cells = {row[0]: [float(cell.split(" ")[0]) for cell in row[2:]] for row in rows}
    loop, window, turns = (
        cells[f"Free, m={m}"] for m in ("8, W=1", "8, W=8", "4, W=8, step 2 eps")
    )
    ascent, late = (cells[n] for n in ("N-FGSM", "natural for 0.3 of the cost, then N-FGSM"))
    start = cells["FGSM-RS"]
    all_three = "{} points more clean accuracy, {} more under PGD-20 and {} under CW-40"
    for better, worse, phrase in (
        (ascent, loop, f"with the paper's loop** (`Free, m=8, W=1`): {all_three}"),
        (turns, loop, f"a step of 2 eps, with the paper's loop**: {all_three}"),
        (late, ascent, "{} points more clean accuracy, and no less robust ({} and {} points more)"),
        (
            (start[0], ascent[1], start[2]),
            (ascent[0], start[1], ascent[2]),
            "{} points more clean accuracy, {} less under PGD-20 and {} more under CW-40, both",
        ),
        (ascent[1:2], cells["PGD-2"][1:2], "PGD-2 is {} points less robust than N-FGSM"),
        (
            (cells["PGD-2"][0], ascent[1], ascent[0]),
            (ascent[0], cells["PGD-7"][1], cells["PGD-7"][0]),
            "{} more accurate, PGD-7 {} less robust and {} less accurate",
        ),
        (window[:1], loop[:1], "eight in a row**: {} points more clean accuracy, "),
        (loop[1:], window[1:], "{} less under PGD-20, within the error, and {} less under CW-40"),
    ):
        gains = (f"{high - low:.1f}" for high, low in zip(better, worse, strict=True))
        assert phrase.format(*gains) in text


FRONT = "README.md", "docs/index.md"  # which have no room for all rows
PUBLISHED = r"<!-- published:(?: https://\S+)+ -->\n(?:\|.*\n)+"
TABLE = r"<!-- ((?:benchmarks/\S+\.json ?)+)(\w+)? ?-->\n((?:\|.*\n)+)"  # rows of each file


@pytest.mark.parametrize("page", PAGES)
def test_a_table_of_measurements_is_that_of_a_committed_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, key, table in re.findall(TABLE, text):
        files = [ROOT / "docs" / file for file in name.split()]
        record, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        shown, measured = table.splitlines(), record[key or "table"]
        for other in others:
            assert other["table"][:2] == measured[:2]
            measured = measured + other["table"][2:]
        assert shown[:2] == measured[:2], name
        assert set(shown) <= set(measured), name
        assert page in FRONT or shown == measured, name
        assert {"torch", "machine", "commit"} <= first_environment(record).keys()
    unmarked = re.sub(PUBLISHED, "", re.sub(TABLE, "", text))
    for row in re.findall(r"^\|.*$", unmarked, re.M):
        assert not re.search(r"\d\.\d", row), f"{page}: where is the file of {row}"


def first_environment(record):
    return record["environment"] if "environment" in record else record["runs"][0]["environment"]


def test_every_committed_result_and_picture_is_in_a_page():
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for folder in ("benchmarks", "pictures", "tutorial"):
        for file in (ROOT / "docs" / folder).glob("*"):
            assert f"{folder}/{file.name}" in pages
            if file.suffix == ".json":
                assert not re.search(r"/(tmp|home|root|work|data)/", file.read_text("utf-8"))


def test_the_ranges_over_seeds_in_the_text_are_those_of_the_files():
    text = re.sub(r"\s+", " ", (ROOT / "docs/measurements.md").read_text(encoding="utf-8"))
    files = [ROOT / "docs" / "benchmarks" / f"comparison-{seed}.json" for seed in range(3)]
    rows = [json.loads(f.read_text(encoding="utf-8"))["rows"] for f in files]
    for method, key, scale, digits, phrase in (
        ("free", "clean", 100, 1, "{} to {} % clean"),
        ("free", "robust", 100, 1, "{} to {} % under PGD-40"),
        ("free", "autoattack", 100, 1, "{} to {} % under AutoAttack"),
        ("pgd-7", "robust", 100, 1, "PGD-7 has {} to {} %"),
        ("pgd-7", "autoattack", 100, 1, "% and {} to {} %"),
        ("free", "relative", 1, 2, "Free took {} to {} times"),
        ("pgd-7", "relative", 1, 2, "PGD-7 {} to {} times"),
    ):
        values = [scale * row[key] for run in rows for row in run if row["method"] == method]
        assert phrase.format(*(f"{f(values):.{digits}f}" for f in (min, max))) in text
