"""The cost of a training step by every method, side by side in one process.

    python examples/benchmarks/benchmark.py --models resnet18.a1_in1k:96 vit_tiny_patch16_224:224 --amp none bf16
    python examples/benchmarks/benchmark.py --loader --models cnn-8:32 --workers 1

In each round every method takes its turn, in an order that rotates; ratios are of turns of the same round. A turn
of Free is a whole minibatch, so what happens once per minibatch counts too. With --loader each turn is a pass over
JPEG files, decoded and augmented in workers. The table shows medians and quartiles over the rounds.
"""

import argparse
import contextlib
import copy
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import jpegs
import torch
from benchmark_report import (
    COUNTED,
    INPUT_GRAD,
    METHODS,
    ratios,
    show,
    targets,
    verdicts,
    work,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from free_adv import FreeAdversarial

sys.path.append(str(Path(__file__).parents[1] / "experiments"))  # nets, methods, plots, records
import nets
import plots
import records
from methods import batches, settings_of, updates_per_batch

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
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.method, self.model = method, copy.deepcopy(model).to(device, memory_format=layout)
        self.bytes = 3 * sum(p.nbytes for p in self.model.parameters())  # gradients and momentum
        self.bytes += sum(b.nbytes for b in self.model.buffers())
        # The rate is small, so that no method's training gets anywhere: only its cost counts.
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
        self.autocast: Callable = contextlib.nullcontext
        if dtype != "fp32":
            self.autocast = functools.partial(torch.autocast, device.type, DTYPES[dtype])
        if args.compile:
            self.model = torch.compile(self.model)
        self.each = updates_per_batch(method, settings_of(method, EPS, args.replays)["replays"])
        source = endless(source, device, layout)
        if method == INPUT_GRAD:
            self.stream = ((x.detach().requires_grad_(), y) for x, y in source)
            return
        free = FreeAdversarial(
            objective=lambda batch: self.scaler.scale(self.loss(*batch)),
            **settings_of(method, EPS, args.replays),
        )
        self.stream = iter(batches(method, source, free, self.model, self.autocast))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What is trained on, and what ascents climb."""
        with self.autocast():
            return functional.cross_entropy(self.model(x), y)

    def train(self, updates: int) -> None:
        """Make some updates."""
        for x, y in islice(self.stream, updates):
            loss = self.loss(x, y)
            if self.method == "free-public":
                loss.item()  # its running mean is printed
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()


def endless(source: Batches, device: torch.device, layout: torch.memory_format) -> Iterator:
    """Pass after pass over a loader, on the device."""
    while True:
        for x, y in source:
            x = x.to(device, memory_format=layout, non_blocking=True)
            yield x, y.to(device, non_blocking=True)


def build(case: str, args: argparse.Namespace) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model of a `name:size` and one batch for it, the same at each call."""
    name, size = case.split(":")
    torch.manual_seed(0)
    model = nn.Sequential(nets.Standardise(*IMAGENET), nets.create(name, 10))
    x, y = torch.rand(args.batch_size, 3, int(size), int(size)), torch.arange(args.batch_size) % 10
    return model, [(x.to(args.device), y.to(args.device))]


def peak_on_cpu(case: str, dtype: str, method: str, args: argparse.Namespace) -> int:
    """Bytes that a fresh process needs beyond the parameters, their gradients and momentum."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = Run(method, *build(case, args), dtype, args)
    run.train(4)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit - run.bytes


def in_a_child(*job) -> int:
    """`peak_on_cpu` in a process of its own."""
    # Freed blocks must go back to the system, or they would count as in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(peak_on_cpu, *job).result()


def probe_cuda(run: Run, before: int, updates: int) -> tuple[int, float]:
    """Bytes beyond the parameters, gradients and momentum; how often an update makes the host wait."""
    torch.cuda.reset_peak_memory_stats()
    run.train(1)
    peak = torch.cuda.max_memory_allocated() - before - run.bytes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run.train(updates)
        torch.cuda.set_sync_debug_mode("default")
    return peak, sum("synchronizing CUDA" in str(w.message) for w in caught) / updates


def timed(run: Run, updates: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor time of an update, in milliseconds."""
    wait()
    start = time.perf_counter(), time.process_time()
    run.train(updates)
    wait()
    end = time.perf_counter(), time.process_time()
    wall, processor = (1e3 * (e - s) / updates for s, e in zip(start, end, strict=True))
    return wall, processor


def quartiles(values: list[float]) -> dict[str, float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return dict(zip(("q1", "median", "q3"), found, strict=True))


def measure(case: str, dtype: str, loaders: dict, args: argparse.Namespace) -> list[dict]:
    """One row for each method."""
    cuda = torch.device(args.device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    torch.compiler.reset()
    model, batch = build(case, args)
    runs, updates, rows = {}, {}, {}
    for method in args.methods:
        before = torch.cuda.memory_allocated() if cuda else 0
        run = runs[method] = Run(method, model, loaders.get(method, batch), dtype, args)
        # One update of an attack costs as much as the turns of the others.
        count = 1 if method.startswith("pgd") else args.replays
        if loaders:
            count = run.each * len(loaders[method])
        updates[method] = count
        for _ in range(2):  # warm-up
            run.train(count)
        peak, waits = probe_cuda(run, before, count) if cuda else (None, None)
        flops = None
        # The counter does not see into compiled models, nor does it bear the attacks' autograd.grad.
        if not args.compile and method in COUNTED:
            with FlopCounterMode(display=False) as counter:
                run.train(count)
            flops = counter.get_total_flops() / count / args.batch_size / 1e9
        rows[method] = {"model": case, "dtype": dtype, "method": method, "updates": count}
        rows[method] |= {"memory": peak, "synchronisations": waits}
        rows[method]["gflop_per_image"] = flops
    times: dict[str, list] = {method: [] for method in runs}
    order = list(runs)
    for _ in tqdm(range(args.rounds), f"{case} {dtype}", leave=False):
        for method in order:
            times[method].append(timed(runs[method], updates[method], wait))
        order = order[1:] + order[:1]
    for method, row in rows.items():
        row["clock"] = "wall" if cuda or loaders else "processor"  # of the targets
        for kind, clock in enumerate(("wall", "processor")):
            values = [t[kind] for t in times[method]]
            row[f"{clock}_ms"] = quartiles(values)
            for other in [m for m in ("natural", "free") if m in times]:
                pairs = zip(values, times[other], strict=True)
                row[f"{clock}_to_{other}"] = quartiles([t / o[kind] for t, o in pairs])
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    cases = "resnet18:32", "resnet18.a1_in1k:96"
    names = "of nets.py or timm, with the side of the images; a tag, as in resnet18.a1_in1k, makes it timm's"
    add("--models", nargs="+", default=cases, metavar="NAME:SIZE", help=names)
    add("--methods", nargs="+", choices=METHODS, help="all; with --loader natural and free")
    add("--amp", nargs="+", choices=["none", "bf16", "fp16"], default=["none"])
    add("--batch-size", type=int, default=16)
    add("--replays", type=int, default=4, help="the paper's m")
    add("--rounds", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")
    add("--memory", action="store_true", help="on a CPU: peak memory too, in a process per method")
    add("--loader", action="store_true", help="batches from JPEG files, an epoch per turn")
    add("--images", type=int, default=256, help="of --loader")
    add("--workers", type=int, default=2, help="of --loader")
    add("--json", type=Path, help="write the results there too")
    add("--plot", type=Path, help="the picture")
    args = parser.parse_args()
    chosen = args.methods or (["free"] if args.loader else METHODS)
    args.methods = [m for m in METHODS if m in chosen or m == "natural"]
    cuda = torch.device(args.device).type == "cuda"

    dtypes = ["fp32" if amp == "none" else amp for amp in args.amp]
    cases = [(case, dtype) for case in args.models for dtype in dtypes]
    children = args.methods if args.memory and not cuda else []
    jobs = [(*case, method) for case in cases for method in children]
    # Before anything else: a child's high-water mark begins with the size of this process.
    memory = {job: in_a_child(*job, args) for job in jobs}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.loader:
            jpegs.write(Path(folder), args.images)
        for case, dtype in cases:
            settings = int(case.split(":")[1]), args.batch_size, args.workers, cuda
            loaders = {m: jpegs.loader(folder, *settings) for m in args.methods if args.loader}
            rows += measure(case, dtype, loaders, args)
    for row in rows:
        place = row["model"], row["dtype"]
        row["memory"] = memory.get((*place, row["method"]), row["memory"])
        if row["method"] == "natural":
            natural = row
        row["targets"] = targets(row, natural, args)
    show(rows)
    if args.plot:
        plots.save(plots.costs(rows), args.plot)
    if args.json:
        arguments = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
        record = {"arguments": arguments, "environment": records.environment(args.device)}
        tables = {"table": ratios(rows), "targets": verdicts(rows), "flops": work(rows)}
        records.write(args.json, record | {"rows": rows} | tables)


if __name__ == "__main__":
    main()
