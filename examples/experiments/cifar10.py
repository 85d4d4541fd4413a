"""CIFAR-10, CIFAR-100 or any folder of small images: natural, Free, PGD-7 and FGSM-RS training by one script.

    python examples/experiments/cifar10.py --data DIR --download --method free --out runs/free

`--data` is a torchvision root of CIFAR, or a folder with `train/` and `test/` (or `val/`), each with one folder
of images a class. The cost is stated in natural passes over the data: every method makes as many updates. Run the
same command again and it goes on where it was, bit for bit as far as the device's kernels are deterministic; it
ends with a table, `result.json` and `curves.png`. Only free-public, which is there to compare with, starts anew.
"""

import argparse
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import plots
import torch
from arguments import fraction
from methods import METHODS, batches, updates_per_batch
from nets import Standardise, augment, create
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
        "replays": 8,
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
    # The best of docs/benchmarks.md at the same cost, on a small network and by less than the noise.
    "best": {"label_smoothing": 0.1},
}
ATTACKS: dict[str, dict[str, Any]] = {  # with steps of eps / 4, 2/255 where eps is 8/255
    "pgd-20": {"steps": 20, "restarts": 10},
    "pgd-20-1": {"steps": 20, "restarts": 1},
    "pgd-50": {"steps": 50, "restarts": 10},
    "cw-50": {"steps": 50, "restarts": 10, "loss": "cw"},
    "autoattack": {"attack": "autoattack"},
}
NOT_OF_TRAINING = (
    *("recipe", "data", "download", "out", "save_every", "device"),
    *("attacks", "weights", "test_images", "hard_images", "test_batch"),
)


def read(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor, list[str]]:
    """All images, uint8 of shape (N, 3, H, W), their labels and the names of the classes."""
    for name, kind in (
        ("cifar-10-batches-py", datasets.CIFAR10),
        ("cifar-100-python", datasets.CIFAR100),
    ):
        if (root / name).is_dir() or (download and kind is datasets.CIFAR10):
            data = kind(root, train, download=download)
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
            return pixels, torch.tensor(data.targets), data.classes
    folders = [root / name for name in (["train"] if train else ["test", "val"])]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise SystemExit(f"--data {root}: neither a root of CIFAR nor train/ and test/ (or val/)")
    files = datasets.ImageFolder(folder)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda s: np.asarray(files.loader(s[0])), files.samples))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels, torch.tensor(files.targets), files.classes


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
        net = create(args.model, classes, args.activation, args.pretrained)
        self.model = nn.Sequential(Standardise(MEAN, STD), net).to(
            self.device, memory_format=layout
        )
        if args.init:
            self.model.load_state_dict(load(args.init, self.device)["weights"])
        self.ema = AveragedModel(self.model, multi_avg_fn=self.average, use_buffers=True)
        self.forward = torch.compile(self.model) if args.compile else self.model
        groups = param_groups_weight_decay(self.model, args.weight_decay)
        self.optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=args.nesterov)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and args.norm_momentum is not None:
                module.momentum = args.norm_momentum
        self.threat, self.judged_by = ThreatModel(args.eps), ThreatModel(args.test_eps or args.eps)
        self.free = FreeAdversarial(
            eps=args.eps,
            replays=args.replays,
            step_size=args.step_size,
            start=args.start,
            window=args.window,
        )
        held = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held, rest = held[: args.held_out], held[args.held_out :]
        rest = rest[: args.images]
        to = {"device": self.device, "memory_format": layout}
        settings = layout, args.batch_size, args.pad, args.seed
        self.loader = Loader(images[rest].to(**to), labels[rest].to(self.device), *settings)
        if not len(self.loader):
            raise SystemExit(
                f"--batch-size {args.batch_size} exceeds the {len(rest)} training images"
            )
        x, y = (images[held].float() / 255).to(**to), labels[held].to(self.device)
        self.held_out = list(zip(x.split(500), y.split(500), strict=True)) if len(held) else []
        self.total = round(args.passes * len(rest) / args.batch_size)
        if not self.total:
            raise SystemExit(
                f"--passes {args.passes:g} are not one update of {args.batch_size} images"
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
        self.starts = torch.Generator(self.device).manual_seed(args.seed)
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"score": -math.inf}
        self.judge = "clean" if args.method == "natural" else "robust"
        self.losses, self.since = torch.zeros((), device=self.device), 0  # since the last look
        self.free.report()  # from now on

    def average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        """Exponential moving average whose horizon grows until it is that of `--ema`."""
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.amp)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

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
            "starts": self.starts.get_state(),
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
        self.starts.set_state(state["starts"].cpu())
        set_random_state(state["random"])

    def updates(self):
        """Make the remaining updates; yield the loss after each."""
        args = self.args
        settings = (self.free, args.replays, self.starts, self.autocast)
        source = batches(args.method, self.loader, self.forward, self.threat, *settings)
        self.model.train()
        while self.step < self.total:
            for x, y in source:
                with self.autocast():
                    loss = self.criterion(self.forward(x), y)
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.schedule.step()
                if args.ema:
                    self.ema.update_parameters(self.model)
                self.step += 1
                yield loss.detach()
                if self.step == self.total:
                    return

    def noted(self) -> dict[str, list[float | None]]:
        """What the replays have seen since the last look, or since the run went on; None where nothing was."""
        report = self.free.report()
        keys = ("alignment", "edge") if self.args.method == "free" else ()
        return {k: [None if math.isnan(v) else v for v in report[k]] for k in keys}

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
        args, checkpoint = self.args, self.args.out / "last.pt"
        if checkpoint.exists():
            self.go_on(load(checkpoint, self.device))
        looks = {round(self.total * (i + 1) / args.looks) for i in range(args.looks)}
        clocks = time.perf_counter, time.process_time
        bar = tqdm(total=self.total, initial=self.step, desc=args.method, unit="update")
        marks = [clock() for clock in clocks]
        for loss in self.updates():
            self.losses += loss
            self.since += 1
            bar.update()
            look = self.step in looks
            if look or self.step % args.save_every == 0:
                self.losses.item()  # waits for the GPU
                wall, cpu = (clock() - mark for clock, mark in zip(clocks, marks, strict=True))
                self.seconds, self.cpu_seconds = self.seconds + wall, self.cpu_seconds + cpu
                if look:
                    self.look()
                    row = self.curve[-1]
                    bar.set_postfix(
                        {k: f"{row[k]:.3f}" for k in ("loss", "clean", "robust") if k in row}
                    )
                if args.method != "free-public":  # its delta is not kept: it starts anew
                    save(checkpoint, self.state())
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
    curve, method = record["curve"], record["arguments"]["method"]
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
    run = {"label": method, "curve": curve, "cost": curve[-1]["update"]}
    plots.curves(left, [run], "loss")
    left.set(xlabel="update", ylabel="training loss")
    for key, colour in (("clean", plots.BLUE), ("robust", plots.RED)):
        if key in curve[0]:
            plots.curves(right, [run | {"label": key}], key, colour)
            right.legend()
    right.set(xlabel="update", ylabel="held-out accuracy (%)", ylim=(0, 100))
    right.set_title("robust: under PGD-10", fontsize="medium")
    plots.save(figure, path)


def whole(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="root of CIFAR, or folders of images")
    add("--download", action="store_true", help="fetch CIFAR-10 into --data")
    add("--out", type=Path, default=Path("runs/cifar10"), help="folder of the run; goes on in it")
    add("--recipe", choices=RECIPES, default="default", help="defaults of what follows")
    add("--method", choices=METHODS[:6], default="free")
    add("--model", default="resnet18", help="resnet18, preactresnet18, wrn-d-k, cnn-w or timm's")
    add("--activation", choices=["relu", "leaky", "silu", "gelu"], default="relu")
    add("--pretrained", action="store_true", help="begin with timm's weights")
    add("--init", type=Path, help="begin with the weights.pt of another run")
    add("--replays", type=whole, default=8, help="the paper's m")
    add("--window", type=whole, default=1, help="minibatches that take turns in Free")
    add("--passes", type=float, default=200.0, help="natural passes over the data: the cost")
    add("--eps", type=fraction, default=8 / 255, help="linf radius, pixels in [0, 1]")
    add("--test-eps", type=fraction, help="radius of the attacks, if it is not that of training")
    add(
        "--step-size",
        type=fraction,
        help="ascent step of Free, in the units of eps, which is the default",
    )
    add("--start", choices=["carry", "zero", "uniform"], default="carry", help="delta of Free")
    add("--batch-size", type=whole, default=128, help="of an update")
    add("--lr", type=float, default=0.1, help="peak of the schedule")
    add("--schedule", choices=["onecycle", "multistep"], default="onecycle")
    add("--warmup", type=float, default=0.3, help="share of the updates that onecycle warms up in")
    add("--weight-decay", type=float, default=5e-4, help="on kernels, not on norms and biases")
    add("--nesterov", action="store_true")
    add("--label-smoothing", type=float, default=0.0)
    add("--norm-momentum", type=float, help="of batch norm's running statistics")
    add("--pad", type=int, default=4, help="random crops of the image padded by this")
    add("--ema", type=float, default=0.0, help="decay of the averaged weights, such as 0.9995")
    add("--amp", choices=["none", "bf16", "fp16"], default="none")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")
    add("--images", type=int, help="train on this many, a fixed choice; all by default")
    add("--held-out", type=int, default=1000, help="training images that choose the checkpoint")
    add("--looks", type=whole, default=20, help="how often they are attacked, with PGD-10")
    add("--save-every", type=whole, default=1000, help="updates between two checkpoints")
    add("--attacks", nargs="*", choices=ATTACKS, default=["pgd-20", "pgd-50", "autoattack"])
    add("--test-images", type=int, help="attack this many, a fixed choice; all by default")
    add("--hard-images", type=int, help="of them for attacks with restarts and AutoAttack")
    add("--weights", nargs="+", choices=["best", "last"], default=["best"], help="to be attacked")
    add("--test-batch", type=whole, default=500)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    images, labels, classes = read(args.data, True, args.download)
    *tested, others = read(args.data, False, args.download)
    if classes != others:
        raise SystemExit(f"--data {args.data}: the classes to train on and to test on differ")
    if "autoattack" in args.attacks and len(classes) < 4:
        raise SystemExit(f"--attacks autoattack needs at least 4 classes, here are {len(classes)}")
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
        "updates_per_batch": updates_per_batch(args.method, args.replays),
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
    print(f"written: {args.out}/result.json, curves.png, weights.pt")
    return record


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the same command goes on
        sys.exit(128 + signal.SIGINT)
