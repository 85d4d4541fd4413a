"""examples/experiments/cifar10.py on a folder of small pictures: it trains, is killed, goes on, and reports."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import attacks
import cifar10
import curve
import numpy as np
import pictures
import pytest
import strength
import study
import torch
import turns
from PIL import Image

from tests.helpers import equal

EXPERIMENTS = Path(__file__).parents[1] / "examples" / "experiments"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of coloured noise: 90 pictures to train on and 18 to test."""
    root = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 6)):
        for label, colour in enumerate("rgb"):
            folder = root / part / colour
            folder.mkdir(parents=True)
            for i in range(count):
                picture = noise.integers(0, 200, (16, 16, 3), dtype=np.uint8)
                picture[..., label] += 50
                Image.fromarray(picture).save(folder / f"{i}.png")
    return root


SMALL = (
    "--model cnn-8 --replays 3 --ascent-cost 0 --passes 6 --batch-size 16 --lr 0.05 --held-out 10 --looks 3 --ema 0.9 "
    "--label-smoothing 0.1 --test-batch 9 --attacks pgd-20"
)


def arguments(data, out, *more):
    return ["--data", str(data), "--out", str(out), *SMALL.split(), *map(str, more)]


def begin(data, *more):
    args = cifar10.parse(arguments(data, "unused", *more))
    images, labels, classes = cifar10.read(data, True, False)
    return cifar10.Run(args, images, labels, len(classes))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return out, cifar10.main(arguments(data, out, "--save-every", 7, "--attacks", "pgd-20"))


def test_a_run_reports_what_it_did(undisturbed, capsys):
    out, record = undisturbed
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(record))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert record["updates"] == round(6 * 80 / 16)
    assert [row["update"] for row in record["curve"]] == [10, 20, 30]
    assert "3 looks" in record["weights"]
    assert "PGD-10 on 10 held-out training images" in record["weights"]
    assert record["training_images"] == 80
    (found,) = record["results"]
    assert (found["steps"], found["restarts"], found["count"]) == (20, 10, 18)
    assert found["step_size"] == pytest.approx(2 / 255)
    assert found["robust"] <= found["clean"]
    assert {"torch", "machine", "commit", "threads"} <= record["environment"].keys()
    assert str(out.parent) not in (out / "result.json").read_text()


def test_finished_runs_are_drawn_and_put_into_one_table(undisturbed, data, tmp_path, monkeypatch):
    out, record = undisturbed
    table = tmp_path / "new" / "table.json"
    command = ["pictures.py", out, "--data", data, "--plot", tmp_path / "p", "--json", table]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    pictures.main()
    drawn = sorted((tmp_path / "p").iterdir())
    assert [p.name for p in drawn] == ["curves.png", "gradients.png", "perturbations.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)
    clean, robust = (f"{100 * record['results'][0][key]:.1f}" for key in ("clean", "robust"))
    row = f"| Free, m=3 | 1.00 | {clean} | {robust} |"
    assert json.loads(table.read_text())["table"][-1] == row


def test_accuracy_against_eps_is_drawn_and_measured(undisturbed, data, tmp_path):
    out, _ = undisturbed
    picture, table = tmp_path / "curve.png", tmp_path / "curve.json"
    settings = ["--eps", "1/255", "1/2", "--steps", "5", "--images", "18"]
    curve.main(
        [str(out), "--data", str(data), "--plot", str(picture), "--json", str(table), *settings]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(table.read_text())["rows"]
    assert [row["threat"]["eps"] for row in rows] == [1 / 255, 0.5]
    assert rows[0]["robust"] >= rows[1]["robust"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the input gradient of")  # of a tiny network, sure of itself
def test_examples_are_as_strong_as_the_method_makes_them(data, tmp_path):
    table = tmp_path / "strength.json"
    more = ["--model", "cnn-8", "--passes", "24", "--batch-size", "16", "--held-out", "10"]
    rows = ["Free, m=8, W=1", "N-FGSM"]
    strength.main(
        ["--data", str(data), "--every", "1", "--rows", *rows, "--json", str(table), "--", *more]
    )
    free, noisy = (row["strength"] for row in json.loads(table.read_text())["rows"])
    assert (len(free), len(noisy)) == (8, 1)
    assert abs(free[0]) < 0.5 < free[-1] < 1.1  # random for a new minibatch
    assert free[0] < 0.3 < noisy[0] < 1.6


def test_gradients_of_consecutive_replays_are_compared_for_each_window(data, tmp_path):
    table = tmp_path / "turns.json"
    more = [*SMALL.split(), "--looks", "1"]
    turns.main(
        ["--data", str(data), "--windows", "1", "2", "--json", str(table), "--", *more],
    )
    rows = json.loads(table.read_text())["rows"]
    assert [row["window"] for row in rows] == [1, 2]
    for row in rows:
        assert [len(row[name]) for name in ("inputs", "losses", "weights")] == [2, 3, 1]
        assert all(-1 <= value <= 1 for name in ("inputs", "weights") for value in row[name])
    first, second = (row["inputs"] for row in rows)
    assert first != second


def test_weights_that_are_the_last_and_the_best_are_attacked_once(data, tmp_path, monkeypatch):
    asked = []
    evaluate = cifar10.evaluate

    def counted(*args, **settings):
        asked.append(settings["steps"])
        return evaluate(*args, **settings)

    monkeypatch.setattr(cifar10, "evaluate", counted)
    both = ["--looks", "1", "--weights", "last", "best"]
    record = cifar10.main(arguments(data, tmp_path, *both))
    last, best = record["results"]
    assert asked == [10, 20]  # the look, and the attack
    assert (last["weights"], best["weights"]) == ("last", "best")
    assert last["robust"] == best["robust"]


def test_attacks_may_have_another_radius_than_training(data, tmp_path):
    more = ["--test-eps", "2/255", "--norm-momentum", "0.02"]
    run = begin(data, *more)
    assert run.free.eps == 8 / 255
    norms = [m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert {m.momentum for m in norms} == {0.02}
    (row,) = cifar10.main(arguments(data, tmp_path, *more))["results"]
    assert row["threat"]["eps"] == 2 / 255
    assert row["step_size"] == 0.5 / 255


def test_the_toolboxes_are_compared_on_a_finished_run(undisturbed, data, tmp_path):
    out, _ = undisturbed
    table = tmp_path / "attacks.json"
    settings = ["--images", "9", "--rounds", "1", "--batch-size", "5", "--attacks", "PGD-20"]
    attacks.main(["--run", str(out), "--data", str(data), "--json", str(table), *settings])
    rows = json.loads(table.read_text())["rows"]
    assert {"free-adv", "foolbox"} <= {row["toolbox"] for row in rows}
    assert all(0 <= row["robust"] <= 1 and row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_weights(undisturbed, data, tmp_path):
    command = [sys.executable, EXPERIMENTS / "cifar10.py"]
    command += arguments(data, tmp_path, "--save-every", 1, "--attacks", "pgd-20")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    at = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert 0 < at < 30
    cifar10.main(arguments(data, tmp_path, "--save-every", 7, "--attacks", "pgd-20"))
    states = [torch.load(out / "last.pt", weights_only=True) for out in (undisturbed[0], tmp_path)]
    for state in states:
        del state["seconds"], state["cpu_seconds"]
        for row in state["curve"]:  # what was noted before the kill is lost
            assert all(-1 <= v <= 1 for key in ("alignment", "edge") for v in row.pop(key))
    assert equal(*states)
    again, first = (json.loads((o / "result.json").read_text()) for o in (tmp_path, undisturbed[0]))
    assert again["results"][0]["robust"] == first["results"][0]["robust"]


def interrupting(monkeypatch, *updates, times=1):
    """Ctrl-C in the middle of these updates, counted from 1 over all runs."""
    calls, forward = iter(range(1, 1000)), torch.nn.CrossEntropyLoss.forward

    def interrupted(*args):
        for _ in range(times if next(calls) in updates else 0):
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", interrupted)


def test_ctrl_c_loses_no_update_and_says_where_the_same_command_goes_on(
    undisturbed, data, tmp_path, monkeypatch, capsys
):
    command = arguments(data, tmp_path, "--save-every", 7, "--attacks", "pgd-20")
    interrupting(monkeypatch, 13, 14)  # and once more in the second part
    for update in (13, 14):
        with pytest.raises(SystemExit) as stop:
            cifar10.main(command)
        assert stop.value.code == 128 + signal.SIGINT
        told = f"stopped after update {update} of 30: the same command goes on from there, {tmp_path}/last.pt"
        assert told in capsys.readouterr().err
        assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == update
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    record = cifar10.main(command)
    assert f"goes on from update 14 of 30, {tmp_path}/last.pt" in capsys.readouterr().out
    first = torch.load(undisturbed[0] / "weights.pt", weights_only=True)
    assert equal(torch.load(tmp_path / "weights.pt", weights_only=True), first)
    assert [row["loss"] for row in record["curve"]] == [r["loss"] for r in undisturbed[1]["curve"]]


def test_a_second_ctrl_c_stops_at_once_and_says_what_is_kept(data, tmp_path, monkeypatch, capsys):
    command = arguments(data, tmp_path, "--save-every", 7, "--attacks")
    interrupting(monkeypatch, 9, times=2)
    with pytest.raises(SystemExit) as stop:
        cifar10.main(command)
    assert stop.value.code == 128 + signal.SIGINT
    told = f"stopped at once: the same command goes on from update 7, {tmp_path}/last.pt"
    assert told in capsys.readouterr().err


def test_ctrl_c_before_anything_is_saved_says_so(data, tmp_path, monkeypatch, capsys):
    def read(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10, "read", read)
    with pytest.raises(SystemExit):
        cifar10.main(arguments(data, tmp_path))
    assert "nothing was saved yet, and the same command starts anew" in capsys.readouterr().err


WAYS = ["natural", "free", "pgd", "fgsm-rs", "n-fgsm"]
OTHERWISE = "--start uniform --amp bf16 --schedule multistep"


@pytest.mark.parametrize(
    ("method", "more"),
    [("free", ""), ("pgd", ""), ("n-fgsm", ""), ("free", OTHERWISE)]
    + [pytest.param(m, "", marks=pytest.mark.slow) for m in ("natural", "fgsm-rs")]
    + [pytest.param(m, OTHERWISE, marks=pytest.mark.slow) for m in WAYS if m != "free"],
)
def test_a_run_goes_on_bit_equal_from_after_any_update(method, more, data, tmp_path):
    settings = "--method", method, *more.split()
    whole = begin(data, *settings)
    states = []
    for loss in whole.updates():
        assert loss.isfinite()
        if whole.step in (1, 2, 3, 4, 14, 15, 17):
            cifar10.save(tmp_path / f"{whole.step}.pt", whole.state())
            states.append(whole.step)
    for step in states if method == "free" else states[:3]:
        run = begin(data, *settings)
        run.go_on(cifar10.load(tmp_path / f"{step}.pt"))
        assert run.step == step
        for _ in run.updates():
            pass
        assert equal(whole.state(), run.state())


def test_a_budget_in_parts_goes_on_bit_equal_before_and_behind_a_change(data, tmp_path):
    parts = [
        "--replays",
        "1",
        "--start",
        "zero",
        "--later",
        "0",
        "ascents=1",
        "--later",
        "0.5",
        "ascents=2",
        "noise=1",
    ]
    whole, states = begin(data, *parts), []
    for _ in whole.updates():
        if whole.step in (14, 15, 16, 20):
            cifar10.save(tmp_path / f"{whole.step}.pt", whole.state())
            states.append(whole.step)
    assert (whole.free.ascents, whole.free.noise) == (2, 1)
    for step in states:
        run = begin(data, *parts)
        run.go_on(cifar10.load(tmp_path / f"{step}.pt"))
        for _ in run.updates():
            pass
        assert equal(whole.state(), run.state())


def test_every_method_makes_the_same_number_of_updates_and_anneals(data):
    for method in ("natural", "free", "free-public", "fgsm-rs"):
        run = begin(data, "--method", method)
        rates = [run.schedule.get_last_lr()[0] for _ in run.updates()]
        assert len(rates) == 30
        assert max(rates) == pytest.approx(0.05)
        assert rates[-2] < 0.001


@pytest.mark.parametrize(("method", "judge"), [("natural", "clean"), ("free", "robust")])
def test_the_best_look_at_the_held_out_images_gives_the_weights(method, judge, data, monkeypatch):
    run = begin(data, "--method", method)
    scores = iter([(0.5, 0.3), (0.7, 0.1), (0.6, 0.2)])  # clean and robust

    def found(*args, **settings):
        clean, robust = next(scores)
        return SimpleNamespace(clean=clean, robust=robust)

    monkeypatch.setattr(cifar10, "evaluate", found)
    for _ in run.updates():
        run.losses, run.since = torch.ones(()), 1
        if run.step % 10 == 0:
            run.look()
    assert [row[judge] for row in run.curve][run.best["update"] // 10 - 1] == run.best["score"]
    assert run.best["update"] == (20 if method == "natural" else 10)


def test_held_out_images_are_not_trained_on(data):
    run = begin(data)
    (held, _), *rest = run.held_out
    assert not rest
    seen = run.loader.images.flatten(1).float() / 255
    assert torch.cdist(held.flatten(1), seen).min() > 0.1
    fewer = begin(data, "--images", 40)
    assert torch.equal(fewer.loader.images, run.loader.images[:40])
    other = begin(data, "--seed", 5)  # the split is fixed
    assert torch.equal(other.held_out[0][0], held)


def test_without_held_out_images_the_last_weights_are_taken(data, tmp_path):
    settings = arguments(data, tmp_path, "--held-out", 0, "--passes", 2, "--attacks")
    record = cifar10.main(settings)
    assert record["weights"] == f"update {record['updates']}, the last"
    assert record["training_images"] == 90
    assert [row.keys() for row in record["curve"]] == [
        {"update", "lr", "loss", "alignment", "edge"}
    ] * 3
    assert record["results"] == []


def test_another_run_in_the_same_folder_is_refused(undisturbed, data):
    with pytest.raises(
        SystemExit, match=r"holds a run with --lr 0.05, not 0.2: choose another --out"
    ):
        cifar10.main(arguments(data, undisturbed[0], "--lr", 0.2))


def test_a_run_begun_with_other_weights_is_refused(undisturbed, data, tmp_path):
    weights = tmp_path / "other" / "weights.pt"
    cifar10.save(weights, torch.load(undisturbed[0] / "weights.pt", weights_only=True))
    settings = arguments(data, tmp_path, "--passes", 1, "--attacks")
    cifar10.main([*settings, "--init", str(undisturbed[0] / "weights.pt")])
    with pytest.raises(SystemExit, match=r"holds a run with --init .*undisturbed.*, not .*other"):
        cifar10.main([*settings, "--init", str(weights)])


def test_classes_that_differ_between_training_and_test_are_refused(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    shutil.rmtree(copy / "test" / "b")
    differ = "classes to train on and to test on differ; in one of them only: b"
    with pytest.raises(SystemExit, match=differ):
        cifar10.main(arguments(copy, tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--looks", 0), "argument --looks: must be at least 1, got 0"),
        (("--passes", 0.01), "--passes 0.01 are not one update of 16 images"),
        (("--batch-size", 81), "--batch-size 81 exceeds the 80 training images: take a smaller"),
        (("--held-out", 90), "--held-out 90 leaves nothing to train on of 90 images: take fewer"),
        (
            ("--eps", 8),
            "--eps: above 0 and at most 1, for pixels in [0, 1], got 8; did you mean 8/255",
        ),
        (("--eps", "8:255"), "--eps: a number such as 0.03 or 8/255, got 8:255"),
        (("--images", "x"), "--images: must be a whole number, got x"),
        (("--model", "resnet1"), "--model resnet1: Unknown model (resnet1)"),
        (("--model", "wrn-9-1"), "--model wrn-9-1: the depth of a WRN is 6 n + 4, got 9"),
        (("--init", "no.pt"), "--init no.pt: there is no such file; it is the weights.pt of a run"),
        (("--device", "nowhere"), "--device nowhere: "),
        (("--attacks", "autoattack"), "autoattack needs at least 4 classes, here are 3"),
        (("--lr", 1e30, "--attacks"), "the loss is nan; try a lower --lr"),
    ],
)
def test_what_cannot_work_is_said_before_it_is_tried(settings, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        cifar10.main(arguments(data, tmp_path, *settings))
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_autoattack_without_its_package_is_refused_before_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"--attacks autoattack needs pyautoattack: pip install -e '.\[eval\]'"
    with pytest.raises(SystemExit, match=message):
        cifar10.main(arguments(data, tmp_path, "--attacks", "autoattack"))
    assert not (tmp_path / "last.pt").exists()


def test_weights_of_another_network_are_refused(undisturbed, data, tmp_path):
    weights = undisturbed[0] / "weights.pt"
    with pytest.raises(
        SystemExit, match=r"--init .*weights\.pt does not fit --model cnn-4: .*size"
    ):
        cifar10.main(arguments(data, tmp_path, "--init", weights, "--model", "cnn-4"))


def test_folders_that_cannot_be_used_are_refused_with_their_cure(data, tmp_path):
    def refusal(folder):
        with pytest.raises(SystemExit) as error:
            cifar10.main(arguments(folder, tmp_path / "out"))
        assert str(error.value).startswith(f"--data {folder}: ")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no such folder; --download fetches" in refusal(tmp_path / "no")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither a root of CIFAR nor train/ and test/" in refusal(empty)
    (empty / "train").mkdir()
    assert f"{empty}/train has no folders; it needs one for each class" in refusal(empty)
    copy = shutil.copytree(data, tmp_path / "copy")
    odd = copy / "train" / "g" / "7.png"
    Image.new("RGB", (20, 18)).save(odd)
    sizes = f"different sizes, 16x16 in {copy}/train/b/0.png and 20x18 in {odd}: resize them"
    assert sizes in refusal(copy)
    odd.write_text("no picture")
    assert f"{odd} cannot be read as an image; remove it" in refusal(copy)
    (copy / "train" / "x").mkdir()
    assert f"no images in {copy}/train for x; put some there, or remove" in refusal(copy)


def test_the_help_shows_defaults_as_one_would_type_them(capsys):
    def shown(*more):
        with pytest.raises(SystemExit):
            cifar10.main([*more, "--help"])
        return re.sub(r"\s+", " ", capsys.readouterr().out)

    out = shown()
    assert "linf radius, pixels in [0, 1] (default: 8/255)" in out
    assert "the paper's m (default: 8, or that of --method)" in out
    assert "more ascents make fewer updates; 0 for as many (default: 2/3)" in out
    assert "on the test images (default: pgd-20 pgd-50 autoattack)" in out
    assert "decay of the averaged weights, such as 0.9995 (default: 0.0)" in out
    assert "None" not in out
    assert "False" not in out
    assert "natural passes over the data: the cost (default: 204.8)" in shown("--recipe", "paper")
    assert cifar10.parse(["--data", "x"]).eps == 8 / 255


def test_a_dry_run_makes_a_few_updates_and_leaves_nothing_behind(data, tmp_path, capsys):
    out = tmp_path / "out"
    record = cifar10.main(arguments(data, out, "--attacks", "pgd-20", "pgd-50", "--dry-run"))
    assert record["updates"] == 4
    assert [(r["name"], r["steps"], r["count"]) for r in record["results"]] == [
        ("pgd-20", 2, 8),
        ("pgd-50", 2, 8),
    ]
    assert not out.exists()
    assert "dry run: " in capsys.readouterr().out
    assert "dry_run" in cifar10.NOT_OF_TRAINING  # a run of before there was one goes on


def test_the_recipe_of_the_paper_is_80_000_updates_cut_at_half_and_three_quarters(data):
    args = cifar10.parse(["--data", str(data), "--recipe", "paper", "--model", "cnn-8"])
    assert (args.replays, args.lr, args.weight_decay, args.pad) == (8, 0.1, 2e-4, 2)
    images = torch.zeros(50_000, 3, 2, 2, dtype=torch.uint8)
    run = cifar10.Run(args, images, torch.zeros(50_000, dtype=torch.long), 10)
    assert run.total == 80_000
    assert dict(run.schedule.milestones) == {40_000: 1, 60_000: 1}
    decays = {
        p.ndim > 1: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]
    }
    assert decays == {True: 2e-4, False: 0}
    assert cifar10.parse(["--data", "x", "--recipe", "paper", "--replays", "4"]).replays == 4


def test_training_begins_with_the_weights_of_another_run(undisturbed, data):
    weights = torch.load(undisturbed[0] / "weights.pt", weights_only=True)["weights"]
    run = begin(data, "--init", undisturbed[0] / "weights.pt")
    assert equal(dict(run.model.state_dict()), weights)


@pytest.mark.slow
def test_a_study_makes_its_table_from_runs_that_it_keeps(data, tmp_path, capsys):
    more = [
        *SMALL.split(),
        "--passes",
        "3",
        "--looks",
        "1",
        "--images",
        "40",
        "--test-images",
        "18",
        "--attacks",
        "pgd-20",
    ]
    made = ["--data", str(data), "--out", str(tmp_path / "runs")]
    made += ["--json", str(tmp_path / "study.json"), "--plot", str(tmp_path / "study.png")]
    study.main(["finetune", *made, "--seeds", "2", "--", *more])
    record = json.loads((tmp_path / "study.json").read_text())
    assert [r["label"] for r in record["runs"]] == list(study.STUDIES["finetune"]) * 2
    assert [r["arguments"]["seed"] for r in record["runs"]] == [0] * 4 + [1] * 4
    assert record["table"][0] == "| method | time, relative | clean % | pgd-20 % |"
    assert "| natural | 1.00 |" in record["table"][2]
    assert "±" in record["table"][3]
    assert "\n".join(record["table"]) in capsys.readouterr().out
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")

    begun = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    study.main(["finetune", *made, "--seeds", "2", "--", *more])  # all of it is there
    assert begun == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    study.main(["finetune", *made, "--seeds", "2", "--once", "natural", "--", *more])
    record = json.loads((tmp_path / "study.json").read_text())
    assert [r["arguments"]["seed"] for r in record["runs"]] == [0] * 4 + [1] * 3
    assert record["table"][2].endswith("(seeds: 1) |")
    with pytest.raises(
        SystemExit, match=r"natural-0 has eps 0\.031\d*, not 0\.062\d*: take another"
    ):
        study.main(["finetune", *made, "--seeds", "2", "--", *more, "--eps", "16/255"])

    start, tuned = (
        torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True)["identity"]["init"]
        for name in ("natural-0", "natural--then-PGD-7-0")
    )
    assert start is None
    assert tuned == str(tmp_path / "runs" / "natural-0" / "weights.pt")


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
def test_the_files_of_torchvision_are_read(name, classes, tmp_path, monkeypatch):
    kind = getattr(cifar10.datasets, name)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    content = {}
    for part, file in (("train_list", "train"), ("test_list", "test")):
        pixels = generator.integers(0, 256, (4, 3 * 32 * 32), dtype=np.uint8)
        labels = generator.integers(0, classes, 4).tolist()
        content[file] = pixels.reshape(4, 3, 32, 32), labels
        key = "labels" if name == "CIFAR10" else "fine_labels"
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: labels}))
        md5 = hashlib.md5((folder / file).read_bytes()).hexdigest()
        monkeypatch.setattr(kind, part, [[file, md5]])
    (folder / "meta").write_bytes(pickle.dumps({"names": ["a"]}))
    md5 = hashlib.md5((folder / "meta").read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "names", "md5": md5})
    for file, (pixels, labels) in content.items():
        images, found, names = cifar10.read(tmp_path, file == "train", False)
        assert torch.equal(images, torch.from_numpy(pixels))
        assert found.tolist() == labels
        assert names == ["a"]


def test_methods_of_one_cost_are_drawn_as_clean_against_robust_accuracy(tmp_path):
    runs = [
        {
            "label": f"Free, m={m}",
            "arguments": {"seed": 0},
            "environment": {"machine": "CPU"},
            "cpu_seconds": 1.0 + m,
            "results": [{"name": "pgd", "clean": m / 10, "robust": m / 20}],
        }
        for m in range(9)
    ]
    study.draw(runs, tmp_path / "study.png", "window")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_says_of_how_many_seeds_a_cell_is():
    def record(label, seed, attacks, machine="CPU"):
        results = [{"name": name, "clean": 0.5, "robust": value} for name, value in attacks.items()]
        return {
            "label": label,
            "arguments": {"seed": seed},
            "environment": {"machine": machine},
            "cpu_seconds": 2.0 if label == "free" else 1.0,
            "seconds": 3.0 if label == "free" else 1.0,
            "results": results,
        }

    runs = [record(m, 0, {"pgd": 0.25, "autoattack": 0.125}) for m in ("natural", "free")]
    runs += [record(m, 1, {"pgd": 0.5}) for m in ("natural", "free")]
    row = "| free | 2.00 | 50.0 ± 0.0 | 37.5 ± 17.7 | 12.5 (seeds: 1) |"
    assert study.table(runs)[3] == row
    for r in runs:
        r["results"] += [{**a, "name": f"{a['name']}, best weights"} for a in r["results"]]
    assert study.attacks_of_all(runs) == ["pgd", "autoattack"]  # the best weights are the last
    runs[0]["results"][-2]["robust"] = 0.3
    assert study.attacks_of_all(runs) == ["pgd", "autoattack", "pgd, best weights"]
    for r in runs:
        r["results"] = [a for a in r["results"] if "best" not in a["name"]]
    runs[1]["results"].pop()  # no seed of this label has it
    assert "autoattack" not in study.table(runs)[0]
    for r in runs:
        r["environment"]["machine"] = "GPU"
    assert study.table(runs)[3].startswith("| free | 3.00 |")
