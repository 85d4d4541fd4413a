"""The attacks that `evaluate` knows, as rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from free_adv.attack import climb, rounded
from free_adv.checks import Loss
from free_adv.model import Model
from free_adv.run import Attack, Round
from free_adv.threat import ThreatModel


def descents(
    threat: ThreatModel,
    steps: int,
    size: float,
    restarts: int,
    loss: Loss,
    label: str,
    flat: list[int],
) -> list[Round]:
    """PGD, a round for each start; `flat` gets how many samples had no gradient in the first, and of how many."""
    generators: dict[torch.device, torch.Generator] = {}

    def start(first: bool) -> Callable[..., Tensor]:
        def attack(model: Model, x: Tensor, y: Tensor, rival: Tensor) -> Tensor:
            generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(0))
            delta = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            threat.randomise(delta, generator)
            x_adv, zero = climb(model, x, y, threat, delta, steps, size, loss, rival)
            if first:
                flat[:] = [flat[0] + zero, flat[1] + len(x)]
            return x_adv

        return attack

    return [Round(start(i == 0), label, foreign=False, start=i) for i in range(restarts)]


def autoattack(threat: ThreatModel) -> list[Round]:
    """The four parts of AutoAttack. It works on images in [0, 1]: its model maps them to the loader's units."""
    try:
        from pyautoattack import AutoAttack  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "attack='autoattack' needs the extra: pip install 'free-adv[eval]'"
        ) from error
    if threat.bounds is None:
        raise ValueError("attack='autoattack' needs bounds=(lowest, highest), got bounds=None")
    low, high = threat.bounds
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]

    def part(name: str) -> Attack:
        def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
            def on_unit_images(u: Tensor) -> Any:
                return model(threat.from_pixels(low + (high - low) * u, x.dtype)).to(u.dtype)

            if x.ndim != 4:
                raise ValueError(
                    "attack='autoattack' takes images of shape (N, channels, height, width), got inputs of "
                    f"shape {tuple(x.shape)}; use PGD"
                )
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            if classes < 4:
                raise ValueError(
                    f"attack='autoattack' needs at least 4 classes, got {classes}; use PGD"
                )
            eps = threat.eps / (high - low)
            adversary = AutoAttack(on_unit_images, norm=norm, eps=eps, seed=0, device=x.device)
            adversary.attacks_to_run = [name]
            for targeted in (adversary.apgd_targeted, adversary.fab):  # 9 by default
                targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
            # pyautoattack calls view(), which channels_last does not allow.
            pixels = threat.to_pixels(x)
            unit = ((pixels - low) / (high - low)).clamp(0, 1).float().contiguous()
            found, _ = adversary.run_standard_evaluation(unit, y, batch_size=len(x))
            moved = threat.perturb(x.to(pixels.dtype), low + (high - low) * found - pixels)
            return rounded(threat, x, moved)

        return attack

    return [Round(part(name), name) for name in ("apgd-ce", "apgd-t", "fab-t", "square")]
