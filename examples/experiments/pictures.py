"""Pictures of finished runs of cifar10.py: how they learnt, how they are attacked, and what they look at.

    python examples/experiments/pictures.py runs/natural runs/free runs/pgd --data DIR --plot pictures

The first run is what time is relative to. Writes `curves.png`, `perturbations.png` and `gradients.png`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cifar10
import nets
import plots
import study
import torch
from records import load, write
from torch import Tensor, nn

from free_adv import ThreatModel

NAMES = {
    "natural": "natural",
    "free": "Free, m={replays}",
    "free-public": "Free-public, m={replays}",
    "pgd": "PGD-7",
    "fgsm-rs": "FGSM-RS",
}
COLUMNS = 10


def model_of(run: Path, arguments: dict[str, Any], classes: int) -> nn.Module:
    """The network that the run has kept."""
    net = nets.create(arguments["model"], classes, arguments["activation"])
    model = nn.Sequential(nets.Standardise(cifar10.MEAN, cifar10.STD), net)
    model.load_state_dict(load(run / "weights.pt")["weights"])
    return model.eval()


def curves(records: dict[str, dict[str, Any]]) -> plots.Figure:
    """Accuracy on held-out images over training time, clean and under PGD-10."""
    made = [{"label": name, **record} for name, record in records.items()]
    costs = study.costs(made)
    runs = [run | {"cost": cost} for run, cost in zip(made, costs, strict=True)]
    figure, axes = plots.plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for cell, key, title in zip(axes, ("clean", "robust"), ("clean", "under PGD-10"), strict=True):
        plots.curves(cell, runs, key)
        cell.set_title(title, fontsize="medium")
        cell.set(xlabel=f"training time, the whole of {runs[0]['label']} = 1", ylim=(0, None))
    axes[0].set_ylabel("held-out accuracy (%)")
    axes[1].legend(loc="upper right")
    return figure


def one_of_each(labels: Tensor, right: Tensor) -> Tensor:
    """Indices of the first image of each class that is among the `right` ones, if any is; at most `COLUMNS`."""
    right = right if right.any() else torch.ones_like(right)
    first = [((labels == c) & right).nonzero() for c in range(int(labels.max()) + 1)]
    return torch.cat([found[0] for found in first if len(found)])[:COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders that cifar10.py has written")
    parser.add_argument("--data", type=Path, required=True, help="as for cifar10.py")
    parser.add_argument(
        "--plot", type=Path, default=Path("pictures"), help="folder of the pictures"
    )
    parser.add_argument(
        "--json", type=Path, help="write the results of all runs there, in one file"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, labels, classes = cifar10.read(args.data, train=False, download=False)
    records, models = {}, {}
    for run in args.runs:
        record = json.loads((run / "result.json").read_text())
        name = NAMES[record["arguments"]["method"]].format(**record["arguments"])
        if name in records:
            raise SystemExit(f"{run} is a second run of {name}: one for each method, please")
        records[name] = record
        models[name] = model_of(run, record["arguments"], len(classes))
    threat = ThreatModel(record["results"][0]["threat"]["eps"])

    plots.save(curves(records), args.plot / "curves.png")
    some = torch.randperm(len(images))[:1000]
    x, y = images[some].float() / 255, labels[some]
    with torch.no_grad():
        right = torch.stack([model(x).argmax(1) == y for model in models.values()]).all(0)
    chosen = one_of_each(y, right)
    x, y = x[chosen], y[chosen]
    figure = plots.plt.figure(figsize=(9.5, 1.15 * (1 + 2 * len(models))))
    plots.predictions(figure, models, x, y, classes, threat, steps=50)
    plots.save(figure, args.plot / "perturbations.png")
    figure = plots.plt.figure(figsize=(9.5, 1.05 * (1 + len(models))))
    plots.input_gradients(figure, models, x, y, classes)
    plots.save(figure, args.plot / "gradients.png")
    if args.json:
        runs = [{"label": name, **record} for name, record in records.items()]
        made = [{k: v for k, v in run.items() if k != "curve"} for run in runs]
        write(args.json, {"runs": made, "table": study.table(runs)})
    print(f"written: {args.plot}/curves.png, perturbations.png, gradients.png")


if __name__ == "__main__":
    main()
