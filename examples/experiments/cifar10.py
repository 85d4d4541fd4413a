"""CIFAR-10, CIFAR-100 or any folder of small images: natural, Free, N-FGSM, FGSM-RS and PGD-7 training.

    python examples/experiments/cifar10.py --data DIR --download --method free --out runs/free

`--data` is a torchvision root of CIFAR, or a folder with `train/` and `test/` (or `val/`), each with one folder
of images a class. The cost is stated in natural passes over the data, and an ascent costs two thirds of an update, so
that a method with more ascents makes fewer updates. Run the same command again and it goes on where it was, bit for
bit as far as the device's kernels are deterministic; Ctrl-C loses nothing. It ends with a row for each attack,
`result.json` and `curves.png`. Only free-public, which is there to compare with, starts anew.
"""

import argparse
import contextlib
import math
import pickle
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import methods
import numpy as np
import plots
import torch
from images import class_folders
from interrupts import Interrupts
from nets import Standardise, augment, create
from options import Help, at_least, demand_autoattack, radius
from records import environment, load, plain, random_state, save, set_random_state, write
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets
from tqdm import tqdm

from free_adv import FreeAdversarial, ThreatModel, evaluate

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RECIPES: dict[str, dict[str, Any]] = {
    # Shafahi et al. 2019, as in the authors' TensorFlow code: 80,000 updates, without a held-out split.
    "paper": {
        "model": "wrn-34-10",
        "activation": "leaky",
        "passes": 204.8,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "multistep",
        "weight_decay": 2e-4,
        "pad": 2,
        "held_out": 0,
        "ema": 0.0,
        "label_smoothing": 0.0,
    },
    "default": {},
    # docs/benchmarks.md: the most robust at the cost of natural training.
    "best": {"method": "n-fgsm"},
}
ATTACKS: dict[str, dict[str, Any]] = {  # with steps of eps / 4, 2/255 where eps is 8/255
    "pgd-20": {"steps": 20, "restarts": 10},
    "pgd-20-1": {"steps": 20, "restarts": 1},
    "pgd-50": {"steps": 50, "restarts": 10},
    "cw-40": {"steps": 40, "restarts": 6, "loss": "cw"},
    "cw-50": {"steps": 50, "restarts": 10, "loss": "cw"},
    "autoattack": {"attack": "autoattack"},
}
NOT_OF_TRAINING = (
    *("recipe", "data", "download", "out", "save_every", "device"),
    *("attacks", "weights", "test_images", "hard_images", "test_batch", "dry_run"),
)
DRY = {  # the most that a dry run does
    "batch_size": 8,
    "replays": 2,
    "window": 2,
    "passes": 2.0,
    "images": 16,
    "held_out": 8,
    "looks": 2,
    "test_images": 8,
    "test_batch": 8,
}
WRITTEN = "written: {}/result.json, curves.png, weights.pt"
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports after Ctrl-C


def read(
    root: Path, train: bool, download: bool, few: int | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """All images, uint8 of shape (N, 3, H, W), their labels and the names of the classes.

    Args:
        root: As `--data`.
        train: The images to train on, or to test on.
        download: Fetch CIFAR-10 if it is not there.
        few: So many only, of all classes.

    Raises:
        SystemExit: There are no such images.
    """
    if not root.is_dir() and not download:
        raise SystemExit(f"--data {root}: there is no such folder; --download fetches CIFAR-10")
    for name, kind in (
        ("cifar-10-batches-py", datasets.CIFAR10),
        ("cifar-100-python", datasets.CIFAR100),
    ):
        if (root / name).is_dir() or (download and kind is datasets.CIFAR10):
            try:
                data = kind(root, train, download=download)
            except (OSError, RuntimeError) as error:  # no network, or files that are broken
                raise SystemExit(f"--data {root}: CIFAR cannot be read: {error}") from None
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
            return pixels[:few], torch.tensor(data.targets)[:few], data.classes
    folders = [root / name for name in (["train"] if train else ["test", "val"])]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise SystemExit(
            f"--data {root}: neither a root of CIFAR nor train/ and test/ (or val/); --download fetches CIFAR-10"
        )
    files = class_folders(f"--data {root}", folder)
    samples = files.samples[:: -(-len(files.samples) // few) if few else 1]

    def pixels_of(sample: tuple[str, int]) -> np.ndarray:
        try:
            return np.asarray(files.loader(sample[0]))
        except OSError:
            raise SystemExit(
                f"--data {root}: {sample[0]} cannot be read as an image; remove it"
            ) from None

    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(pixels_of, samples))
    for image, (file, _) in zip(images, samples, strict=True):
        if image.shape != images[0].shape:
            (height, width), (first_height, first_width) = image.shape[:2], images[0].shape[:2]
            raise SystemExit(
                f"--data {root}: images are of different sizes, {first_width}x{first_height} in {samples[0][0]} and "
                f"{width}x{height} in {file}: resize them to one size, or use imagenet.py, which crops"
            )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels, torch.tensor([label for _, label in samples]), files.classes


class Loader:
    """Shuffled, augmented batches of images in memory; `(epoch, taken)` is its whole position.

    The order of an epoch and the augmentation of a batch have seeds of their own, so going on from a
    position needs nothing else.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        layout: torch.memory_format,
        batch_size: int,
        pad: int,
        seed: int,
    ):
        self.images, self.labels, self.layout = images, labels, layout
        self.batch_size, self.pad, self.seed = batch_size, pad, seed
        self.epoch = self.taken = 0

    def __len__(self):
        return len(self.images) // self.batch_size

    def __iter__(self):
        order = torch.randperm(len(self.images), generator=self.generator(self.epoch, 0))
        order = order.to(self.images.device)
        while self.taken < len(self):
            index = order[self.taken * self.batch_size :][: self.batch_size]
            self.taken += 1
            x, y = self.images[index].float() / 255, self.labels[index]
            x = augment(x, self.generator(self.epoch, self.taken), self.pad)
            yield x.contiguous(memory_format=self.layout), y
        self.epoch, self.taken = self.epoch + 1, 0

    def generator(self, *position: int):
        seed = np.random.SeedSequence([self.seed, *position]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed) >> 1)


class Run:
    """One training: everything that moves, what it saves, and one update after another."""

    PLAIN = "step", "seconds", "cpu_seconds", "curve", "best", "losses", "since"

    def __init__(self, args: argparse.Namespace, images: Tensor, labels: Tensor, classes: int):
        self.args, self.device = args, torch.device(args.device)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        torch.manual_seed(args.seed)
        try:
            net = create(args.model, classes, args.activation, args.pretrained)
        except (ValueError, RuntimeError, OSError) as error:
            raise SystemExit(f"--model {args.model}: {error}") from None
        self.model = nn.Sequential(Standardise(MEAN, STD), net).to(
            self.device, memory_format=layout
        )
        if args.init:
            self.begin_with(args.init)
        self.ema = AveragedModel(self.model, multi_avg_fn=self.average, use_buffers=True)
        self.forward = torch.compile(self.model) if args.compile else self.model
        groups = param_groups_weight_decay(self.model, args.weight_decay)
        self.optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=args.nesterov)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and args.norm_momentum is not None:
                module.momentum = args.norm_momentum
        self.judged_by = ThreatModel(args.test_eps or args.eps)
        names = "eps", "replays", "window", "step_size", "start", "ascents", "noise"
        self.free = FreeAdversarial(
            objective=lambda batch: self.scaler.scale(self.loss(*batch)),
            **{name: getattr(args, name) for name in names},
        )
        if args.held_out >= len(images):
            raise SystemExit(
                f"--held-out {args.held_out} leaves nothing to train on of {len(images)} images: take fewer, or 0"
            )
        held = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held, rest = held[: args.held_out], held[args.held_out :]
        rest = rest[: args.images]
        to = {"device": self.device, "memory_format": layout}
        settings = layout, args.batch_size, args.pad, args.seed
        self.loader = Loader(images[rest].to(**to), labels[rest].to(self.device), *settings)
        if not len(self.loader):
            raise SystemExit(
                f"--batch-size {args.batch_size} exceeds the {len(rest)} training images: take a smaller one"
            )
        x, y = (images[held].float() / 255).to(**to), labels[held].to(self.device)
        self.held_out = list(zip(x.split(500), y.split(500), strict=True)) if len(held) else []
        self.total, self.changes = methods.plan(args, args.passes * len(rest) / args.batch_size)
        if not self.total:
            raise SystemExit(
                f"--passes {args.passes:g} are not one update of {args.batch_size} images: take more passes"
            )
        if args.schedule == "multistep":
            cuts = [self.total // 2, self.total * 3 // 4]
            self.schedule: Any = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, cuts)
        else:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, args.lr, self.total, pct_start=args.warmup, cycle_momentum=False
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"score": -math.inf}
        self.judge = "clean" if args.method == "natural" else "robust"
        self.losses, self.since = torch.zeros((), device=self.device), 0  # since the last look
        self.free.report()  # from now on

    def begin_with(self, file: Path) -> None:
        """Take over the weights of another run."""
        if not file.is_file():
            raise SystemExit(f"--init {file}: there is no such file; it is the weights.pt of a run")
        try:
            self.model.load_state_dict(load(file, self.device)["weights"])
        except (KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            reason = (str(error).strip().splitlines() or [""])[-1].strip()
            raise SystemExit(
                f"--init {file} does not fit --model {self.args.model}: {reason}"
            ) from None

    def average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        """Exponential moving average whose horizon grows until it is that of `--ema`."""
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.amp)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss, which the ascents climb as well."""
        with self.autocast():
            return self.criterion(self.forward(x), y)

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated."""
        return self.ema.module if self.args.ema else self.model

    def state(self) -> dict[str, Any]:
        names = ("model", "ema", "optimizer", "schedule", "scaler", "free")
        return {
            **{name: getattr(self, name).state_dict() for name in names},
            **{n: getattr(self, n) for n in self.PLAIN},
            "position": [self.loader.epoch, self.loader.taken],
            "random": random_state(),
            "identity": self.identity(),
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same in a run that goes on: arguments, data and first weights."""
        data = {"images": len(self.loader.images), "labels": int(self.loader.labels.sum())}
        init = str(self.args.init.resolve()) if self.args.init else None
        return {**of_training(arguments(self.args)), "init": init, "the data": data}

    def go_on(self, state: dict[str, Any]) -> None:
        """Take over a `state`."""
        was, now = state["identity"], self.identity()
        for name in now:
            if was.get(name) != now[name]:
                raise SystemExit(
                    f"{self.args.out} holds a run with --{name.replace('_', '-')} {was.get(name)}, not "
                    f"{now[name]}: choose another --out, or remove it to start anew"
                )
        for name in ("model", "ema", "optimizer", "schedule", "scaler", "free"):
            getattr(self, name).load_state_dict(state[name])
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.loader.epoch, self.loader.taken = state["position"]
        set_random_state(state["random"])

    def updates(self):
        """Make the remaining updates; yield the loss after each."""
        args = self.args
        settings = self.free, self.forward, self.autocast
        source = methods.batches(args.method, self.loader, *settings)
        self.model.train()
        methods.change(self.free, self.changes.get(self.step, {}))
        while self.step < self.total:
            for x, y in source:
                loss = self.loss(x, y)
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.schedule.step()
                if args.ema:
                    self.ema.update_parameters(self.model)
                self.step += 1
                methods.change(self.free, self.changes.get(self.step, {}))
                yield loss.detach()
                if self.step == self.total:
                    return

    def noted(self) -> dict[str, list[float | None]]:
        """What the replays have seen since the last look, or since the run went on; None where nothing was."""
        report = self.free.report()
        keys = ("alignment", "edge", "ascents") if self.args.method in methods.SETTINGS else ()
        return {k: [None if math.isnan(v) else v for v in report[k]] for k in keys if report[k]}

    def look(self) -> None:
        """Attack the held-out images; keep these weights if they are the best so far."""
        loss = self.losses.item() / self.since
        if not math.isfinite(loss):
            raise SystemExit(f"update {self.step}: the loss is {loss}; try a lower --lr")
        self.losses, self.since = torch.zeros_like(self.losses), 0
        row = {"update": self.step, "lr": self.schedule.get_last_lr()[0], "loss": loss}
        row |= self.noted()
        if self.held_out:
            found = evaluate(self.judged, self.held_out, self.judged_by, steps=10, progress=False)
            row |= {"clean": found.clean, "robust": found.robust}
        score = row.get(self.judge, math.inf)
        if score >= self.best["score"]:
            weights = {k: v.clone() for k, v in self.judged.state_dict().items()}
            self.best = {"score": score, "update": self.step, "weights": weights}
        self.curve.append(row)

    def train(self) -> None:
        """Go on to the end, with a look every now and then and a checkpoint after each."""
        checkpoint = self.args.out / "last.pt"
        if checkpoint.exists():
            self.go_on(load(checkpoint, self.device))
            print(f"goes on from update {self.step} of {self.total}, {checkpoint}")
        with Interrupts(signal.SIGINT) as stop:
            self.to_the_end(checkpoint, stop)

    def to_the_end(self, checkpoint: Path, stop: Interrupts) -> None:
        """Make the updates that are left, or those before Ctrl-C, after which the process ends."""
        args, kept = self.args, self.args.method != "free-public"  # its delta is not kept
        looks = {round(self.total * (i + 1) / args.looks) for i in range(args.looks)}
        clocks = time.perf_counter, time.process_time
        bar = tqdm(total=self.total, initial=self.step, desc=args.method, unit="update")
        marks = [clock() for clock in clocks]
        for loss in self.updates():
            self.losses += loss
            self.since += 1
            bar.update()
            look, stopped = self.step in looks, stop.wanted
            if look or stopped or self.step % args.save_every == 0:
                self.losses.item()  # waits for the GPU
                wall, cpu = (clock() - mark for clock, mark in zip(clocks, marks, strict=True))
                self.seconds, self.cpu_seconds = self.seconds + wall, self.cpu_seconds + cpu
                if look:
                    self.look()
                    row = self.curve[-1]
                    bar.set_postfix(
                        {k: f"{row[k]:.3f}" for k in ("loss", "clean", "robust") if k in row}
                    )
                if kept:
                    save(checkpoint, self.state())
                if stopped:
                    bar.close()
                    told = f"stopped after update {self.step} of {self.total}: the same command goes on from there, {checkpoint}"
                    print(told if kept else f"stopped: {args.method} starts anew", file=sys.stderr)
                    raise SystemExit(INTERRUPTED)
                marks = [clock() for clock in clocks]
        bar.close()


def of_training(record: dict[str, Any]) -> dict[str, Any]:
    """The arguments on which the trained weights depend."""
    return {k: v for k, v in record.items() if k not in NOT_OF_TRAINING}


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as plain values, and of paths only the names."""
    return {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}


def test(run: Run, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Attack the weights that are asked for; print a row for each attack."""
    args, rows = run.args, []
    model, same = run.judged, run.best["update"] == run.step
    last = {k: v.clone() for k, v in model.state_dict().items()}
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (t[chosen[: args.test_images]] for t in (images, labels))
    loader = [
        ((a.float() / 255).to(run.device), b.to(run.device))
        for a, b in zip(x.split(args.test_batch), y.split(args.test_batch), strict=True)
    ]
    for weights, name in ((w, a) for w in args.weights for a in args.attacks):
        if twin := next((r for r in rows if r["name"] == name and same), None):
            rows.append({**twin, "weights": weights})  # the last weights are the best
            continue
        model.load_state_dict(last if weights == "last" else run.best["weights"])
        settings = dict(ATTACKS[name])
        if args.dry_run:
            if "steps" not in settings:
                continue  # AutoAttack takes minutes
            settings |= {"steps": 2, "restarts": 1}
        if "steps" in settings:
            settings["step_size"] = run.judged_by.eps / 4
        hard = args.hard_images if settings.get("restarts", 10) > 1 else None
        start = time.perf_counter()
        found = evaluate(
            model, loader[: hard and -(-hard // args.test_batch)], run.judged_by, **settings
        )
        print(found)
        row = {"name": name, "weights": weights, **settings, **plain(found)}
        rows.append({**row, "seconds": time.perf_counter() - start})
    return rows


def draw(record: dict[str, Any], path: Path) -> None:
    """Training loss and accuracy on the held-out images along the run."""
    curve = record["curve"]
    aligned = "alignment" in curve[0]
    figure, axes = plots.plt.subplots(1, 2 + aligned, figsize=(9 + 3 * aligned, 3.4))
    left, right = axes[:2]
    if aligned:
        updates = [row["update"] for row in curve]
        for i in sorted(
            {0, 1, len(curve[0]["alignment"]) - 1} & {*range(len(curve[0]["alignment"]))}
        ):
            values = [row["alignment"][i] for row in curve]
            axes[2].plot(
                updates, [math.nan if v is None else v for v in values], label=f"replay {i + 1}"
            )
        axes[2].set(xlabel="update", ylabel="cosine of delta and gradient")
        axes[2].legend()
    looks = [row for row in curve if "robust" in row]
    plots.learning(left, right, record["arguments"]["method"], curve, looks)
    plots.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument(
        "--recipe", choices=RECIPES, default="default", help="gives other arguments their defaults"
    )
    line = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(description=line, formatter_class=Help, parents=[recipe])
    add, whole, count = parser.add_argument, at_least(1), at_least(0)
    add("--data", type=Path, required=True, help="root of CIFAR, or folders of images")
    add("--download", action="store_true", help="fetch CIFAR-10 into --data")
    add("--out", type=Path, default=Path("runs/cifar10"), help="folder of the run; goes on in it")
    add("--dry-run", action="store_true", help="a few updates on a few images, to see that it runs")
    add("--method", choices=methods.METHODS[:6], default="free", help="how to train")
    add("--model", default="resnet18", help="resnet18, preactresnet18, wrn-d-k, cnn-w or timm's")
    activations = ["relu", "leaky", "silu", "gelu"]
    add(
        "--activation",
        choices=activations,
        default="relu",
        help="of the models that are not timm's",
    )
    add("--pretrained", action="store_true", help="begin with timm's weights")
    add("--init", type=Path, help="begin with the weights.pt of another run")
    passes = "natural passes over the data: the cost"
    add("--passes", type=float, default=200.0, help=passes)
    methods.add_arguments(parser, 8, "8/255")
    radius_of_tests = "radius of the attacks, if another than that of training (default: --eps)"
    add("--test-eps", type=radius, help=radius_of_tests)
    add("--batch-size", type=whole, default=128, help="of an update")
    add("--lr", type=float, default=0.1, help="peak of the schedule")
    add("--schedule", choices=["onecycle", "multistep"], default="onecycle", help="of --lr")
    add("--warmup", type=float, default=0.3, help="share of the updates that onecycle warms up in")
    add("--weight-decay", type=float, default=5e-4, help="on kernels, not on norms and biases")
    add("--nesterov", action="store_true", help="Nesterov's momentum")
    add("--label-smoothing", type=float, default=0.0, help="of the training loss")
    momentum = "of batch norm's running statistics (default: the model's own)"
    add("--norm-momentum", type=float, help=momentum)
    add("--pad", type=count, default=4, help="random crops of the image padded by this")
    add("--ema", type=float, default=0.0, help="decay of the averaged weights, such as 0.9995")
    add("--amp", choices=["none", "bf16", "fp16"], default="none", help="autocast of the training")
    add("--channels-last", action="store_true", help="memory layout of weights and images")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--images", type=whole, help="train on this many, a fixed choice (default: all)")
    add("--held-out", type=count, default=1000, help="training images that choose the checkpoint")
    add("--looks", type=whole, default=20, help="how often they are attacked, with PGD-10")
    add("--save-every", type=whole, default=1000, help="updates between two checkpoints")
    attacks = ["pgd-20", "pgd-50", "autoattack"]
    add("--attacks", nargs="*", choices=ATTACKS, default=attacks, help="on the test images")
    add("--test-images", type=whole, help="attack this many, a fixed choice (default: all)")
    hard = "of them for attacks with restarts and AutoAttack (default: all)"
    add("--hard-images", type=whole, help=hard)
    weights = ["best", "last"]
    add("--weights", nargs="+", choices=weights, default=["best"], help="which are attacked")
    add("--test-batch", type=whole, default=500, help="images that are attacked at once")
    add("--seed", type=int, default=0, help="of weights, order and random starts")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where to train")
    parser.set_defaults(**RECIPES[recipe.parse_known_args(argv)[0].recipe])
    args = parser.parse_args(argv)
    methods.complete(args, 8)
    if args.dry_run:
        for name, most in DRY.items():
            given = getattr(args, name)
            setattr(args, name, most if given is None else min(given, most))
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    with contextlib.ExitStack() as stack:
        if args.dry_run:
            args.out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            record = experiment(args)
        except KeyboardInterrupt:
            print(f"stopped at once: {where(args.out)}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
    kept = "dry run: without AutoAttack, and nothing of it is kept"
    print(kept if args.dry_run else WRITTEN.format(args.out))
    return record


def where(out: Path) -> str:
    """From where the same command would go on."""
    last = out / "last.pt"
    if not last.exists():
        return "nothing was saved yet, and the same command starts anew"
    return f"the same command goes on from update {load(last)['step']}, {last}"


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, attack, and write what came out."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    few = 64 if args.dry_run else None
    images, labels, classes = read(args.data, True, args.download, few)
    *tested, others = read(args.data, False, args.download, few)
    if classes != others:
        only = ", ".join(sorted({*classes} ^ {*others})[:5])
        raise SystemExit(
            f"--data {args.data}: the classes to train on and to test on differ; in one of them only: {only}"
        )
    if "autoattack" in args.attacks:
        demand_autoattack("--attacks autoattack", len(classes))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out} cannot be made: {error.strerror}") from None
    run = Run(args, images, labels, len(classes))
    run.train()
    save(args.out / "weights.pt", {"weights": run.best["weights"]})
    by = {"clean": "clean accuracy", "robust": "PGD-10"}[run.judge]
    chosen = (
        f"by {by} on {args.held_out} held-out training images, the best of {len(run.curve)} looks"
    )
    record = {
        "arguments": arguments(args),
        "environment": environment(run.device),
        "updates": run.total,
        "updates_per_batch": methods.updates_per_batch(args.method, args.replays),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "training_images": len(run.loader.images),
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "weights": f"update {run.best['update']}, {chosen if args.held_out else 'the last'}",
        "curve": run.curve,
    }
    if run.device.type == "cuda":
        record["peak_memory"] = torch.cuda.max_memory_allocated(run.device)
    draw(record, args.out / "curves.png")
    record["results"] = test(run, *tested)
    write(args.out / "result.json", record)
    print(
        f"{args.method}, {run.total} updates in {run.seconds:.0f} s; weights of {record['weights']}"
    )
    return record


if __name__ == "__main__":
    main()
