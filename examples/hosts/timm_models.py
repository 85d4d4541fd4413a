"""One free minibatch through any timm model, or through the smallest model of every timm module.

    python examples/hosts/timm_models.py resnet18 vit_tiny_patch16_224
    python examples/hosts/timm_models.py --sweep
    python examples/hosts/timm_models.py --modes --backend aot_eager

Prints a row per model: the largest |delta| over eps, the share of the pixels that had a gradient, and
what is wrong if something is. The weights and the images are random; nothing is downloaded.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from arguments import fraction
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional

from free_adv import FreeAdversarial

MODES = ("fp32", "bf16", "fp16", "channels_last", "compile", "checkpointing", "two-optimizers")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = (  # modules for --modes: convolutions, attention, mixers and what lies between
    "resnet",
    "regnet",
    "efficientnet",
    "mobilenetv3",
    "convnext",
    "vision_transformer",
    "swin_transformer",
    "mlp_mixer",
    "efficientvit_mit",
    "maxxvit",
    "xcit",
    "levit",
)
CLASSES = 10


@dataclass
class Result:
    """What one minibatch did; `fault` is empty if all is well."""

    size: tuple[int, ...]
    seconds: float
    reach: float
    pixels: float
    fault: str
    supported: bool = True


def smallest(module: str) -> str:
    """The model of a timm module with the fewest parameters times pixels."""

    def cost(name: str) -> int:
        with torch.device("meta"):  # shapes only: nothing is drawn, nothing takes memory
            model = timm.create_model(name, pretrained=False)
        _, height, width = resolve_model_data_config(model)["input_size"]
        return sum(p.numel() for p in model.parameters()) * height * width

    return min(timm.list_models(module=module), key=cost)


def create(name: str, size: int | None, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights and its data config, whose input is at most `size` pixels a side."""
    arguments = {"pretrained": False, "num_classes": CLASSES, **arguments}
    with torch.device("meta"):
        config = resolve_model_data_config(timm.create_model(name, **arguments))
    channels, *own = config["input_size"]
    if size is None or size >= max(own):
        return timm.create_model(name, **arguments), config
    config["input_size"] = (channels, size, size)
    try:
        return timm.create_model(name, img_size=size, **arguments), config
    except TypeError:  # the model takes any size
        return timm.create_model(name, **arguments), config


def optimizers(model: nn.Module, mode: str) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if mode != "two-optimizers":
        return torch.optim.SGD(parameters, lr=1e-3)
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    muon = getattr(torch.optim, "Muon", torch.optim.SGD)  # torch 2.9 and later
    kinds = ((muon, matrices), (torch.optim.AdamW, others))
    return [kind(group, lr=1e-3) for kind, group in kinds if group]


def norms(model: nn.Module) -> list[float]:
    """A fingerprint of the weights that takes no memory, as a copy of them would."""
    with torch.no_grad():
        return [torch.linalg.vector_norm(p, dtype=torch.double).item() for p in model.parameters()]


def train(
    name: str,
    mode: str = "fp32",
    *,
    device: str = "cpu",
    batch_size: int = 2,
    replays: int = 2,
    eps: float = 4 / 255,
    backend: str = "inductor",
    size: int | None = None,
    **arguments: Any,
) -> Result:
    """Train a model on one free minibatch of random images, and check that it was adversarial."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model, config = create(name, size, **arguments)
    model.to(device).train()
    shape, mean, std = (tuple(config[key]) for key in ("input_size", "mean", "std"))
    pixels = torch.rand(batch_size, *shape, device=device)
    x = (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
    y = torch.randint(CLASSES, (batch_size,), device=device)

    run = model
    if mode == "channels_last":
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    elif mode == "checkpointing":
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError):
            seconds = time.perf_counter() - start
            return Result(shape, seconds, 0.0, 0.0, "", supported=False)
    elif mode == "compile":
        torch.compiler.reset()  # of the model before
        run = torch.compile(model, backend=backend)
    # A scale that has settled: the usual first one overflows, which skips the first few steps.
    scaler = torch.amp.GradScaler(device, init_scale=128) if mode == "fp16" else None
    cast = {"dtype": AUTOCAST.get(mode), "enabled": mode in AUTOCAST}

    free = FreeAdversarial(
        optimizers(model, mode), eps=eps, replays=replays, mean=mean, std=std, scaler=scaler
    )
    before = norms(model)
    losses: list[Tensor] = []
    grads: list[Tensor | None] = []
    for images, labels in free.replay([(x, y)]):
        images.retain_grad()
        with torch.autocast(torch.device(device).type, **cast):
            output = run(images)
        loss = functional.cross_entropy(output.float(), labels)
        free.step(loss)
        losses.append(loss.detach())
        grads.append(images.grad)

    delta = free.delta
    assert delta is not None  # noqa: S101 - there was a batch
    after = norms(model)
    reach = (delta.abs().max() / eps).item()
    checks = {
        "a replay received no gradient": len(grads) == replays
        and all(g is not None for g in grads),
        "the loss is not finite": all(bool(loss.isfinite()) for loss in losses),
        "delta is not finite": bool(delta.isfinite().all()),
        "delta does not reach eps": reach > 1 - 1e-6,
        "delta is beyond eps": reach < 1 + 1e-6,
        "weights are not finite": all(map(math.isfinite, after)),
        "no weight has moved": before != after,
    }
    fault = ", ".join(what for what, well in checks.items() if not well)
    # That of the last replay: a head that starts at zero gives the first one zeros only.
    pixels = 0.0 if grads[-1] is None else (grads[-1] != 0).float().mean().item()
    return Result(shape, time.perf_counter() - start, reach, pixels, fault)


def report(rows: Iterable[tuple[str, str, str]], **options: Any) -> bool:
    """Train and print (module, model, mode) row by row; whether all went well."""
    start = time.perf_counter()
    good = total = 0
    head = ("module", "model", "mode", "input", "seconds", "|delta|/eps", "pixels")
    print("{:<27}{:<38}{:<15}{:>13}{:>9}{:>13}{:>8}".format(*head))
    for module, name, mode in rows:
        print(f"{module:<27}{name:<38}{mode:<15}", end="", flush=True)
        total += 1
        try:
            result = train(name, mode, **options)
        except Exception as error:  # a sweep goes on, and counts it
            reason = (str(error).strip() or "no message").splitlines()[0]
            print(f"  {type(error).__name__}: {reason}", flush=True)
            continue
        good += not result.fault
        size = "x".join(map(str, result.size))
        numbers = f"{size:>13}{result.seconds:>9.1f}{result.reach:>13.6f}{result.pixels:>8.1%}"
        if not result.supported:
            numbers = f"{size:>13}{result.seconds:>9.1f}{'-':>13}{'-':>8}"
        verdict = result.fault or ("ok" if result.supported else "the model has no such mode")
        print(f"{numbers}  {verdict}", flush=True)
    print(f"{good} of {total}, in {time.perf_counter() - start:.0f} s")
    return good == total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="names of timm models")
    parser.add_argument("--sweep", action="store_true", help="the smallest model of every module")
    parser.add_argument("--modes", action="store_true", help="a dozen small families, every mode")
    parser.add_argument("--only", default="", help="modules that have this in their name")
    parser.add_argument("--mode", choices=MODES, default="fp32")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; or aot_eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--replays", type=int, default=2, help="the paper's m")
    parser.add_argument(
        "--eps", type=fraction, default="4/255", help="linf radius, pixels in [0, 1]"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=336,
        help="at most so many pixels a side: attention needs memory",
    )
    args = parser.parse_args()
    if not (args.models or args.sweep or args.modes):
        parser.error("name some models, or pass --sweep or --modes")

    modules = FAMILIES if args.modes else timm.list_modules() if args.sweep else ()
    names = [("", name) for name in args.models]
    begin = time.perf_counter()
    names += [(module, smallest(module)) for module in modules if args.only in module]
    if modules:
        print(f"the smallest models of the modules, found in {time.perf_counter() - begin:.0f} s")
    modes = MODES if args.modes else (args.mode,)
    options = ("device", "batch_size", "replays", "eps", "backend", "size")
    rows = [(module, name, mode) for module, name in names for mode in modes]
    good = report(rows, **{option: getattr(args, option) for option in options})
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
