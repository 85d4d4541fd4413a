"""Clean and robust accuracy over a loader."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from free_adv.attack import FLAT, demand
from free_adv.checks import Loss, choice, positive
from free_adv.checks import count as whole
from free_adv.hints import masked, warn
from free_adv.model import Model, modules
from free_adv.replay import Replay
from free_adv.rounds import autoattack, descents
from free_adv.run import Attack, Round, Run
from free_adv.threat import ThreatModel


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` has measured; it prints as rows of a table.

    Attributes:
        clean: Share of the images that are classified correctly, in [0, 1].
        robust: Share that stays correct under every attack, in [0, 1].
        count: Number of images.
        attack: Name of the attack, with its steps and restarts.
        threat: The threat model.
        standing: By attack, or part of AutoAttack, the share that was still correct after it, in turn.
        clean_mask: Which images are classified correctly, bool of shape (N,), on the CPU, in the loader's order
            (with `sharded`, of this rank's share).
        robust_mask: Which stay correct under every attack.
    """

    clean: float
    robust: float
    count: int
    attack: str
    threat: ThreatModel
    standing: dict[str, float] = field(default_factory=dict, compare=False)
    clean_mask: Tensor = field(default_factory=lambda: torch.tensor([]), repr=False, compare=False)
    robust_mask: Tensor = field(default_factory=lambda: torch.tensor([]), repr=False, compare=False)

    def __str__(self) -> str:
        """For example `clean 84.30% robust 46.20% PGD steps=20 restarts=1  linf eps=8/255  10000 images`.

        Rows are as wide as one another, 80 columns, so that several printed in turn are a table. A long name,
        bounds other than (0, 1), and what each of several attacks has left standing, go on below.
        """
        name, *more = textwrap.wrap(self.attack, 24) or [""]
        row = (
            f"clean {_percent(self.clean)} robust {_percent(self.robust)} {name:<24} "
            f"{self.threat.norm:<4} eps={_levels(self.threat.eps):<6} {self.count:>5} images"
        )
        if self.threat.bounds != (0, 1):
            more.append(f"bounds={self.threat.bounds}")
        if len(self.standing) > 1:
            more += [f"after {label}: {share:.2%}" for label, share in self.standing.items()]
        return "\n".join([row, *(" " * 27 + line for line in more)])


def _percent(share: float) -> str:
    return f"{share:6.2%}" if share < 1 else "  100%"


def _levels(size: float) -> str:
    """A length in pixel units as people write it, `8/255` where it is a small number of grey levels."""
    levels = round(size * 255, 6)
    return f"{levels:.0f}/255" if levels == round(levels) < 100 else f"{size:.4g}"


def evaluate(
    model: Model,
    loader: Iterable[Any],
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Loss = "ce",
    attack: Attack | str | Sequence[Attack | str | None] | None = None,
    autocast: torch.dtype | None = None,
    sharded: bool = False,
    device: torch.device | str | int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Clean and robust accuracy of a classifier over a loader.

    Everything that the model runs is in evaluation mode and left as it was found: modes, parameter gradients,
    batch-norm statistics, and the global random state. The same call gives the same numbers. Only
    images that are still classified correctly are attacked, collected into full batches.

    Args:
        model: Maps a batch to logits of shape (N, classes), of two classes or more: a module, or any callable.
        loader: Yields batches `(x, y)`: inputs of shape (N, ...), class indices of shape (N,).
        threat: The threat model, in pixel units, with `mean` and `std` if the loader normalises.
        steps: Gradient steps of PGD.
        step_size: Length of a step of PGD, in pixel units; see `pgd`.
        restarts: Random starts of PGD; the worst counts, and an image once fooled is not attacked again.
        loss: What PGD ascends: "ce", the cross-entropy, or "cw", the margin loss; see `pgd`.
        attack: None or "pgd" for `pgd`; "autoattack" for the standard AutoAttack (Croce & Hein 2020, the `eval`
            extra); any `(model, x, y) -> x_adv`, in the units of the loader; or a list of these, of which
            the worst counts.
        autocast: Run the model under `torch.autocast` of this type, such as `torch.bfloat16`. None means in the
            model's own precision, also inside an autocast block.
        sharded: Each rank's loader yields a share of its own: add up over the process group. Every rank
            must call, with a model that does not communicate: DDP is unwrapped, FSDP needs a full copy.
            What a DistributedSampler repeats to make shares equal is counted once.
        device: Where to move the batches. None means where the model is.
        progress: Show a bar on a terminal, if tqdm is installed.

    Returns:
        An `Evaluation`: `clean` and `robust` (shares in [0, 1]), `count` (of images), `attack` (its name),
        `standing` (after each attack), `clean_mask` and `robust_mask` (by image).

    Warns:
        UserWarning: Images whose gradient is zero or not finite, so that PGD could not move them.

    Raises:
        ValueError: The loader is a replay, or empty, or its batches are not `(x, y)`; the model returns no logits, or `y` are
            no labels of its classes; an attack left the threat model.
        TypeError: `threat` is no ThreatModel, the model or an attack returns no tensor, or `y` are no whole numbers.
        RuntimeError: `sharded` without a process group, or under `torch.inference_mode`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> loader = [(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)]
        >>> result = evaluate(model, loader, ThreatModel(8 / 255), steps=10, progress=False)
        >>> result.count, result.attack, result.robust <= result.clean
        (20, 'PGD steps=10 restarts=1', True)
    """
    demand(threat)
    if isinstance(loader, Replay):
        raise ValueError(
            "loader is a replay, made for training: evaluate on a loader of test images, not wrapped"
        )
    if sharded and not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("sharded=True needs a process group: call init_process_group first")
    if isinstance(model, DistributedDataParallel):  # ranks may differ in their number of passes
        model = model.module
    if device is None:
        device = next((p.device for m in modules(model) for p in m.parameters()), None)
    steps, restarts, flat = whole("steps", steps), whole("restarts", restarts), [0, 0]
    size = 2.5 * threat.eps / steps if step_size is None else positive("step_size", step_size)
    choice("loss", loss, Loss)
    rounds: list[Round] = []
    names: list[str] = []
    for one in attack if isinstance(attack, list | tuple) else [attack]:
        if one is None or one == "pgd":
            names.append(f"PGD{' (CW loss)' * (loss == 'cw')} steps={steps} restarts={restarts}")
            names[-1] += "" if step_size is None else f" step_size={_levels(step_size)}"
            rounds += descents(threat, steps, size, restarts, loss, names[-1], flat)
        elif isinstance(one, str) and one == "autoattack":
            names.append("AutoAttack standard")
            rounds += autoattack(threat)
        elif callable(one):
            names.append(getattr(one, "__name__", type(one).__name__))
            rounds.append(Round(one, names[-1]))
        else:
            raise ValueError(
                f"attack must be None, 'pgd', 'autoattack', callable, or a list of these, got {one!r}"
            )
    if not rounds:
        raise ValueError("attack is an empty list; None means PGD")
    name = ", ".join(names) + ("" if autocast is None else f" {autocast}".replace("torch.", ""))
    run = Run(model, threat, rounds, autocast)
    run.over(loader, device, sharded, progress, name)
    if flat[0]:
        warn(masked(flat[0], flat[1], *FLAT))
    clean_mask, robust_mask = torch.cat(run.right), torch.zeros(run.count, dtype=torch.bool)
    robust_mask[torch.cat(run.standing)] = True
    fooled: dict[str, int] = {}
    for r in rounds:
        fooled[r.label] = fooled.get(r.label, 0) + r.fooled
    totals = [run.count, int(clean_mask.sum()), *fooled.values()]
    if sharded:
        nccl = distributed.get_backend() == "nccl"
        where = run.device or torch.device("cuda" if nccl else "cpu")
        summed = torch.tensor(totals, device=where)
        distributed.all_reduce(summed)
        totals = summed.tolist()
    count, left, *losses = totals
    if not count:
        raise ValueError("the loader is empty: there is nothing to evaluate on")
    clean, standing = left / count, {}
    for label, lost in zip(fooled, losses, strict=True):
        left -= lost
        standing[label] = left / count
    return Evaluation(clean, left / count, count, name, threat, standing, clean_mask, robust_mask)
