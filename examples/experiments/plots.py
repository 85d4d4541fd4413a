"""All pictures of the examples: one look, and colours that the colour-blind can tell apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, FigureBase
from torch import Tensor, nn
from torch.nn import functional

from free_adv import ThreatModel, pgd

plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "savefig.dpi": 110,
    }
)
GREY = "#888888"
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"  # Okabe and Ito
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLOURS = {"natural": BLUE, "free": RED, "pgd": GREEN, "fgsm-rs": PURPLE}
COLOURS |= {"n-fgsm": GREY, "input-grad": SKY, "free-public": ORANGE, "pgd-plain": BLACK}
MARKERS = {"natural": "o", "free": "*", "pgd": "s", "fgsm-rs": "D", "n-fgsm": "P"}


def method(label: str) -> str:
    """The method that a label such as "Free, m=8" or "PGD-7" begins with; "natural" for others."""
    fits = [name for name in COLOURS if label.lower().startswith(name)]
    return max(fits, key=len, default="natural")


def save(figure: Figure, path: Path) -> None:
    """Write the figure, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})
    plt.close(figure)


def accuracy_against_cost(axes: Axes, rows: Sequence[dict[str, Any]], attack: str) -> None:
    """A filled mark for the accuracy under `attack` and a hollow one for the clean accuracy of each row.

    Args:
        axes: Where to draw.
        rows: Each with "label", "cost", "clean" and "robust" (fractions); rows with the same label look the same.
        attack: Its name, for the title.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for label in labels:
        mine = [row for row in rows if row["label"] == label]
        family = [other for other in labels if method(other) == method(label)]
        # Of several of one method, the later ones are darker.
        depth = 0.4 + 0.6 * (family.index(label) + 1) / len(family)
        colour = tuple(1 - depth * (1 - c) for c in to_rgb(COLOURS[method(label)]))
        marker = MARKERS.get(method(label), "o")
        if len(family) > 1:
            marker = "v<>^*PX"[family.index(label) % 7]
        style = {"color": colour, "marker": marker, "ms": 9, "ls": "none"}
        cost = [row["cost"] for row in mine]
        axes.plot(cost, [100 * row["robust"] for row in mine], label=label, **style)
        axes.plot(cost, [100 * row["clean"] for row in mine], fillstyle="none", **style)
    axes.set_title(f"filled: under {attack}, hollow: clean", fontsize="medium")
    axes.set_ylabel("test accuracy (%)")


def clean_against_robust(axes: Axes, rows: Sequence[dict[str, Any]], attack: str) -> None:
    """A mark for each row, as large as its cost, with rows that no attack leaves standing left out.

    Args:
        axes: Where to draw.
        rows: Each with "label", "cost", "clean" and "robust" (fractions); rows with the same label look the same.
        attack: Its name, for the axis.
    """
    rows = [row for row in rows if row["robust"] > 0.01]
    tints = [RED, ORANGE, BLUE, SKY, GREEN, PURPLE, BLACK]
    for i, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        mine = [row for row in rows if row["label"] == label]
        clean, robust = ([100 * row[k] for row in mine] for k in ("clean", "robust"))
        size = [40 * row["cost"] for row in mine]
        style = {"color": tints[i % 7], "marker": "osD^vPX"[i // 7], "alpha": 0.8}
        axes.scatter(clean, robust, size, label=label, linewidths=0, **style)
    axes.set(xlabel="clean accuracy (%)", ylabel=f"accuracy under {attack} (%)")
    axes.set_title("the area of a mark is the training time", fontsize="medium")
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    for mark in legend.legend_handles:
        mark.set_sizes([40])


def curves(axes: Axes, runs: Sequence[dict[str, Any]], key: str, colour: str | None = None) -> None:
    """A line for each run over its training time.

    Args:
        axes: Where to draw.
        runs: Each with "label", "curve" (dictionaries with "update" and `key`) and "cost", that of the whole run.
        key: "loss", or an accuracy as a fraction: "clean", "robust".
        colour: Of all lines; each method's own by default.
    """
    for run in runs:
        kind, curve = method(run["label"]), run["curve"]
        scale = run["cost"] / curve[-1]["update"]
        values = [row[key] * (1 if key == "loss" else 100) for row in curve]
        times = [row["update"] * scale for row in curve]
        style = {"color": colour or COLOURS[kind], "marker": MARKERS.get(kind, "o"), "ms": 5}
        axes.plot(times, values, label=run["label"], **style)


def learning(
    left: Axes, right: Axes, label: str, losses: list[dict[str, Any]], looks: list[dict[str, Any]]
) -> None:
    """One run over its updates: the training loss, and beside it the accuracies, clean and under PGD-10.

    Args:
        left: Where to draw the loss.
        right: Where to draw the accuracies.
        label: The method.
        losses: Each with "update" and "loss".
        looks: Each with "update", "clean" and "robust" (fractions); none at all is fine.
    """
    curves(left, [{"label": label, "curve": losses, "cost": losses[-1]["update"]}], "loss")
    left.set(xlabel="update", ylabel="training loss")
    for key, colour in (("clean", BLUE), ("robust", RED)) if looks else ():
        run = {"label": key, "curve": looks, "cost": looks[-1]["update"]}
        curves(right, [run], key, colour)
        right.legend()
    right.set(xlabel="update", ylabel="held-out accuracy (%)", ylim=(0, 100))
    right.set_title("robust: under PGD-10", fontsize="medium")


def show(cell: Axes, image: Tensor, title: str = "", colour: str = BLACK) -> None:
    """One image of shape (1 or 3, H, W) in [0, 1]."""
    grey = len(image) == 1
    style = {"cmap": "gray_r", "vmin": 0, "vmax": 1} if grey else {}
    image = image.clamp(0, 1)  # a sum may be beyond by a rounding
    pixels = image[0] if grey else image.permute(1, 2, 0)
    cell.imshow(pixels.numpy(), interpolation="nearest", **style)
    cell.set(xticks=[], yticks=[])
    cell.set_title(title, color=colour, fontsize="small", pad=3)
    cell.grid(visible=False)
    for side in cell.spines.values():
        side.set_visible(False)


def predictions(
    figure: FigureBase,
    models: dict[str, nn.Module],
    x: Tensor,
    y: Tensor,
    classes: Sequence[str],
    threat: ThreatModel,
    steps: int,
    deltas: bool = True,
) -> None:
    """Clean images; for each model the perturbation that PGD finds, the image with it, and the model's prediction.

    Args:
        figure: Where to draw.
        models: By name; in evaluation mode.
        x: Images of shape (N, C, H, W), one column each.
        y: Their labels.
        classes: What the labels mean.
        threat: The ball of the attack.
        steps: Steps of the attack.
        deltas: Show the perturbations too: grey is zero, the darkest and the lightest are eps.
    """
    rows = [("clean", x, None)]
    for name, model in models.items():
        adversarial = pgd(model, x, y, threat, steps=steps)
        delta = (adversarial - x) / threat.eps
        if deltas:
            rows.append(("delta", 0.5 + delta / 2, None))
        rows.append((f"against\n{name}", adversarial, model))
    grid = figure.subplots(len(rows), len(x), squeeze=False)
    for line, (label, images, model) in zip(grid, rows, strict=True):
        line[0].set_ylabel(label, fontsize="small")
        with torch.no_grad():
            guesses = y if model is None else model(images).argmax(1)
        for cell, image, guess, truth in zip(line, images, guesses, y, strict=True):
            if label == "delta":
                show(cell, image)
            else:
                right = guess == truth
                name = classes[guess] if right else f"{classes[guess]} ✗"
                show(cell, image, name, BLACK if right else RED)


def input_gradients(
    figure: FigureBase, models: dict[str, nn.Module], x: Tensor, y: Tensor, classes: Sequence[str]
) -> None:
    """Images, and below them the gradient of each model's loss with respect to them.

    Grey is zero, and the darkest and the lightest are three standard deviations of that gradient.
    """
    grid = figure.subplots(1 + len(models), len(x), squeeze=False)
    for cell, image, label in zip(grid[0], x, y, strict=True):
        show(cell, image, classes[label])
    grid[0, 0].set_ylabel("image", fontsize="small")
    for line, (name, model) in zip(grid[1:], models.items(), strict=True):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(leaf), y), leaf)
        scale = gradient.flatten(1).std(1).reshape(-1, 1, 1, 1)
        gradient = gradient / (3 * scale)
        line[0].set_ylabel(name, fontsize="small")
        for cell, image in zip(line, 0.5 + gradient / 2, strict=True):
            show(cell, image)


def costs(rows: Sequence[dict[str, Any]]) -> Figure:
    """The time of an update by every method, natural's being 1: a line for each model and dtype; the whiskers are quartiles."""
    groups = list(dict.fromkeys(f"{row['model'].split('.')[0]}\n{row['dtype']}" for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.55 * len(groups)))
    for place, name in enumerate(methods):
        ratios = [row[f"{row['clock']}_to_natural"] for row in rows if row["method"] == name]
        q1, middle, q3 = ([ratio[key] for ratio in ratios] for key in ("q1", "median", "q3"))
        below = [m - q for m, q in zip(middle, q1, strict=True)]
        above = [q - m for m, q in zip(middle, q3, strict=True)]
        at = [group + 0.8 * ((place + 0.5) / len(methods) - 0.5) for group in range(len(groups))]
        style = {"fmt": MARKERS.get(name, "."), "color": COLOURS[name], "label": name, "ms": 6}
        axes.errorbar(middle, at, xerr=(below, above), **style)
    axes.set_yticks(range(len(groups)), groups, fontsize="small")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time of an update, natural = 1")
    axes.set_xticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"])
    axes.minorticks_off()
    figure.legend(loc="outside upper center", ncols=len(methods), fontsize="small")
    return figure
