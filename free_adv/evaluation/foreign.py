"""Attacks of others, AutoAttack or the user's own, held to the threat model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from free_adv.checks import describe
from free_adv.evaluation.attack import rounded, wide
from free_adv.evaluation.task import Task, logits
from free_adv.threat import ThreatModel

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


def autoattack(
    threat: ThreatModel, task: Task, part: str
) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """One part of AutoAttack. It works on images in [0, 1]: its model maps them to the loader's units."""
    try:
        from pyautoattack import AutoAttack  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "attack='autoattack' needs the extra: pip install 'free-adv[eval]'"
        ) from error
    if callable(task.loss) or task.correct is not None:
        raise ValueError(
            "attack='autoattack' is for classifiers, without loss= and correct=; use PGD"
        )
    if task.samples > 1:
        raise ValueError(
            f"attack='autoattack' takes no samples={task.samples}: its standard version is for models that draw no "
            "random numbers. For those that do AutoAttack has a version of its own, version='rand': call "
            "pyautoattack.AutoAttack(..., version='rand') in an attack of yours, or use PGD"
        )
    if threat.bounds is None:
        raise ValueError("attack='autoattack' needs bounds=(lowest, highest), got bounds=None")
    low, high = threat.bounds

    def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
        def on_unit_images(u: Tensor) -> Any:
            with on(default):
                return model(threat.from_pixels(low + (high - low) * u, x.dtype)).to(u.dtype)

        if x.ndim != 4:
            raise ValueError(
                "attack='autoattack' takes images of shape (N, channels, height, width), got inputs of "
                f"shape {tuple(x.shape)}; use PGD"
            )
        with torch.no_grad():
            classes = logits(model(x[:1].clone()), 1).shape[1]
        if classes < 4:
            raise ValueError(
                f"attack='autoattack' needs at least 4 classes, got {classes}; use PGD"
            )
        # It draws on the default device and carries over: on the host, as for everybody else.
        default = torch.get_default_device()
        on: Any = contextlib.nullcontext if default.type == "cpu" else torch.device
        norm, eps = threat.norm.title(), threat.eps / (high - low)
        adversary = AutoAttack(on_unit_images, norm=norm, eps=eps, seed=0, device=x.device)
        adversary.attacks_to_run = [part]
        for targeted in (adversary.apgd_targeted, adversary.fab):  # 9 by default
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        # pyautoattack calls view(), which channels_last does not allow.
        pixels = threat.to_pixels(x)
        unit = ((pixels - low) / (high - low)).clamp(0, 1).float().contiguous()
        with on("cpu"):
            found, _ = adversary.run_standard_evaluation(unit, y, batch_size=len(x))
        moved = threat.perturb(x.to(pixels.dtype), low + (high - low) * found - pixels)
        return rounded(threat, x, moved)

    return attack


def inside(threat: ThreatModel, x: Tensor, x_adv: Any, name: str) -> Tensor:
    """What an attack returned, if the threat model contains it; what it does not is most often eps in wrong units."""
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        got = describe(x_adv) if isinstance(x_adv, Tensor) else f"a {type(x_adv).__name__}"
        raise TypeError(
            f"attack {name} must return a tensor of the shape of x, {tuple(x.shape)}, got {got}"
        )
    moved: Tensor = x_adv.detach().to(x.dtype)
    delta = threat.displacement(x, moved)
    slack = 1e-4 + 4 * torch.finfo(x.dtype).eps
    most = threat.eps * (1 + slack) + slack * 1e-2
    near = threat.distance(delta) <= most
    farthest = 0.0
    if not near.all():  # of a stray pixel the way back into the bounds is none of the attack's
        beyond = threat.displacement(brought(threat, x, moved), moved)
        farthest = threat.distance(beyond).max().item()
        threat.project(delta)
        held = rounded(threat, x, threat.perturb(wide(x), delta))
        moved = torch.where(near.reshape(-1, *[1] * (x.ndim - 1)), moved, held)
        delta = threat.displacement(x, moved)
    if not farthest <= most:
        raise ValueError(
            f"attack {name} moved an input by {farthest:.4g} in {threat.norm}, but eps is "
            f"{threat.eps:.4g}; give it eps in pixel units and the loader's mean and std"
        )
    if not torch.allclose(threat.perturb(x, delta), moved, rtol=slack, atol=slack):
        cure = "give it the bounds of the threat model, in the loader's units"
        raise ValueError(f"attack {name} left bounds {threat.bounds}; {cure}")
    return moved


def brought(threat: ThreatModel, x: Tensor, moved: Tensor) -> Tensor:
    """`x`, of which what strays outside the bounds has come back on its way to `moved`."""
    z = wide(x)
    if threat.bounds is None:
        return z
    inner = threat.from_pixels(threat.to_pixels(x).clamp(*threat.bounds), z.dtype)
    return moved.to(z.dtype).clamp(torch.minimum(z, inner), torch.maximum(z, inner))
