"""The ImageNet job goes on after a kill as if nothing had been, alone or on two ranks, from folders and from shards."""

import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import imagenet
import images
import jobs
import numpy
import psutil
import pytest
import torch
import torch.distributed.fsdp
from PIL import Image
from torch.utils.data import DataLoader

SCRIPT = Path(__file__).parents[1] / "examples" / "experiments" / "imagenet.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
# 24 updates, and a checkpoint after the second replay of the third batch.
COMMON = (
    "--model test_resnet --size 32 --batch-size 4 --passes 4 --warmup 1 --workers 1 --eval-every 2 "
)
COMMON += "--eval-images 5 --log-every 1 --save-updates 5 --ema 0.9 --amp bf16 --channels-last"
SAVED, LATER = 10, 13  # the update of the checkpoint, and that after which the job is killed
TRAIN, VAL = (
    12,
    (4, 4, 4, 3),
)  # images of each of 4 classes; 15 are not the same number for each rank


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders of JPEGs of 40x40 pixels, and the same training images in five shards."""
    root = tmp_path_factory.mktemp("data")
    draw = numpy.random.default_rng(0)
    for label, of_val in enumerate(VAL):
        for split, number in (("train", TRAIN), ("val", of_val)):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(number):
                pixels = draw.integers(0, 256, (40, 40, 3))
                pixels[: 10 * label] //= 2
                image = Image.fromarray(pixels.astype("uint8"))
                image.save(root / split / f"class{label}" / f"{i}.jpg")
    (root / "shards").mkdir()
    files = sorted((root / "train").glob("*/*.jpg"))
    for shard in range(5):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as tar:
            for file in files[shard::5]:
                for kind, content in (
                    ("jpg", file.read_bytes()),
                    ("cls", file.parent.name[-1].encode()),
                ):
                    member = tarfile.TarInfo(f"{file.parent.name}-{file.stem}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


class Run:
    """The job in processes of its own, killed after a certain line of its output if one is given."""

    def __init__(self, out, data, *options, ranks=2, kill_after=None, kind=signal.SIGKILL):
        launcher = ["-m", *TORCHRUN, str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, SCRIPT, "--data", data, "--out", out, *COMMON.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self.lines = []
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [*map(str, command), *map(str, options)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment | {"PYTHONPATH": str(SCRIPT.parents[2])},
            ) as process,
        ):
            for line in process.stdout:
                self.lines.append(line)
                if kill_after and line.startswith(kill_after):
                    root = psutil.Process(process.pid)
                    others = root.children(recursive=True) if kind == signal.SIGKILL else []
                    for one in (root, *others):
                        one.send_signal(kind)
                    kill_after = None
            self.code = process.wait()
            errors.seek(0)
            self.errors = errors.read()

    @property
    def out(self):
        return "".join(self.lines)


def states(folder):
    """Everything in a checkpoint but how long it took."""
    found = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    found["last.pt"]["progress"].pop("seconds")
    return found


def leaves(state, path=""):
    """(path, tensor or value) of everything in nested containers."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return itertools.chain.from_iterable(leaves(v, f"{path}/{k}") for k, v in items)
    return iter([(path, state)])


def assert_same(one, other):
    (one, other) = (dict(leaves(states(folder))) for folder in (one, other))
    assert one.keys() == other.keys()
    for name, a in one.items():
        b = other[name]
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def interrupted(out, data, *options, **how):
    """The job killed after a while, with what a kill in the middle of saving would leave; then once more."""
    first = Run(out, data, *options, kill_after=f"update {LATER}/", **how)
    for torn in ("rank0-15.pt", "rank0-15.pt.1.new", "last.pt.1.new"):
        (out / torn).write_bytes((out / "last.pt").read_bytes()[:1000])
    return first, Run(out, data, *options, **how)


@pytest.fixture(scope="module")
def ddp(data, tmp_path_factory):
    """The folders of a job on two ranks that was killed and of one that was not, and the runs."""
    out = tmp_path_factory.mktemp("ddp")
    return out, Run(out / "whole", data), *interrupted(out / "parts", data)


@pytest.mark.slow
def test_a_job_that_was_killed_ends_bit_equal_to_one_that_was_not(ddp):
    out, whole, first, second = ddp
    assert whole.code == second.code == 0, whole.errors + second.errors
    assert first.code == -signal.SIGKILL
    assert f"goes on from update {SAVED} of" in second.out
    assert f"update {SAVED + 1}/24" in second.out
    assert f"update {SAVED}/24" not in second.out
    assert_same(out / "whole", out / "parts")


@pytest.mark.slow
def test_a_checkpoint_replaces_the_older_ones_and_what_a_kill_has_left_half_written(ddp):
    out, *_ = ddp
    files = {"last.pt", "rank0-24.pt", "rank1-24.pt", "weights.pt", "result.json", "curves.png"}
    assert {path.name for path in (out / "parts").iterdir()} == files


@pytest.mark.slow
def test_the_curve_of_a_job_that_was_killed_is_that_of_one_that_was_not_and_is_drawn(ddp):
    out, *_ = ddp
    whole, parts = (
        json.loads((out / name / "result.json").read_text()) for name in ("whole", "parts")
    )
    assert [row["update"] for row in whole["curve"]] == [6, 12, 18, 24]
    assert all(row["loss"] > 0 for row in whole["curve"])
    assert parts["curve"] == whole["curve"]
    assert (out / "parts" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_image_is_evaluated_once_by_the_ranks_together(ddp):
    out, *_ = ddp
    result = json.loads((out / "parts" / "result.json").read_text())
    assert [(a["steps"], a["images"]) for a in result["accuracies"]] == [(10, 15), (50, 15)]
    assert [(a["update"], a["images"]) for a in result["history"]] == [(12, 5)]
    for accuracy in result["accuracies"]:  # whole numbers of images
        assert accuracy["clean"] * 15 == pytest.approx(round(accuracy["clean"] * 15))
        assert accuracy["robust"] <= accuracy["clean"]


@pytest.mark.slow
def test_the_accuracy_is_that_of_the_weights_that_are_written(ddp, data):
    import timm
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    out, *_ = ddp
    result = json.loads((out / "whole" / "result.json").read_text())
    model = timm.create_model("test_resnet", num_classes=4)
    model.load_state_dict(torch.load(out / "whole" / "weights.pt", weights_only=True))
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    steps = [v2.Resize(36), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    val = ImageFolder(data / "val", v2.Compose([*steps, v2.Normalize(mean, std)]))
    x, y = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in val), strict=True))
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).double().mean().item()
    assert result["accuracies"][0]["clean"] == pytest.approx(right)


@pytest.mark.slow
def test_the_lines_of_the_log_say_how_the_job_is_doing(ddp):
    _, whole, *_ = ddp
    line = r"update 24/24  lr \S+  loss \d+\.\d+  \d+ images/s  waiting for the loader \d+%  ETA 0:00:00"
    assert re.search(line, whole.out)
    assert "24 updates of 8; 2 x cpu, DDP" in whole.out


def test_a_row_names_what_tells_its_run_from_others():
    found = {"attack": "PGD", "images": 15, "clean": 0.5, "robust": 0.25}
    record = {"seconds": 2.0, "accuracies": [found]}
    args = {"method": "free", "replays": 1, "window": 8}
    later = [["0.3", "ascents=1", "noise=2"], ["0.8", "eps=0.1"]]
    *_, row = imagenet.table({**record, "arguments": {**args, "later": later}})
    assert row == (
        "| free, m=1, W=8, from 0.3 on ascents=1 noise=2, from 0.8 on eps=0.1 | 2 | 50.0 | 25.0 |"
    )
    for changed, label in (
        ({"method": "natural", "replays": 4}, "natural"),
        ({"method": "n-fgsm"}, "n-fgsm"),
        ({"method": "n-fgsm", "replays": 4}, "n-fgsm, m=4, W=8"),
    ):
        *_, row = imagenet.table({**record, "arguments": {**args, "later": [], **changed}})
        assert row == f"| {label} | 2 | 50.0 | 25.0 |"


@pytest.fixture
def alone():
    """jobs.py, in a process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield jobs
    torch.distributed.destroy_process_group()


def checkpoint(jobs, folder, **settings):
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return jobs.Checkpoint(folder, settings, net, optimizer, None)


def test_other_arguments_are_refused_with_both_values(alone, tmp_path, capsys):
    first = checkpoint(alone, tmp_path, lr=0.1, ranks=1, model="resnet50")
    first.save({"update": 3}, {})
    second = checkpoint(alone, tmp_path, lr=0.2, ranks=8, model="resnet50")
    weights = second.net.weight.clone()
    with pytest.raises(SystemExit) as refusal:
        second.load(torch.device("cpu"))
    assert refusal.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"lr is 0.1 in {tmp_path}/last.pt and 0.2 now"
    assert lines[1] == f"ranks is 1 in {tmp_path}/last.pt and 8 now"
    assert len(lines) == 3
    assert torch.equal(second.net.weight, weights)


def test_a_kill_between_the_files_of_a_checkpoint_leaves_the_older_one(
    alone, tmp_path, monkeypatch
):
    net = checkpoint(alone, tmp_path).net
    first = checkpoint(alone, tmp_path)
    first.save({"update": 3}, {"delta": 3})
    expected = first.net.weight.detach().clone()
    real = alone.records.save

    def kill(path, state):
        if path.name == "last.pt":
            raise KeyboardInterrupt
        real(path, state)

    monkeypatch.setattr(alone.records, "save", kill)
    with torch.no_grad():
        first.net.weight.copy_(net.weight)
    with pytest.raises(KeyboardInterrupt):
        first.save({"update": 4}, {"delta": 4})
    again = checkpoint(alone, tmp_path)
    progress, own = again.load(torch.device("cpu"))
    assert (progress["update"], own["delta"]) == (3, 3)
    assert torch.equal(again.net.weight, expected)


def test_a_folder_without_a_checkpoint_begins_anew(alone, tmp_path):
    assert checkpoint(alone, tmp_path).load(torch.device("cpu")) is None


@pytest.mark.slow
def test_a_job_refuses_other_arguments_and_ranks(ddp, data):
    out, *_ = ddp
    run = Run(out / "parts", data, "--lr", "0.2", "--workers", "0", ranks=1)
    assert run.code == 2
    assert re.search(r"^lr is 0\.1 in .*last\.pt and 0\.2 now$", run.errors, re.M)
    assert re.search(r"^ranks is 2 in .*last\.pt and 1 now$", run.errors, re.M)
    assert "workers" not in run.errors
    assert states(out / "parts")["last.pt"]["progress"]["update"] == 24


@pytest.mark.parametrize(
    ("kind", "name"),
    [(signal.SIGTERM, "SIGTERM"), pytest.param(signal.SIGINT, "Ctrl-C", marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_exit_code_says_that_the_job_is_not_done(kind, name, data, tmp_path):
    end = {"kill_after": f"update {LATER}/", "kind": kind, "ranks": 1}
    run = Run(tmp_path, data, "--method", "fgsm-rs", **end)
    assert run.code == 128 + kind, run.errors
    told = rf"saved update (\d+) in .*\n{name}: stops here; the same command goes on from update \1 of 29, {tmp_path}"
    assert re.search(told, run.out), run.out
    update = int(re.search(told, run.out)[1])
    assert LATER <= update < 29
    assert states(tmp_path)["last.pt"]["progress"]["update"] == update
    assert "Traceback" not in run.errors


@pytest.fixture
def main(monkeypatch, capsys):
    """The job in this process: the code with which it ends and what it has printed."""

    def main(data, out, *options):
        words = ["imagenet.py", "--data", data, "--out", out, *COMMON.split(), *options]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        code, told = 0, ""
        try:
            imagenet.main()
        except SystemExit as end:  # with a text Python prints it and ends with 1
            code, told = (1, end.code) if isinstance(end.code, str) else (end.code, "")
        out, errors = capsys.readouterr()
        return code, out, errors + told

    return main


def test_a_dry_run_makes_a_few_updates_and_leaves_nothing_behind(data, tmp_path, main):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new", tmp_path / "there"):
        code, text, errors = main(data, out, "--dry-run", "--workers", 0)
        assert code == 0, errors
        assert "4 updates of 2; 1 x cpu" in text
        assert "update 4/4" in text
        assert "dry run: it went to its end" in text
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model resnet1", "--model resnet1: Unknown model (resnet1)"),
        (
            "--batch-size 49",
            "--batch-size 49 on each of 1 ranks needs 49 images, and --data has 48",
        ),
        ("--passes 1", "--passes 1 must be more than --warmup 1"),
        (
            "--eps 4",
            "--eps: above 0 and at most 1, for pixels in [0, 1], got 4; did you mean 4/255?",
        ),
        ("--init no.pt", "--init no.pt: there is no such file"),
        ("--val no", "--val no: there is no folder no"),
        ("--data no", "--data no: there is no folder no/train"),
        ("--data no-{0..1}.tar --images 9 --val VAL", "there is no file no-0.tar, the first of 2"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(options, message, data, tmp_path, main):
    words = options.replace("VAL", str(data / "val")).split()
    code, _, errors = main(data, tmp_path, *words)
    assert code in (1, 2)  # 2 where it is the parser that says so
    assert message in errors.splitlines()[-1]


@pytest.mark.slow
def test_weights_of_another_network_are_refused_in_one_line(ddp, data, tmp_path, main):
    weights = ddp[0] / "whole" / "weights.pt"
    code, _, errors = main(data, tmp_path, "--model", "test_vit", "--init", weights)
    assert code == 1
    assert re.search(rf"^--init {weights} does not fit --model test_vit: .*$", errors, re.M)


def test_classes_without_images_and_classes_that_differ_are_refused(data, tmp_path, main):
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "val" / "class9").mkdir()
    _, _, errors = main(copy, tmp_path / "out")
    assert f"--data {copy}: no images in {copy}/val for class9; put some there" in errors
    shutil.rmtree(copy / "val" / "class9")
    shutil.rmtree(copy / "val" / "class2")
    _, _, errors = main(copy, tmp_path / "out")
    assert "have different classes; in one of them only: class2" in errors


def test_the_help_shows_defaults_as_one_would_type_them(main):
    code, text, _ = main("x", "y", "--help")
    text = re.sub(r"\s+", " ", text)
    assert code == 0
    assert "linf radius, pixels in [0, 1] (default: 4/255)" in text
    assert "the paper's m (default: 4, or that of --method)" in text
    assert "None" not in text
    assert "False" not in text


def in_shards(data):
    return str(data / "shards" / "{0..4}.tar"), str(data / "val"), 4 * TRAIN


def batches(data, kind, first, workers, rank=0, stop=9):
    """The batches of one of two ranks, six to an epoch, from number `first` on."""
    where = (str(data), None, None) if kind == "folder" else in_shards(data)
    source = images.Images(*where, size=32, resize=36)
    plan = images.Plan(size=4, epoch=6, first=first, stop=stop, rank=rank, ranks=2, seed=1)
    return list(DataLoader(**source.training(plan), num_workers=workers))


# A shard that is left open when a loader ends is warned of, but not in workers.
@pytest.mark.parametrize(
    ("kind", "workers"), [("folder", 0), ("folder", 2), ("shards", 1), ("shards", 2)]
)
def test_a_loader_may_begin_at_any_batch(kind, workers, data):
    whole = batches(data, kind, 0, workers)
    assert len(whole) == 9
    assert not torch.equal(whole[0][0], whole[6][0])  # another epoch
    for first in (1, 4, 6, 8):
        part = batches(data, kind, first, workers)
        assert len(part) == 9 - first
        for (x, y), (a, b) in zip(part, whole[first:], strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)


def test_batches_of_a_folder_do_not_depend_on_the_number_of_workers(data):
    for one, other in zip(*(batches(data, "folder", 2, w) for w in (0, 2)), strict=True):
        assert all(map(torch.equal, one, other))


def test_the_ranks_share_out_each_epoch_of_a_folder(data):
    source = images.Images(str(data), None, None, size=32, resize=36)
    keys = []
    for rank in range(2):
        plan = images.Plan(size=4, epoch=6, first=0, stop=12, rank=rank, ranks=2, seed=1)
        keys += [key for batch in source.training(plan)["batch_sampler"] for key in batch]
    assert sorted(keys) == [(epoch, index) for epoch in range(2) for index in range(48)]


def test_raw_samples_of_shards_are_skipped_before_they_are_decoded(data, monkeypatch):
    opened = multiprocessing.Value("i", 0)  # that of the worker is the same one

    def count(file, real=Image.open):
        with opened:
            opened.value += 1
        return real(file)

    monkeypatch.setattr(images.Image, "open", count)
    batches(data, "shards", 4, 1, stop=6)
    assert opened.value == 2 * 4


def test_too_few_shards_and_missing_facts_about_them_are_refused(data):
    source = images.Images(*in_shards(data), size=32, resize=36)
    with pytest.raises(SystemExit, match="5 shards are too few for 6 workers"):
        source.demand(6)
    with pytest.raises(SystemExit, match="shards need --val FOLDER and --images COUNT"):
        images.Images(in_shards(data)[0], None, None, size=32, resize=36)


HARD = {  # each with the number of ranks
    "FSDP": (2, "--fsdp"),
    "shards": (2, "shards"),
    "FSDP of nested blocks, AdamW": (2, "--fsdp --model test_convnext --optimizer adamw"),
    "DDP on three ranks": (3, "--passes 5"),
    "PGD on two ranks": (2, "--method pgd --schedule step --label-smoothing 0.1"),
    "FGSM under FSDP": (2, "--method fgsm-rs --fsdp"),
    "a vision transformer": (2, "--model test_vit --size 64 --optimizer adamw"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_a_job_goes_on_bit_equal_with(name, data, tmp_path):
    ranks, options = HARD[name]
    if options == "shards":
        data, val, count = in_shards(data)
        options = f"--val {val} --images {count} --workers 2"
    if "--fsdp" in options and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    whole = Run(tmp_path / "whole", data, *options.split(), ranks=ranks)
    first, second = interrupted(tmp_path / "parts", data, *options.split(), ranks=ranks)
    assert whole.code == second.code == 0, whole.errors + second.errors
    assert first.code == -signal.SIGKILL
    assert "goes on from update" in second.out
    assert_same(tmp_path / "whole", tmp_path / "parts")
