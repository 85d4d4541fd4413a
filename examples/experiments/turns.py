"""What a row of replays does to gradients: consecutive ones of a minibatch and of the weights, for several windows.

    python examples/experiments/turns.py --data CIFAR10 --windows 1 8 --json turns.json

Free training as by cifar10.py, whose arguments follow `--`. Over the updates after the first tenth: the cosine of
the input gradients of one minibatch at replay i and i+1, that of the weights' gradients at consecutive updates,
and how the loss of a minibatch falls from its first replay to its last.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import cifar10
import torch
from records import environment, write
from torch.nn import functional

TRAINING = "--model cnn-16 --images 20000 --passes 30 --channels-last"


def watch(run: cifar10.Run) -> dict[str, Any]:
    """Train to the end; the means of what is measured."""
    turns, window = run.args.replays, run.args.window
    sums: dict[str, list[list[float]]] = {"inputs": [[] for _ in range(turns - 1)]}
    sums |= {"losses": [[] for _ in range(turns)], "weights": [[]]}
    before: torch.Tensor | None = None
    seen: list[
        list[torch.Tensor]
    ] = []  # input gradients of the minibatches in the window, by replay
    run.model.train()
    while run.step < run.total:
        for i, (x, y) in enumerate(run.free.replay(run.loader)):
            # Windows are whole but for the last of an epoch, which is not looked at.
            full = len(run.loader) - len(run.loader) % window
            group, rest = divmod(i, turns * window)
            turn, place = divmod(rest, window)
            if rest == 0:
                seen = [[] for _ in range(window)]
            x.retain_grad()
            loss = run.criterion(run.forward(x), y)
            run.optimizer.zero_grad()
            loss.backward()
            weights = torch.cat([p.grad.flatten() for p in run.model.parameters()])
            if group * window < full and run.step >= run.total // 10:
                sums["losses"][turn].append(loss.item())
                if before is not None:
                    sums["weights"][0].append(cosine(weights[None], before[None]))
                if turn and seen[place]:
                    sums["inputs"][turn - 1].append(cosine(x.grad.flatten(1), seen[place][-1]))
            seen[place] = [x.grad.flatten(1).clone()]
            before = weights
            run.optimizer.step()
            run.schedule.step()
            run.step += 1
            if run.step == run.total:
                break
    return {name: [mean(values) for values in lists] for name, lists in sums.items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of each row with its counterpart, the mean over rows."""
    return functional.cosine_similarity(a, b, dim=1).mean().item()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in Markdown."""
    lines = [
        "| window | weights' gradients, consecutive updates | input gradients, first to second replay | "
        "input gradients, last two replays | loss, first replay | loss, last replay |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        values = (*row["weights"], row["inputs"][0], row["inputs"][-1])
        values = (*values, row["losses"][0], row["losses"][-1])
        lines.append(f"| {row['window']} | {' | '.join(f'{v:.2f}' for v in values)} |")
    return lines


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv[:cut])
    images, labels, classes = cifar10.read(args.data, True, False)
    rows = []
    for window in args.windows:
        line = [*TRAINING.split(), *argv[cut + 1 :], "--window", str(window)]
        run = cifar10.Run(
            cifar10.parse([*line, "--data", str(args.data)]), images, labels, len(classes)
        )
        rows.append({"window": window, **watch(run)})
    return conclude(run, rows, table(rows), args.json)


def conclude(
    run: cifar10.Run, rows: list[dict[str, Any]], lines: list[str], path: Path | None
) -> dict[str, Any]:
    """Print the table of what was measured, by runs like this one, and write it down."""
    arguments, found = cifar10.arguments(run.args), environment(run.device)
    record = {"arguments": arguments, "environment": found, "rows": rows, "table": lines}
    if path:
        write(path, record)
    print("\n".join(lines))
    return record


if __name__ == "__main__":
    main()
