"""Natural, Free, FGSM-RS and PGD-7 training of one small network, on scikit-learn's handwritten digits.

    python examples/experiments/compare.py
    python examples/experiments/compare.py --autoattack --seed 0 --json compare-0.json --plot compare-0.png

The picture of docs/index.md, and a table of docs/measurements.md. The methods take turns, a pass each, so that their times can be compared.
"""

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plots
import torch
from methods import batches, settings_of, updates_per_batch
from records import environment, write
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm import tqdm

from free_adv import FreeAdversarial, ThreatModel, evaluate

sys.path.append(str(Path(__file__).parents[1] / "hosts"))  # arguments, digits
from arguments import parser
from digits import network, test_set, train_set

METHODS = {"natural": "natural", "free": "free", "fgsm-rs": "fgsm-rs", "pgd-7": "pgd"}


def data(batch_size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    """Loaders of 1,437 training and 360 test images of 8x8 pixels in [0, 1]."""
    data, test = train_set(), test_set()
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    # The sampler gives whole batches of indices: one look-up each, not one per image.
    train = DataLoader(data, sampler=BatchSampler(order, batch_size, False), batch_size=None)
    return train, DataLoader(test, len(test))


def train(
    method: str,
    model: nn.Module,
    loader: DataLoader,
    threat: ThreatModel,
    passes: int,
    replays: int,
    lr: float,
) -> Iterator[None]:
    """Train, and pause after each natural pass's worth of updates, so that methods can take turns.

    Free makes passes/m epochs of m replays, the other methods `passes` epochs.
    """
    method = METHODS[method]
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    free = FreeAdversarial(
        objective=lambda batch: criterion(model(batch[0]), batch[1]),
        **settings_of(method, threat.eps, replays),
    )
    source = batches(method, loader, free, model, contextlib.nullcontext)
    epochs = free.epochs(passes) if method == "free" else passes
    updates = epochs * len(loader) * updates_per_batch(method, free.replays)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates)
    model.train()
    done = 0
    for _ in range(epochs):
        for x, y in source:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % len(loader) == 0:
                yield


def draw(path: Path, rows: list[dict], threat: ThreatModel, loader: DataLoader) -> None:
    """Accuracy against training time; digits, each attacked for every model, with its predictions."""
    figure = plots.plt.figure(figsize=(10, 4.4))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    axes = left.subplots()
    points = [row | {"label": row["method"], "cost": row["seconds"]} for row in rows]
    plots.accuracy_against_cost(axes, points, "PGD-40")
    axes.set(xlim=(0, None), ylim=(0, 104), xlabel="training time (s)")
    axes.legend(loc="lower right")
    x, y = (t[:8] for t in next(iter(loader)))
    models = {row["method"]: row["model"] for row in rows}
    plots.predictions(right, models, x, y, "0123456789", threat, steps=40, deltas=False)
    right.suptitle(f"predictions, clean and attacked with eps {threat.eps:g}", fontsize="medium")
    plots.save(figure, path)


def conclude(args: argparse.Namespace, found: Any, rows: list[dict], table: list[str]) -> None:
    """Say what was measured over several seeds on the digits, and write it where `--json` says."""
    print(
        f"\ndigits, 360 test images, linf eps {args.eps:g}, PGD-40 with 1 random start, {args.passes} "
        f"passes, {args.seeds} seeds, torch {torch.__version__}"
    )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        attack = {"name": found.attack, "count": found.count, "threat": asdict(found.threat)}
        made = {"arguments": settings, "environment": environment("cpu"), "attack": attack}
        write(args.json, {**made, "rows": rows, "table": table})


def main() -> None:
    options = parser(__doc__, passes=40, replays=8, eps=0.15, lr=0.1)
    add = options.add_argument
    add("--autoattack", action="store_true", help="AutoAttack too: minutes on a CPU")
    add("--json", type=Path, help="write the results there too")
    add("--plot", type=Path, default=Path("compare.png"), help="the picture")
    args = options.parse_args()
    if args.dry_run:
        args.passes = args.replays = 2
    passes = args.passes

    # Threads would wait for one another: the network is too small for several.
    torch.set_num_threads(1)
    threat = ThreatModel(args.eps)
    torch.manual_seed(args.seed)
    initial = network()

    def begin(method: str) -> tuple[nn.Module, Iterator[None]]:
        model = copy.deepcopy(initial)
        loader, _ = data(args.batch_size, args.seed)
        how = threat, passes, args.replays, args.lr
        return model, train(method, model, loader, *how)

    for method in METHODS:  # the first pass of a process is slow: let it not count
        next(begin(method)[1])
    runs = {method: begin(method) for method in METHODS}
    seconds = dict.fromkeys(METHODS, 0.0)
    turns = passes + (-passes) % args.replays
    with tqdm(total=turns, unit="pass", leave=False) as bar:
        for _ in range(turns):
            for method, (_, training) in runs.items():
                bar.set_description(f"train {method}")
                start = time.perf_counter()
                next(training, None)
                seconds[method] += time.perf_counter() - start
            bar.update()

    rows: list[dict] = []
    _, test = data(args.batch_size, args.seed)
    for method, (model, _) in runs.items():
        result = evaluate(model, test, threat, steps=40)
        row = {"method": method, "model": model.eval(), "seconds": seconds[method]}
        row |= {"relative": seconds[method] / seconds["natural"]}
        row |= {"clean": result.clean, "robust": result.robust}
        if args.autoattack:
            row["autoattack"] = evaluate(model, test, threat, attack="autoattack").robust
        rows.append(row)

    extra = f"{'AutoAttack':>12}" if args.autoattack else ""
    print(f"{'method':<10}{'seconds':>9}{'relative':>10}{'clean':>9}{'PGD-40':>9}{extra}")
    for row in rows:
        extra = f"{row['autoattack']:>12.1%}" if args.autoattack else ""
        print(
            f"{row['method']:<10}{row['seconds']:>9.1f}{row['relative']:>9.2f}x"
            f"{row['clean']:>9.1%}{row['robust']:>9.1%}{extra}"
        )
    print(
        f"\ndigits, {result.count} test images, linf eps {args.eps:g}, PGD-40 with 1 random start, "
        f"free: m={args.replays}, {passes} passes, seed {args.seed}, torch {torch.__version__}"
    )
    draw(args.plot, rows, threat, test)
    print(f"picture: {args.plot}")
    if args.json:
        write(args.json, record(args, rows, result))


def record(args: argparse.Namespace, rows: list[dict], result) -> dict:
    """The results and how they were made; accuracies are shares of the test images."""
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    rows = [{k: v for k, v in row.items() if k != "model"} for row in rows]
    accuracies = [k for k in ("clean", "robust", "autoattack") if k in rows[0]]
    names = {"robust": "PGD-40", "autoattack": "AutoAttack"}
    table = [
        "| method | time, relative | " + " | ".join(names.get(k, k) for k in accuracies) + " |"
    ]
    table.append("| --- " * (2 + len(accuracies)) + "|")
    for row in rows:
        name = {"free": f"Free, m={args.replays}", "natural": "natural"}.get(row["method"])
        name = name or row["method"].upper()
        cells = [f"{row['relative']:.2f}", *(f"{row[k]:.1%}" for k in accuracies)]
        table.append(f"| {name} | {' | '.join(cells)} |")
    attack = {"name": result.attack, "count": result.count, "threat": asdict(result.threat)}
    return {
        "arguments": settings,
        "environment": environment("cpu"),
        "attack": attack,
        "rows": rows,
        "table": table,
    }


if __name__ == "__main__":
    main()
