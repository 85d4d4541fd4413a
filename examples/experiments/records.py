"""What an experiment writes to disk: checkpoints that a kill cannot tear, and results that say how they were made."""

import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import free_adv


def save(path: Path, state: dict[str, Any]) -> None:
    """`torch.save`, so that at any moment `path` holds the old state or the new one, whole; for one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with new.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    for torn in path.parent.glob(f"{path.name}.*.new"):  # left by a kill
        torn.unlink()


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` wrote; only tensors and plain values are accepted."""
    return torch.load(path, map_location=device, weights_only=True)


def write(path: Path, record: dict[str, Any]) -> None:
    """A result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)


def plain(found: free_adv.evaluation.Evaluation) -> dict[str, Any]:
    """An evaluation as plain values, without what it knows of each image."""
    values = {name: getattr(found, name) for name in ("clean", "robust", "count", "attack")}
    return {**values, "threat": asdict(found.threat), "standing": found.standing}


def random_state() -> dict[str, Any]:
    """The state of torch's global generators, of the CPU and of the current GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from a `random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def environment(device: torch.device | str) -> dict[str, Any]:
    """Machine kind, versions and commit, for the record."""
    device = torch.device(device)
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": gpu or f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "free_adv": free_adv.__version__,
        "commit": commit,
    }
