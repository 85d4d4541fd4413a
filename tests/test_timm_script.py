"""timm's own train.py, with the recipe of the guide inserted, in its own process.

timm's wheel and sdist lack the script. It comes from the repository, at the tag of the timm that is
installed, or from the file that the environment variable TIMM_TRAIN names.
"""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from free_adv import ThreatModel, evaluate

pytestmark = pytest.mark.slow

URL = f"https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{timm.__version__}/train.py"
ANCHOR = "    updates_per_epoch = (len(loader_train)"  # the first place that asks for the length
IMPORT = "from free_adv import FreeAdversarial\n"
RECIPE = """\
    free = FreeAdversarial(eps=4 / 255, replays=2, mean=data_config['mean'], std=data_config['std'],
                           accumulate=args.grad_accum_steps)
    args.epochs, loader_train = free.epochs(args.epochs), free.replay(loader_train)
"""
NAFLEX = """\
    free = FreeAdversarial(eps=4 / 255, replays=2, mean=data_config['mean'][0], std=data_config['std'][0],
                           accumulate=args.grad_accum_steps, key=(0, 'patches'))
    args.epochs, loader_train = free.epochs(args.epochs), free.replay(loader_train)
"""
LATEST = "                latest_metric = eval_metrics[eval_metric]\n"
JUDGE = """\
                from free_adv import evaluate
                eval_metrics["robust"] = evaluate(model, loader_eval, free.threat, steps=10, sharded=args.distributed).robust
"""
# Nothing here changes what the script does: it counts, and says so when the script ends.
COUNTS = """\
    import atexit, json
    from tests.internals import buffers, counted
    counts = counted(free)
    step_, before_ = optimizer.step, [p.detach().clone() for p in model.parameters()]
    def counted_step(*args, **kwargs):
        counts['step'] += 1
        return step_(*args, **kwargs)
    optimizer.step = counted_step
    atexit.register(lambda: print('COUNTS', json.dumps({
        **counts, 'length': len(loader_train), 'delta': free.delta.abs().max().item() * 255,
        'rows': max(map(len, buffers(free).values())),
        'mixup': getattr(wrapped, 'mixup_enabled', None),
        'finite': all(bool(p.isfinite().all()) for p in model.parameters()),
        'moved': any(not torch.equal(p, q) for p, q in zip(model.parameters(), before_)),
    })))
"""


@pytest.fixture(scope="session")
def source():
    """The text of timm's training script."""
    if path := os.environ.get("TIMM_TRAIN"):
        return Path(path).read_text()
    try:
        with urllib.request.urlopen(URL, timeout=30) as answer:
            return answer.read().decode()
    except urllib.error.URLError as error:
        pytest.skip(
            f"timm's train.py is not to be had ({error.reason}); TIMM_TRAIN may name a copy"
        )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An ImageFolder of three digits, 24 images to train on and 6 to validate, 32 pixels a side."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for label in range(3):
        for index, image in enumerate(images[labels == label][:10]):
            split = "train" if index < 8 else "validation"
            path = root / split / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (image.reshape(8, 8) * 255 / 16).astype("uint8")
            Image.fromarray(pixels).resize((32, 32)).convert("RGB").save(path)
    return root


def insert(source, recipe):
    assert source.count(ANCHOR) == 1
    assert source.count("\nimport torch\n") == 1
    source = source.replace("\nimport torch\n", f"\nimport torch\n{IMPORT}")
    return source.replace(ANCHOR, "    wrapped = loader_train\n" + recipe + COUNTS + ANCHOR)


OPTIONS = (
    "--device cpu --model test_resnet --img-size 32 --num-classes 3 --batch-size 4 --lr 0.01 "
    "--epochs 4 --warmup-epochs 0 --workers 0 --log-interval 1 "
)


def train(source, folder, tmp_path, options="", recipe=RECIPE, epochs=2):
    """Run the script for two epochs of six batches, replayed twice; its counts and learning rates."""
    script = tmp_path / "train.py"
    script.write_text(insert(source, recipe))
    command = [sys.executable, script, "--data-dir", folder, "--output", tmp_path / "out"]
    command += (OPTIONS + options).split()
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(re.search("^COUNTS (.*)$", done.stdout, re.M)[1])
    assert counts["ascend"] == counts["move"] == epochs * counts["length"]
    assert counts["delta"] == pytest.approx(4)
    assert counts["finite"]
    assert counts["moved"]
    rates = [float(rate) for rate in re.findall(r"LR: (\S+)", done.stderr)]
    return counts, rates


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--no-prefetcher",
        "--mixup 0.8 --cutmix 1.0",
        "--mixup 0.8 --cutmix 1.0 --no-prefetcher",
        "--amp --amp-dtype bfloat16",
        "--amp --amp-dtype float16",
        "--model-dtype bfloat16",
        "--model-ema --model-ema-decay 0.9",
        "--reprob 0.5",
        "--reprob 0.5 --remode pixel --no-prefetcher",
        "--channels-last --clip-grad 1.0",
        "--grad-checkpointing",
        "--save-images",
        "--opt muon",
        "--train-img-sizes 32 64",
        "--torchcompile aot_eager",
    ],
)
def test_every_replay_of_the_script_is_adversarial(source, folder, tmp_path, options):
    counts, _ = train(source, folder, tmp_path, options)
    assert counts["step"] == counts["ascend"]


@pytest.mark.parametrize("options", ["", "--no-prefetcher"])
def test_accumulation_steps_once_for_each_replayed_group(source, folder, tmp_path, options):
    counts, _ = train(source, folder, tmp_path, f"--grad-accum-steps 2 {options}")
    assert counts["rows"] == 2 * 4  # both batches of a group have a delta of their own
    assert counts["length"] == 12
    assert counts["step"] == 2 * 12 / 2


def test_a_short_last_group_still_hands_over_every_gradient(source, folder, tmp_path):
    counts, _ = train(source, folder, tmp_path, "--grad-accum-steps 2 --batch-size 8")
    assert counts["length"] == 6  # b1 b2, b1 b2, b3, b3
    assert counts["step"] == 6  # the script makes one step of the last two


@pytest.mark.parametrize(("epoch", "on"), [(1, False), (9, True)])
def test_mixup_is_switched_off_through_the_wrapper(source, folder, tmp_path, epoch, on):
    counts, _ = train(source, folder, tmp_path, f"--mixup 0.8 --mixup-off-epoch {epoch}")
    assert counts["mixup"] is on


def test_the_schedule_per_update_reaches_its_end(source, folder, tmp_path):
    options = "--sched cosine --min-lr 0 --sched-on-updates"
    _, rates = train(source, folder, tmp_path, options)
    assert len(rates) == 24
    assert rates == sorted(set(rates), reverse=True)
    assert rates[-1] < 0.01 * rates[0]


def test_the_schedule_per_epoch_is_constant_over_the_replays(source, folder, tmp_path):
    _, rates = train(source, folder, tmp_path, "--sched cosine --min-lr 0")
    assert rates == [0.01] * 12 + [0.005] * 12


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's datasets
def test_the_best_checkpoint_of_the_script_is_the_one_with_the_best_robust_accuracy(
    source, folder, tmp_path
):
    assert source.count(LATEST) == 1
    source = source.replace(LATEST, JUDGE + LATEST)
    options = "--eval-metric robust --epochs 12 --lr 0.1 --sched step --decay-milestones 100"
    train(source, folder, tmp_path, options, epochs=6)
    (out,) = (tmp_path / "out").iterdir()
    metrics = {}
    for file in out.glob("*.pth.tar"):
        saved = torch.load(file, weights_only=False)
        metrics[file.name] = saved["metric"]
        model = timm.create_model("test_resnet", num_classes=3)
        model.load_state_dict(saved["state_dict"])
        config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
        images = timm.data.create_dataset("", root=str(folder / "validation"))
        images.transform = timm.data.create_transform(**config)
        threat = ThreatModel(4 / 255, mean=config["mean"], std=config["std"])
        loader = torch.utils.data.DataLoader(images, 4)
        found = evaluate(model, loader, threat, steps=10, progress=False)
        assert found.robust == saved["metric"]
    assert len(metrics) > 2
    assert metrics.pop("model_best.pth.tar") == max(metrics.values()) > min(metrics.values())


def test_naflex_batches_train_with_one_mean_and_std(source, folder, tmp_path):
    options = (
        "--model naflexvit_base_patch16_siglip --naflex-loader --naflex-train-seq-lens 16 64 "
        "--naflex-max-seq-len 64 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 "
        "--model-kwargs patch_size=4 embed_dim=48 depth=2 num_heads=2"
    )
    counts, _ = train(source, folder, tmp_path, options, recipe=NAFLEX)
    assert counts["step"] == counts["ascend"]
