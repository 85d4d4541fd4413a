"""Accuracy against eps of finished runs of cifar10.py: robust accuracy must fall to zero, or the figure is false.

    python examples/experiments/curve.py runs/natural runs/free --data DIR --plot curve.png --json curve.json

A network that hides its gradients keeps its accuracy at an eps at which every image can be turned into any other;
one that is robust loses it. PGD on the margin of the logits.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cifar10
import pictures
import plots
import torch
from options import fraction
from records import environment, plain, write

from free_adv import ThreatModel, evaluate


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A line for each run, from its clean accuracy on."""
    figure, axes = plots.plt.subplots(figsize=(6, 3.8))
    for i, run in enumerate(dict.fromkeys(row["run"] for row in rows)):
        mine = [row for row in rows if row["run"] == run]
        heights = [mine[0]["clean"], *(row["robust"] for row in mine)]
        levels = [0.0, *(255 * row["threat"]["eps"] for row in mine)]
        look = {"color": plots.COLOURS[plots.method(run)], "linestyle": ["-", "--", ":"][i % 3]}
        axes.plot(levels, [100 * h for h in heights], marker=".", label=run, **look)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(levels)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="eps, grey levels of 255", ylabel="accuracy (%)", ylim=(0, None))
    axes.legend()
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders of finished runs of cifar10.py")
    add("--data", type=Path, required=True)
    add("--eps", type=fraction, nargs="+", default=[k / 255 for k in (1, 2, 4, 8, 16, 32, 64, 128)])
    add("--images", type=int, default=500)
    add("--steps", type=int, default=50)
    add("--restarts", type=int, default=1)
    add("--plot", type=Path, default=Path("curve.png"))
    add("--json", type=Path)
    args = parser.parse_args(argv)
    images, labels, classes = cifar10.read(args.data, False, False)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: args.images]
    loader = list(
        zip((images[chosen].float() / 255).split(100), labels[chosen].split(100), strict=True)
    )
    settings = {"steps": args.steps, "restarts": args.restarts, "loss": "cw"}
    rows = []
    for run in args.runs:
        arguments = json.loads((run / "result.json").read_text())["arguments"]
        model = pictures.model_of(run, arguments, len(classes))
        found = [evaluate(model, loader, ThreatModel(eps), **settings) for eps in args.eps]
        rows += [{"run": run.name, **plain(result)} for result in found]
        print(*found, sep="\n")
    draw(rows, args.plot)
    if args.json:
        write(args.json, {"environment": environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
