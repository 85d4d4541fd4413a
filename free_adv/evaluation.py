"""Clean and robust accuracy over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from free_adv.attack import Model, pgd, undisturbed
from free_adv.threat import ThreatModel

Attack = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` has measured; it prints as one row of a table.

    Attributes:
        clean: Share of the images that are classified correctly, in [0, 1].
        robust: Share that stays correct under the attack, in [0, 1].
        count: Number of images.
        attack: Name of the attack, with its steps and restarts.
        threat: The threat model.
    """

    clean: float
    robust: float
    count: int
    attack: str
    threat: ThreatModel

    def __str__(self) -> str:
        """For example `clean 84.30%  robust 46.20%  PGD steps=20 restarts=1  linf eps=8/255  10000 images`.

        Rows are as wide as one another, so that several printed in turn are a table.
        """
        return (
            f"clean {self.clean:7.2%}  robust {self.robust:7.2%}  {self.attack:<52}  "
            f"{self.threat.norm} eps={_levels(self.threat.eps):<7}  {self.count} images"
        )


def _levels(size: float) -> str:
    """A length in pixel units as people write it, `8/255` where it is a whole number of grey levels."""
    levels = round(size * 255, 6)
    return f"{levels:.0f}/255" if levels == round(levels) else f"{size:g}"


def evaluate(
    model: Model,
    loader: Iterable[Any],
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    attack: Attack | str | None = None,
    autocast: torch.dtype | None = None,
    sharded: bool = False,
    device: torch.device | str | int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Clean and robust accuracy of a classifier over a loader.

    The model runs in evaluation mode and is left as it was found: its mode, parameter gradients,
    batch-norm statistics, and the global random state. The same call gives the same numbers. Only
    images that the model classifies correctly are attacked.

    Args:
        model: Maps a batch to logits of shape (N, classes).
        loader: Yields batches `(x, y)`: inputs of shape (N, ...), class indices of shape (N,).
        threat: The threat model, in pixel units, with `mean` and `std` if the loader normalises.
        steps: Gradient steps of PGD.
        step_size: Length of a step of PGD, in pixel units; see `pgd`.
        restarts: Random starts of PGD; the worst counts, and an image once fooled is not attacked again.
        loss: What PGD ascends: "ce", the cross-entropy, or "cw", the margin loss; see `pgd`.
        attack: None for `pgd`; "autoattack" for the standard AutoAttack (Croce & Hein 2020, the `eval`
            extra); or any `(model, x, y) -> x_adv`, in the units of the loader.
        autocast: Run the model under `torch.autocast` of this type, such as `torch.bfloat16`. None means in the
            model's own precision, also inside an autocast block.
        sharded: Each rank's loader yields a share of its own: add up over the process group. Every rank
            must call, with a model that does not communicate: DDP is unwrapped, FSDP needs a full copy.
        device: Where to move the batches. None means where the model is.
        progress: Show a bar, if tqdm is installed.

    Returns:
        An object with `clean`, `robust` (shares in [0, 1]), `count` (of images) and `attack` (its name).

    Raises:
        ValueError: The loader is empty or its batches are not `(x, y)`; an attack left the threat model.
        RuntimeError: `sharded` without a process group.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> loader = [(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)]
        >>> result = evaluate(model, loader, ThreatModel(8 / 255), steps=10, progress=False)
        >>> result.count, result.attack, result.robust <= result.clean
        (20, 'PGD steps=10 restarts=1', True)
    """
    if sharded and not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("sharded=True needs a process group: call init_process_group first")
    if isinstance(model, DistributedDataParallel):  # ranks may differ in their number of passes
        model = model.module
    if device is None and isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), None)
    if attack is None:
        name = f"PGD{' (CW loss)' * (loss == 'cw')} steps={steps} restarts={restarts}"
        name += "" if step_size is None else f" step_size={_levels(step_size)}"
        settings = {"steps": steps, "restarts": restarts, "loss": loss, "step_size": step_size}
        generators: dict[torch.device, torch.Generator] = {}

        def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
            generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(0))
            return pgd(model, x, y, threat, **settings, generator=generator)  # type: ignore[arg-type]
    elif attack == "autoattack":
        name, attack = "AutoAttack standard", _autoattack(threat)
    elif callable(attack):
        name = getattr(attack, "__name__", type(attack).__name__)
    else:
        raise ValueError(f"attack must be None, 'autoattack' or callable, got {attack!r}")
    name += "" if autocast is None else f" {autocast}".replace("torch.", "")
    clean = robust = count = 0
    for batch in _bar(loader, name, progress and not (sharded and distributed.get_rank())):
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError(
                f"the loader must yield (x, y), got a {type(batch).__name__}; "
                "for other batches pass a generator, ((b['image'], b['label']) for b in loader)"
            )
        x, y = (t.to(device) if device is not None else t for t in batch)
        precision = torch.autocast(x.device.type, autocast, enabled=autocast is not None)
        with undisturbed(model, x.device), precision:
            count += len(y)
            right = _right(model, x, y)
            if not (n := int(right.sum())):
                continue
            clean += n
            x, y = x[right], y[right]
            x_adv = attack(model, x, y).detach()
            _refuse_outside(threat, x, x_adv, name)
            robust += int(_right(model, x_adv, y).sum())
    if sharded:
        totals = torch.tensor([clean, robust, count], device=device)
        distributed.all_reduce(totals)
        clean, robust, count = totals.tolist()
    if not count:
        raise ValueError("the loader is empty: there is nothing to evaluate on")
    return Evaluation(clean / count, robust / count, count, name, threat)


def _right(model: Model, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
        return torch.logical_and(logits.argmax(1) == y, ~logits.isnan().any(1))


def _refuse_outside(threat: ThreatModel, x: Tensor, x_adv: Tensor, name: str) -> None:
    """Refuse adversarial inputs that the threat model does not contain: most often eps in wrong units."""
    delta = threat.displacement(x, x_adv)
    farthest = threat.distance(delta).max().item()
    slack = 1e-4 + 4 * torch.finfo(x.dtype).eps
    if not farthest <= threat.eps * (1 + slack) + slack * 1e-2:
        raise ValueError(
            f"attack {name} moved an input by {farthest:.4g} in {threat.norm}, but eps is "
            f"{threat.eps:.4g}; give it eps in pixel units and the loader's mean and std"
        )
    if not torch.allclose(threat.perturb(x, delta), x_adv, rtol=slack, atol=slack):
        raise ValueError(
            f"attack {name} left bounds {threat.bounds}; give it the bounds of the threat model, in "
            "the loader's units"
        )


def _autoattack(threat: ThreatModel) -> Attack:
    """AutoAttack works on images in [0, 1]: it gets a model that maps them to the loader's units."""
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

    def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
        def on_unit_images(u: Tensor) -> Any:
            return model(threat.from_pixels(low + (high - low) * u, x.dtype))

        eps = threat.eps / (high - low)
        if (classes := model(x[:1]).shape[1]) < 4:
            raise ValueError(
                f"attack='autoattack' needs at least 4 classes, got {classes}; use PGD"
            )
        adversary = AutoAttack(on_unit_images, norm=norm, eps=eps, seed=0, device=x.device)
        for part in (adversary.apgd_targeted, adversary.fab):  # 9 by default
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        # pyautoattack calls view(), which channels_last does not allow.
        unit = ((threat.to_pixels(x) - low) / (high - low)).clamp(0, 1).contiguous()
        found, _ = adversary.run_standard_evaluation(unit, y, batch_size=len(x))
        return threat.from_pixels(low + (high - low) * found, x.dtype)

    return attack


def _bar(loader: Iterable[Any], name: str, progress: bool) -> Iterable[Any]:
    if not progress:
        return loader
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return loader
    bar: Iterable[Any] = tqdm(loader, desc=name, leave=False)
    return bar
