"""How strong the examples are that a method trains on, by replay: against PGD-10 on the same weights.

    python examples/experiments/strength.py --data CIFAR10 --json strength.json

Training as by cifar10.py, whose arguments follow `--`. From a tenth of the updates on some minibatches are looked at:
what share of the loss that PGD-10 gains over the clean images their perturbed ones have gained, at each replay, in
evaluation mode. 1 is as strong as PGD-10; an example that no ball of eps holds may be stronger.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import cifar10
import methods
import torch
from torch import Tensor
from torch.nn import functional
from turns import conclude

from free_adv import pgd

TRAINING = "--model cnn-16 --images 20000 --passes 12 --lr 0.2 --channels-last"
ROWS = {
    "Free, m=8, W=1": "--replays 8",
    "Free, m=8, W=8": "--replays 8 --window 8",
    "Free, m=4, W=8, step 2 eps": "--replays 4 --window 8 --step-size 16/255",
    "FGSM-RS": "--method fgsm-rs",
    "N-FGSM": "--method n-fgsm",
}


def watch(run: cifar10.Run, every: int) -> list[float]:
    """Train to the end; the strength at each replay, of one of so many minibatches."""
    replays = run.args.replays
    gained, possible = torch.zeros(replays), torch.zeros(replays)
    count = 0
    run.model.train()
    while run.step < run.total:
        for x, y in methods.batches(
            run.args.method, run.loader, run.free, run.forward, run.autocast
        ):
            turn = run.free.turn or 0
            count += turn == 0
            if count % every == 0 and run.step >= run.total // 10:
                clean = run.free.clean
                best = pgd(run.model, clean, y, run.judged_by, steps=10, restarts=1)
                base, now, most = (loss(run, images, y) for images in (clean, x.detach(), best))
                gained[turn] += now - base
                possible[turn] += most - base
            objective = run.loss(x, y)
            run.optimizer.zero_grad()
            objective.backward()
            run.optimizer.step()
            run.schedule.step()
            run.step += 1
            if run.step == run.total:
                break
    return (gained / possible).tolist()


def loss(run: cifar10.Run, x: Tensor, y: Tensor) -> float:
    """The mean loss of images, in evaluation mode."""
    run.model.eval()
    with torch.no_grad():
        value = functional.cross_entropy(run.model(x), y).item()
    run.model.train()
    return value


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in Markdown."""
    most = max(len(row["strength"]) for row in rows)
    lines = ["| method | " + " | ".join(str(i + 1) for i in range(most)) + " | mean |"]
    lines.append("| --- " * (2 + most) + "|")
    for row in rows:
        cells = [f"{value:.2f}" for value in row["strength"]]
        cells += [""] * (most - len(cells))
        average = sum(row["strength"]) / len(row["strength"])
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {average:.2f} |")
    return lines


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these, by name")
    parser.add_argument("--every", type=int, default=16, help="minibatches, of which one is seen")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv[:cut])
    images, labels, classes = cifar10.read(args.data, True, False)
    rows = []
    for name in args.rows or ROWS:
        line = [*TRAINING.split(), *argv[cut + 1 :], *ROWS[name].split(), "--data", str(args.data)]
        run = cifar10.Run(cifar10.parse(line), images, labels, len(classes))
        rows.append({"method": name, "strength": watch(run, args.every)})
    return conclude(run, rows, table(rows), args.json)


if __name__ == "__main__":
    main()
