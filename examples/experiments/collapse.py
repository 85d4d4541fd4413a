"""Does `free.report()` foresee a collapse? Digits, many settings and seeds, attacked all along the training.

    python examples/experiments/collapse.py --seeds 3 --json collapse.json --plot collapse.png

A run has collapsed if its accuracy under PGD-20 ends below half of the best that it had, and that was 10 % or
more. Candidate rules say "the alignment of the last replay has fallen below a share of the highest that it had";
the table has for each how many collapses it told of before or at the look that shows them, how early, and how many
other runs it accused.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import plots
import torch
from records import environment, write
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from free_adv import FreeAdversarial, evaluate

sys.path.append(str(Path(__file__).parents[1] / "hosts"))
from digits import test_set, train_set

SETTINGS: dict[str, dict[str, Any]] = {
    "eps 0.15, m=4": {"eps": 0.15, "replays": 4},
    "eps 0.15, m=8": {"eps": 0.15, "replays": 8},
    "eps 0.3, m=2": {"eps": 0.3, "replays": 2},
    "eps 0.3, m=4": {"eps": 0.3, "replays": 4},
    "eps 0.3, m=8": {"eps": 0.3, "replays": 8},
    "eps 0.3, m=4, width 16": {"eps": 0.3, "replays": 4, "width": 16},
    "eps 0.5, m=4": {"eps": 0.5, "replays": 4},
    "eps 0.3, m=4, step 0.5 eps": {"eps": 0.3, "replays": 4, "step_size": 0.15},
    "eps 0.3, m=4, step 0.25 eps": {"eps": 0.3, "replays": 4, "step_size": 0.075},
    "eps 0.3, m=4, W=8": {"eps": 0.3, "replays": 4, "window": 8},
    "eps 0.3, m=4, smoothing 0.1": {"eps": 0.3, "replays": 4, "smoothing": 0.1},
}
SHARES = (0.3, 0.5, 0.7, 0.9)


def network(width: int) -> nn.Module:
    """Three convolutions with batch norm, the width doubled twice."""
    layers: list[nn.Module] = []
    channels = 1
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        layers += [
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))


def train(
    seed: int, passes: int, looks: int, width: int = 64, smoothing: float = 0.0, **settings: Any
) -> list[dict[str, Any]]:
    """The looks at one run: update, accuracies, alignment by replay and the loss of the last replay."""
    torch.manual_seed(seed)
    model, rate = network(width), 0.2
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    free = FreeAdversarial(optimizer, **settings)
    loader, test = DataLoader(train_set(), 64, shuffle=True), DataLoader(test_set(), 360)
    epochs, batches = free.epochs(passes), free.replay(loader)
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total)
    marks = {round(total * (i + 1) / looks) for i in range(looks)}
    curve, update = [], 0
    free.report()
    for _ in range(epochs):
        for x, y in batches:
            free.step(cross_entropy(model(x), y, label_smoothing=smoothing))
            schedule.step()
            update += 1
            if update in marks:
                seen = free.report()
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", UserWarning
                    )  # gradients that vanish are expected
                    found = evaluate(model, test, free.threat, steps=20, progress=False)
                row = {"update": update, "clean": found.clean, "robust": found.robust}
                row |= {"alignment": [round(v, 4) for v in seen["alignment"]]}
                curve.append(row | {"loss": round(seen["loss"][-1], 4)})
    return curve


def collapse(curve: list[dict[str, Any]]) -> int | None:
    """The update of the look from which on the accuracy stays below half of its best; None if it does not end there."""
    best = max(row["robust"] for row in curve)
    below = None
    if best < 0.1:
        return None  # there was nothing to lose
    for row in reversed(curve):
        if row["robust"] >= best / 2:
            break
        below = row["update"]
    return below


def alarm(curve: list[dict[str, Any]], share: float) -> int | None:
    """The update at which the alignment of the last replay is first below a share of the highest so far."""
    highest = 0.0
    for row in curve:
        highest = max(highest, row["alignment"][-1])
        if row["alignment"][-1] < share * highest:
            return row["update"]
    return None


def rules(runs: list[dict[str, Any]]) -> list[str]:
    """A row in Markdown for each share."""
    fallen = [r for r in runs if collapse(r["curve"]) is not None]
    lines = [
        "| alarm below this share of the highest alignment | collapses told of | lead, updates | false alarms |",
        "| --- | --- | --- | --- |",
    ]
    for share in SHARES:
        leads = []
        for run in fallen:
            told = alarm(run["curve"], share)
            if told is not None and told <= collapse(run["curve"]):
                leads.append(collapse(run["curve"]) - told)
        others = [r for r in runs if r not in fallen]
        false = sum(alarm(r["curve"], share) is not None for r in others)
        lead = f"{min(leads)} to {max(leads)}" if leads else "-"
        cells = f"{len(leads)} of {len(fallen)} | {lead} | {false} of {len(others)}"
        lines.append(f"| {share} | {cells} |")
    return lines


def table(runs: list[dict[str, Any]]) -> list[str]:
    """A row in Markdown for each setting; the last look of every seed."""
    lines = [
        "| setting | clean % | PGD-20 % | best PGD-20 on the way % | alignment, last replay | collapsed |",
        "| --- " * 6 + "|",
    ]
    for name in dict.fromkeys(r["label"] for r in runs):
        mine = [r["curve"] for r in runs if r["label"] == name]
        cells = [", ".join(f"{100 * c[-1][k]:.0f}" for c in mine) for k in ("clean", "robust")]
        cells.append(", ".join(f"{100 * max(r['robust'] for r in c):.0f}" for c in mine))
        cells.append(", ".join(f"{c[-1]['alignment'][-1]:.2f}" for c in mine))
        cells.append(f"{sum(collapse(c) is not None for c in mine)} of {len(mine)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The steepest collapse beside the run that kept most of its best accuracy."""

    def kept(run: dict[str, Any]) -> float:
        robust = [row["robust"] for row in run["curve"]]
        return robust[-1] / max(*robust, 1e-9)

    worst = min((r for r in runs if max(c["robust"] for c in r["curve"]) > 0.1), key=kept)
    figure, axes = plots.plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for cell, run in zip(axes, (worst, max(runs, key=kept)), strict=True):
        updates = [row["update"] for row in run["curve"]]
        for key, colour in (("clean", plots.BLUE), ("robust", plots.RED)):
            cell.plot(updates, [row[key] for row in run["curve"]], color=colour, label=key)
        values = [row["alignment"][-1] for row in run["curve"]]
        cell.plot(updates, values, color=plots.GREEN, label="alignment, last replay")
        cell.set(xlabel="update", title=f"{run['label']}, seed {run['seed']}", ylim=(0, 1))
    axes[0].set_ylabel("accuracy, alignment")
    axes[1].legend(fontsize="small")
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=120)
    parser.add_argument("--looks", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    todo = [(name, seed) for seed in range(args.seeds) for name in args.settings]
    runs = []
    for name, seed in tqdm(todo, unit="run", disable=None):
        curve = train(seed, args.passes, args.looks, **SETTINGS[name])
        runs.append({"label": name, "seed": seed, "curve": curve})
        if args.json:  # after each run: nothing is lost
            settings = {k: getattr(args, k) for k in ("passes", "looks", "seeds")}
            record = {"arguments": settings, "environment": environment("cpu"), "runs": runs}
            write(args.json, record | {"table": table(runs), "rules": rules(runs)})
    if args.plot:
        draw(runs, args.plot)
    print("\n".join([*table(runs), "", *rules(runs)]))


if __name__ == "__main__":
    main()
