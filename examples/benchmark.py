"""The cost of a training step by every method, side by side in one process.

    python examples/benchmark.py --models resnet18.a1_in1k:96 vit_tiny_patch16_224:224 --dtype fp32 bf16
    python examples/benchmark.py --loader --models cnn-8:96

In each round every method takes its turn, in an order that rotates; ratios are of turns of the same round. A turn
of Free is a whole minibatch, so what happens once per minibatch counts too. With --loader each turn is a pass over
JPEG files, decoded and augmented in workers. The table shows medians and quartiles over the rounds.
"""

import argparse
import contextlib
import copy
import functools
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import matplotlib
import nets
import records
import torch
from methods import batches, updates_per_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from free_adv import FreeAdversarial, ThreatModel

INPUT_GRAD = "input-grad"  # natural, with the gradient of the input that any adversary needs
COLOURS = {  # Okabe and Ito
    "natural": "#0072B2",
    INPUT_GRAD: "#56B4E9",
    "free": "#D55E00",
    "free-public": "#E69F00",
    "fgsm-rs": "#CC79A7",
    "pgd": "#009E73",
    "pgd-plain": "#000000",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 4 / 255
Batches = Iterable[tuple[Tensor, Tensor]]


class Run:
    """The training by one method: a model, an optimizer and a stream of batches of its own."""

    def __init__(
        self, method: str, model: nn.Module, source: Batches, dtype: str, args: argparse.Namespace
    ) -> None:
        device = torch.device(args.device)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.method, self.model = method, copy.deepcopy(model).to(device).train()
        self.model.to(memory_format=memory_format)
        self.bytes = 3 * sum(p.nbytes for p in self.model.parameters())  # gradients and momentum
        self.bytes += sum(b.nbytes for b in self.model.buffers())
        # The rate is small, so that no method's training gets anywhere: only its cost counts.
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
        self.autocast = contextlib.nullcontext
        if dtype != "fp32":
            self.autocast = functools.partial(torch.autocast, device.type, DTYPES[dtype])
        if args.compile:
            self.model = torch.compile(self.model)
        threat, starts = ThreatModel(EPS), torch.Generator(device)
        free = FreeAdversarial(eps=EPS, replays=args.replays)
        settings = self.model, threat, free, args.replays, starts, self.autocast
        source = endless(source, device, memory_format)
        if method == INPUT_GRAD:
            self.stream = ((x.detach().requires_grad_(), y) for x, y in source)
        else:
            self.stream = iter(batches(method, source, *settings))

    def train(self, updates: int) -> None:
        """Make some updates."""
        for x, y in islice(self.stream, updates):
            with self.autocast():
                loss = functional.cross_entropy(self.model(x), y)
            if self.method == "free-public":
                loss.item()  # its running mean is printed
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()


def endless(source: Batches, device: torch.device, memory_format: torch.memory_format) -> Iterator:
    """Pass after pass over a loader, on the device."""
    while True:
        for x, y in source:
            x = x.to(device, memory_format=memory_format, non_blocking=True)
            yield x, y.to(device, non_blocking=True)


def build(case: str, args: argparse.Namespace) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model of a `name:size` and one batch for it, the same at each call."""
    name, size = case.split(":")
    torch.manual_seed(0)
    model = nn.Sequential(nets.Standardise(*IMAGENET), nets.create(name, 10))
    x, y = torch.rand(args.batch_size, 3, int(size), int(size)), torch.arange(args.batch_size) % 10
    return model, [(x.to(args.device), y.to(args.device))]


def updates_per_turn(method: str, replays: int) -> int:
    """A turn of an attack is one update, which costs as much as a turn of the others."""
    return 1 if method.startswith("pgd") else replays


def peak_on_cpu(case: str, dtype: str, method: str, args: argparse.Namespace) -> int:
    """Bytes that a process needs beyond the parameters, their gradients and momentum."""
    import resource

    def highest() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    before = highest()
    run = Run(method, *build(case, args), dtype, args)
    run.train(max(3, args.replays + 1))
    return highest() - before - run.bytes


def peak_on_cuda(run: Run, before: int) -> int:
    """Bytes that a step needs beyond the parameters, their gradients and momentum."""
    torch.cuda.reset_peak_memory_stats()
    run.train(1)
    return torch.cuda.max_memory_allocated() - before - run.bytes


def synchronisations(run: Run, updates: int) -> float:
    """How often an update makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run.train(updates)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA" in str(w.message) for w in caught) / updates


def timed(run: Run, updates: int, device: torch.device) -> tuple[float, float]:
    """Wall and processor time of an update, in milliseconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter(), time.process_time()
    run.train(updates)
    wait()
    end = time.perf_counter(), time.process_time()
    wall, processor = (1e3 * (e - s) / updates for s, e in zip(start, end, strict=True))
    return wall, processor


def quartiles(values: list[float]) -> dict[str, float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    values = torch.tensor(values, dtype=torch.float64)
    return dict(zip(("q1", "median", "q3"), values.quantile(points).tolist(), strict=True))


def measure(case: str, dtype: str, loaders: dict, args: argparse.Namespace) -> list[dict]:
    """One row for each method."""
    device = torch.device(args.device)
    torch.compiler.reset()
    model, batch = build(case, args)
    runs: dict[str, Run] = {}
    updates, rows = {}, {}
    for method in args.methods:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        run = runs[method] = Run(method, model, loaders.get(method, batch), dtype, args)
        updates[method] = updates_per_turn(method, args.replays)
        if loaders:
            updates[method] = updates_per_batch(method, args.replays) * len(loaders[method])
        for _ in range(2):  # warm-up
            run.train(updates[method])
        rows[method] = {"model": case, "dtype": dtype, "method": method}
        rows[method] |= {"memory": None, "synchronisations": None, "updates": updates[method]}
        if device.type == "cuda":
            rows[method]["memory"] = peak_on_cuda(run, before)
            rows[method]["synchronisations"] = synchronisations(run, updates[method])
    times: dict[str, list] = {method: [] for method in runs}
    order = list(runs)
    for _ in tqdm(range(args.rounds), f"{case} {dtype}", leave=False):
        for method in order:
            times[method].append(timed(runs[method], updates[method], device))
        order = order[1:] + order[:1]
    for method, row in rows.items():
        for kind, clock in enumerate(("wall", "processor")):
            mine = [t[kind] for t in times[method]]
            row[f"{clock}_ms"] = quartiles(mine)
            for other in ("natural", "free"):
                if other in times:
                    ratios = [t / o[kind] for t, o in zip(mine, times[other], strict=True)]
                    row[f"{clock}_to_{other}"] = quartiles(ratios)
    return list(rows.values())


def judge(row: dict, natural: dict, args: argparse.Namespace) -> None:
    """Write down what was aimed at beside what was measured; on a CPU in processor time."""
    gpu = torch.device(args.device).type == "cuda"
    row["clock"] = clock = "wall" if gpu or args.loader else "processor"
    size = int(row["model"].split(":")[1])
    most = 1.01 if gpu else {96: 1.05, 224: 1.03}.get(size)
    row["targets"] = targets = []

    def add(what: str, value: float, most: float = math.inf, least: float = 0.0) -> None:
        target = {"at_least": least} if least else {"at_most": most}
        targets.append({"what": what, **target, "value": value, "met": least <= value <= most})

    if row["method"] == "free" and (args.loader or most):
        most = 1 / args.replays + 0.15 if args.loader else most
        add(f"{clock} time / natural", row[f"{clock}_to_natural"]["median"], most=most)
    if row["method"] == "free" and row["memory"] is not None:
        delta = 4 * 3 * args.batch_size * size**2
        extra = row["memory"] - natural["memory"]
        add("memory beyond natural / delta", extra / delta, most=3)
    least = {"pgd": 5.5, "pgd-plain": 7.5}.get(row["method"])
    if least and not args.loader and f"{clock}_to_free" in row:
        add(f"{clock} time / free", row[f"{clock}_to_free"]["median"], least=least)


def write_images(folder: Path, count: int = 256) -> None:
    """JPEG files of 500x375 pixels in two classes: noise with the spectrum of photographs."""
    from torchvision.transforms.functional import to_pil_image

    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        image = torch.zeros(1, 3, 375, 500)
        for octave in range(1, 8):
            noise = torch.randn(1, 3, 3 * 2**octave, 4 * 2**octave, generator=generator)
            image += functional.interpolate(noise, (375, 500), mode="bicubic") / 2**octave
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        to_pil_image((image[0] * 0.25 + 0.5).clamp(0, 1)).save(path, quality=90)


def image_loader(folder: Path, size: int, args: argparse.Namespace) -> DataLoader:
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(size), transforms.RandAugment(), transforms.ToTensor()]
    data = datasets.ImageFolder(folder, transforms.Compose(steps))
    pin = torch.device(args.device).type == "cuda"
    settings = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    return DataLoader(
        data, args.batch_size, shuffle=True, drop_last=True, pin_memory=pin, **settings
    )


def show(rows: list[dict]) -> None:
    width = max(len(row["model"]) for row in rows)
    head = f"{'model':<{width}}  dtype  {'method':<12}{'ms per update':>24}"
    print(f"{head}{'/ natural':>21}{'cpu / natural':>21}{'MiB':>8}{'syncs':>7}  targets")
    for row in rows:
        times, wall, cpu = (
            "{median:.{n}f} ({q1:.{n}f}-{q3:.{n}f})".format(n=n, **row[key])
            for key, n in (("wall_ms", 2), ("wall_to_natural", 3), ("processor_to_natural", 3))
        )
        memory = "" if row["memory"] is None else f"{row['memory'] / 2**20:.1f}"
        syncs = "" if row["synchronisations"] is None else f"{row['synchronisations']:g}"
        targets = "; ".join(
            f"{t['what']} {t['value']:.2f} {'met' if t['met'] else 'MISSED'}"
            for t in row["targets"]
        )
        print(
            f"{row['model']:<{width}}  {row['dtype']:<7}{row['method']:<12}{times:>24}"
            f"{wall:>21}{cpu:>21}{memory:>8}{syncs:>7}  {targets}"
        )


def draw(path: Path, rows: list[dict]) -> None:
    """Bars of the time of an update, natural's being 1; the whiskers are quartiles."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(f"{row['model']}\n{row['dtype']}" for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(6, 0.35 * len(rows) + 2), 4), layout="constrained")
    for place, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        ratios = [row[f"{row['clock']}_to_natural"] for row in mine]
        heights = [ratio["median"] for ratio in ratios]
        whiskers = [
            [r["median"] - r["q1"] for r in ratios],
            [r["q3"] - r["median"] for r in ratios],
        ]
        at = [group + (place + 0.5) / (len(methods) + 1) for group in range(len(groups))]
        style = {"width": 1 / (len(methods) + 1), "color": COLOURS[method], "capsize": 2}
        axes.bar(at, heights, yerr=whiskers, label=method, **style)
        for x, height in zip(at, heights, strict=True):
            axes.annotate(
                f"{height:.2f}",
                (x, height),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=6,
            )
    middle = len(methods) / (len(methods) + 1) / 2
    axes.set_xticks([group + middle for group in range(len(groups))], groups)
    axes.set_ylabel("time of an update, natural = 1")
    axes.axhline(1, color="grey", linewidth=0.8, zorder=0)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["resnet18:32", "resnet18.a1_in1k:96"],
        metavar="NAME:SIZE",
        help="names of nets.py or timm's, with the side of the images; resnet18 has a 3x3 stem, resnet18.a1_in1k is timm's",
    )
    add("--methods", nargs="+", choices=COLOURS, help="all, or with --loader natural and free")
    add("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="other than fp32 by autocast")
    add("--batch-size", type=int, default=16)
    add("--replays", type=int, default=4, help="the paper's m")
    add("--rounds", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")
    add("--memory", action="store_true", help="on a CPU: peak memory too, in a process per method")
    add("--loader", action="store_true", help="batches from JPEG files, by an epoch per turn")
    add("--workers", type=int, default=2, help="of --loader")
    add("--out", type=Path, help="JSON file")
    add("--plot", type=Path, help="PNG file")
    args = parser.parse_args()
    chosen = args.methods or (["free"] if args.loader else list(COLOURS))
    args.methods = ["natural", *(m for m in COLOURS if m in chosen and m != "natural")]

    cases = [(case, dtype) for case in args.models for dtype in args.dtype]
    memory = {}
    if args.memory and torch.device(args.device).type == "cpu":
        # First of all: a child's high-water mark is never below this process's when it starts.
        # Freed blocks must go back to the system, or they would count as in use.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
        context = multiprocessing.get_context("spawn")
        for case, dtype in cases:
            for method in args.methods:
                with ProcessPoolExecutor(1, context) as child:
                    peak = child.submit(peak_on_cpu, case, dtype, method, args).result()
                memory[case, dtype, method] = peak
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.loader:
            write_images(Path(folder))
        for case, dtype in cases:
            size = int(case.split(":")[1])
            loaders = {m: image_loader(folder, size, args) for m in args.methods if args.loader}
            rows += measure(case, dtype, loaders, args)
    for row in rows:
        row["memory"] = memory.get((row["model"], row["dtype"], row["method"]), row["memory"])
    natural = {(row["model"], row["dtype"]): row for row in rows if row["method"] == "natural"}
    for row in rows:
        judge(row, natural[row["model"], row["dtype"]], args)
    show(rows)
    if args.plot:
        draw(args.plot, rows)
    if args.out:
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        result = {"arguments": arguments, "environment": records.environment(args.device)}
        records.write(args.out, result | {"rows": rows})


if __name__ == "__main__":
    main()
