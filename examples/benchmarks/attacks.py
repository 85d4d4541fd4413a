"""Robust accuracy by several toolboxes, on the same network and images: what they agree on, and how long they take.

    pip install torchattacks adversarial-robustness-toolbox
    python examples/benchmarks/attacks.py --run runs/free --data DIR --json attacks.json

`--run` is the folder of a finished run of cifar10.py. A toolbox that is not installed is left out. In each round
every toolbox takes its turn, and times are ratios to ours of the same round.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from free_adv import ThreatModel, evaluate

sys.path.append(str(Path(__file__).parents[1] / "experiments"))  # cifar10, pictures, records
import cifar10
import pictures
from records import environment, write

EPS = 8 / 255
PGD = {"PGD-20": (20, 1), "PGD-50-10": (50, 10)}  # steps, restarts
AUTOATTACK = "AutoAttack"
Toolbox = Callable[[nn.Module, Tensor, Tensor, str, int], float]


def ours(model, x, y, attack, size):
    settings = {"attack": "autoattack"}
    if attack in PGD:
        steps, restarts = PGD[attack]
        settings = {"steps": steps, "restarts": restarts, "step_size": EPS / 4}
    loader = list(zip(x.split(size), y.split(size), strict=True))
    return evaluate(model, loader, ThreatModel(EPS), progress=False, **settings).robust


def by_batches(attacked: Callable[[Tensor, Tensor], Tensor], model, x, y, size) -> float:
    """Robust accuracy, each image's worst of all restarts."""
    right = 0
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        moved = attacked(images, labels)
        with torch.no_grad():
            right += int((model(moved).argmax(1) == labels).sum())
    return right / len(y)


def foolbox(model, x, y, attack, size):
    import foolbox as fb

    if attack not in PGD:
        return None
    steps, restarts = PGD[attack]
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device=x.device)
    pgd = fb.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=steps)
    pgd = pgd.repeat(restarts) if restarts > 1 else pgd
    return by_batches(lambda a, b: pgd(wrapped, a, b, epsilons=EPS)[1], model, x, y, size)


def torchattacks(model, x, y, attack, size):
    import torchattacks as ta

    if attack not in PGD:
        return by_batches(ta.AutoAttack(model, eps=EPS, seed=0), model, x, y, size)
    steps, restarts = PGD[attack]
    one = ta.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
    adversary = ta.MultiAttack([one] * restarts) if restarts > 1 else one
    return by_batches(adversary, model, x, y, size)


def pyautoattack(model, x, y, attack, size):
    from pyautoattack import AutoAttack

    if attack in PGD:
        return None
    adversary = AutoAttack(model, norm="Linf", eps=EPS, seed=0)
    moved, _ = adversary.run_standard_evaluation(x, y, batch_size=size)
    return by_batches(lambda a, b: a, model, moved, y, size)


def art(model, x, y, attack, size):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    if attack not in PGD:
        return None
    steps, restarts = PGD[attack]
    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        x.shape[1:],
        int(y.max()) + 1,
        clip_values=(0, 1),
        device_type="cpu",
    )
    pgd = ProjectedGradientDescentPyTorch(
        classifier,
        eps=EPS,
        eps_step=EPS / 4,
        max_iter=steps,
        num_random_init=restarts,
        batch_size=size,
        verbose=False,
    )

    def attacked(a, b):
        return torch.from_numpy(pgd.generate(a.numpy(), b.numpy()))

    return by_batches(attacked, model, x, y, size)


TOOLBOXES: dict[str, Toolbox] = {
    "free-adv": ours,
    "foolbox": foolbox,
    "torchattacks": torchattacks,
    "pyautoattack": pyautoattack,
    "adversarial-robustness-toolbox": art,
}


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in Markdown."""
    lines = [
        "| attack, images | toolbox | robust % | time, relative |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        what = f"{row['attack']}, {row['images']}", f"{row['toolbox']} {row['version']}"
        lines.append(
            "| " + " | ".join([*what, f"{100 * row['robust']:.1f}", f"{row['ratio']:.2f}"]) + " |"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a finished run of cifar10.py")
    add("--data", type=Path, required=True)
    add("--images", type=int, default=500)
    add("--hard-images", type=int, default=100, help="for AutoAttack")
    add("--batch-size", type=int, default=100)
    add("--rounds", type=int, default=3)
    add("--attacks", nargs="+", choices=[*PGD, AUTOATTACK], default=[*PGD, AUTOATTACK])
    add("--json", type=Path)
    args = parser.parse_args(argv)
    made = json.loads((args.run / "result.json").read_text())["arguments"]
    images, labels, classes = cifar10.read(args.data, False, False)
    model = pictures.model_of(args.run, made, len(classes)).requires_grad_(False)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images[chosen].float().contiguous() / 255, labels[chosen]  # others call view()
    versions = {name: version(name) for name in TOOLBOXES}
    rows = []
    for attack in args.attacks:
        n = args.images if attack in PGD else args.hard_images
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.rounds if attack in PGD else 1):
            for name in (name for name in TOOLBOXES if versions[name]):
                start = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the others'
                    robust = TOOLBOXES[name](model, x[:n], y[:n], attack, args.batch_size)
                if robust is not None:
                    found.setdefault(name, []).append((robust, time.process_time() - start))
        for name, turns in found.items():
            base = [seconds for _, seconds in found["free-adv"]]
            ratio = statistics.median(s / b for (_, s), b in zip(turns, base, strict=True))
            robust = statistics.mean(r for r, _ in turns)
            seconds = statistics.median(s for _, s in turns)
            row = {"attack": attack, "images": n, "toolbox": name, "version": versions[name]}
            rows.append({**row, "robust": robust, "seconds": seconds, "ratio": ratio})
            print(f"{attack:<12}{name:<32}{robust:7.2%} {seconds:8.1f} s {ratio:6.2f}", flush=True)
    record = {"run": made, "environment": environment("cpu"), "rows": rows}
    if args.json:
        write(args.json, record | {"table": table(rows)})


if __name__ == "__main__":
    main()
