"""Clean and robust accuracy over a loader."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from free_adv.evaluation.attack import Descent, levels
from free_adv.evaluation.foreign import PARTS, autoattack
from free_adv.evaluation.run import Attack, Run, Share, Stage
from free_adv.evaluation.subject import Subject, within
from free_adv.evaluation.task import Loss, PerSample, Task
from free_adv.replay import Replay
from free_adv.threat import ThreatModel

NONE = torch.tensor([], device="cpu")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` has measured; it prints as rows of a table.

    Attributes:
        clean: Share of the images that are classified correctly, in [0, 1].
        robust: Share that stays correct under every attack, in [0, 1].
        count: Number of images.
        attack: Name of the attack, with its steps and restarts.
        threat: The threat model.
        standing: By attack, or part of AutoAttack, the share that was still correct after it, in turn; of several of
            one name the second is "name (2)".
        clean_mask: Which images are classified correctly, bool of shape (N,), on the CPU, in the loader's order
            (with `sharded`, of this rank's share); where `correct` returns shares, these.
        robust_mask: Which stay correct under every attack.
    """

    clean: float
    robust: float
    count: int
    attack: str
    threat: ThreatModel
    standing: dict[str, float] = field(default_factory=dict, compare=False)
    clean_mask: Tensor = field(default_factory=lambda: NONE, repr=False, compare=False)
    robust_mask: Tensor = field(default_factory=lambda: NONE, repr=False, compare=False)

    def __str__(self) -> str:
        """For example `clean 84.30% robust 46.20% PGD steps=20 restarts=1  linf eps=8/255  10000 images`.

        Rows are as wide as one another, 80 columns, so that several printed in turn are a table. A long name,
        bounds other than (0, 1), and what each of several attacks has left standing, go on below.
        """
        name, *more = textwrap.wrap(self.attack, 24) or [""]
        row = (
            f"clean {_percent(self.clean)} robust {_percent(self.robust)} {name:<24} "
            f"{self.threat.norm:<4} eps={levels(self.threat.eps):<6} {self.count:>5} images"
        )
        if self.threat.bounds != (0, 1):
            more.append(f"bounds={self.threat.bounds}")
        if len(self.standing) > 1:
            more += [f"after {label}: {share:.2%}" for label, share in self.standing.items()]
        return "\n".join([row, *(" " * 27 + line for line in more)])


def _percent(share: float) -> str:
    return f"{share:6.2%}" if share < 1 else "  100%"


def evaluate(
    model: Callable[[Tensor], Any],
    loader: Iterable[Any],
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Loss | PerSample = "ce",
    samples: int = 1,
    correct: PerSample | None = None,
    attack: Attack | str | Sequence[Attack | str | None] | None = None,
    autocast: torch.dtype | None = None,
    sharded: bool = False,
    device: torch.device | str | int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Clean and robust accuracy of a classifier over a loader.

    Everything that the model runs is in evaluation mode and left as it was found: modes, parameter gradients,
    buffers, and the global random state. The same call gives the same numbers. Only
    images that are still classified correctly are attacked, collected into full batches.

    Args:
        model: Maps a batch to logits of shape (N, classes), of two classes or more: a module, or any callable.
            To anything, with `loss` and `correct` of one's own.
        loader: Yields batches `(x, y)`: inputs of shape (N, ...), class indices of shape (N,); with `correct`,
            what it takes, a tensor or a list with an entry for each sample.
        threat: The threat model, in pixel units, with `mean` and `std` if the loader normalises.
        steps: Gradient steps of PGD.
        step_size: Length of a step of PGD, in pixel units; see `pgd`.
        restarts: Random starts of PGD; the worst counts, and an image once fooled is not attacked again.
        loss: What PGD ascends: "ce", the cross-entropy, or "cw", the margin loss, or a callable; see `pgd`.
        samples: For a model that draws random numbers: how many passes each gradient is the mean of, and each
            judgement; an image counts as right if most of its answers are.
        correct: How an output is judged, in place of the class with the largest logit: `(output, y) -> (N,)`, True
            or False for each sample, or a share from 0 to 1, such as an overlap, of which the mean is reported.
        attack: None or "pgd" for `pgd`; "autoattack" for the standard AutoAttack (Croce & Hein 2020, the `eval`
            extra); any `(model, x, y) -> x_adv`, in the units of the loader; or a list of these, of which
            the worst counts.
        autocast: Run the model under `torch.autocast` of this type, such as `torch.bfloat16`. None means in the
            model's own precision, also inside an autocast block.
        sharded: Each rank's loader yields a share of its own: add up over the process group. Every rank
            must call, with a model that does not communicate: DDP is kept from it, FSDP needs a full copy.
            What a DistributedSampler or Accelerate repeats to make shares equal is counted once.
        device: Where to move the batches. None means where the model is.
        progress: Show a bar on a terminal, if tqdm is installed.

    Returns:
        An `Evaluation`: `clean` and `robust` (shares in [0, 1]), `count` (of images), `attack` (its name),
        `standing` (after each attack), `clean_mask` and `robust_mask` (by image).

    Warns:
        UserWarning: Images whose gradient is zero or not finite, so that PGD could not move them; a model that
            answers differently twice, or differently beside other images; values of odd range; shares of ranks
            that hold images twice.

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
    attacks = attack if isinstance(attack, list | tuple) else [attack]
    task = Task(loss, correct, samples, ascended=None in attacks or "pgd" in attacks)
    descent = Descent(threat, task, steps, step_size, restarts)
    if isinstance(loader, Replay):
        raise ValueError(
            "loader is a replay, made for training: evaluate on a loader of test images, not wrapped"
        )
    if sharded and not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("sharded=True needs a process group: call init_process_group first")
    stages: list[Stage] = []
    names: list[str] = []
    for one in attacks:
        if one is None or one == "pgd":
            names.append(descent.name)
            stages.append(Stage(descent, names[-1]))
        elif isinstance(one, str) and one == "autoattack":
            names.append("AutoAttack standard")
            stages += [Stage(autoattack(threat, task, part), part) for part in PARTS]
        elif callable(one):
            names.append(getattr(one, "__name__", type(one).__name__))
            stages.append(Stage(one, names[-1]))
        else:
            raise ValueError(
                f"attack must be None, 'pgd', 'autoattack', callable, or a list of these, got {one!r}"
            )
    if not stages:
        raise ValueError("attack is an empty list; None means PGD")
    times: Counter[str] = Counter()
    for stage in stages:
        times[stage.label] += 1
        stage.label += f" ({times[stage.label]})" * (times[stage.label] > 1)
    name = ", ".join(names) + ("" if autocast is None else f" {autocast}".replace("torch.", ""))
    if device is None:
        places = (p.device for m in within(model, nn.Module) for p in m.parameters())
        device = next((place for place in places if place.type != "meta"), None)
    shown = bar(loader, name, progress and not (sharded and distributed.get_rank()))
    share = Share(loader) if sharded else None
    with Subject(model, torch.device("cpu" if device is None else device)) as subject, shown:
        run = Run(subject, threat, task, autocast, shown)
        images = run.right(loader, device, share)
        for stage in stages:
            images = run.through(stage, images)
        for _ in images:  # draws them all through
            pass
    descent.tell()
    totals = [len(run.clean), float(run.clean.sum()), *(stage.lost for stage in stages)]
    if share is not None:
        totals = share.summed(totals, run.device)
    count, left, *losses = totals
    if not count:
        raise ValueError("the loader is empty: there is nothing to evaluate on")
    clean, standing = left / count, {}
    for stage, lost in zip(stages, losses, strict=True):
        left -= lost
        standing[stage.label] = left / count
    masks = (m.bool() if run.whole else m for m in (run.clean, run.worst))
    return Evaluation(clean, left / count, int(count), name, threat, standing, *masks)


class NoBar(contextlib.nullcontext[None]):
    """In place of a bar."""

    def update(self, *_: str) -> None:
        """Show nothing."""

    set_postfix_str = update


def bar(loader: Any, name: str, progress: bool) -> Any:
    """A bar over the batches, where there is a terminal or a notebook to show it."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return NoBar()
    if not progress or not ("notebook" in tqdm.__module__ or sys.stderr.isatty()):
        return NoBar()
    total = len(loader) if hasattr(loader, "__len__") else None
    return tqdm(total=total, desc=name, leave=False)
