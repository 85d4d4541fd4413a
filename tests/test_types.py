"""What a type checker sees of the package where it is installed as the README says: `pip install -e .`."""

import doctest
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import free_adv

ROOT = Path(__file__).parents[1]

SCRIPT = """
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from free_adv import FreeAdversarial, ThreatModel, evaluate, pgd


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    free = FreeAdversarial(optimizer, eps=8 / 255, replays=8, norm="l2", start="uniform")
    for _ in range(free.epochs(200)):
        for x, y in free.replay(loader):
            free.step(nn.functional.cross_entropy(model(x), y))
    print(f"largest entry of delta: {free.delta.abs().max():.3f}")
    moved = nn.functional.mse_loss(model(free.clean), model(free.clean + free.delta))
    threat = ThreatModel(8 / 255, norm="linf", mean=[0.5], std=[0.2])
    x_adv: Tensor = pgd(model, x, y, threat, loss="cw")
    result = evaluate(model, [(x_adv, y)], threat, loss="ce", attack="autoattack")
    return result.robust + float(moved)
"""
WRONG = """
from free_adv import FreeAdversarial, ThreatModel, evaluate, pgd

FreeAdversarial(eps=0.1, norm="inf")
FreeAdversarial(eps=0.1, start="random")
FreeAdversarial(eps=0.1).steps(0)
ThreatModel(0.1, "L2")
pgd(abs, None, None, ThreatModel(0.1), loss="dlr")
for image, name in FreeAdversarial(eps=0.1).replay([(0.5, "cat")]):
    name.flatten()
"""


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """`mypy --strict` on scripts in an environment where pip has installed the package in editable form."""
    folder = tmp_path_factory.mktemp("types")
    clone = folder / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "free_adv", clone / "free_adv")
    venv.create(folder / "venv")
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    # What else is installed, torch above all; it comes behind the packages of the new environment.
    beside = Path(packages.stdout.strip()) / "beside.pth"
    beside.write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-e", clone], check=True)

    def run(torch_too, **scripts):
        lines = ["[mypy]", *(() if torch_too else ("[mypy-torch.*]", "follow_imports = skip"))]
        (folder / "mypy.ini").write_text("\n".join(lines))
        for name, text in scripts.items():
            (folder / f"{name}.py").write_text(text)
        names = [f"{name}.py" for name in scripts]
        command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, *names]
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
        done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
        return done.stdout + done.stderr

    return run


def examples():
    """The examples of the docstrings as scripts."""
    kinds = [getattr(free_adv, name) for name in free_adv.__all__ if name != "__version__"]
    texts = {
        f"example_{kind.__name__}": doctest.script_from_examples(kind.__doc__) for kind in kinds
    }
    head = "import torch\nfrom free_adv import FreeAdversarial, ThreatModel, evaluate, pgd\n"
    return {name: head + text for name, text in texts.items()}


def test_a_users_script_and_the_documented_examples_pass_in_strict_mode(check):
    # torch is left out, whose own types take most of the time.
    assert "Success: no issues found in 5 source files" in check(False, script=SCRIPT, **examples())


def test_what_is_no_value_or_method_of_the_package_is_seen_before_the_run(check):
    told = check(False, wrong=WRONG)
    assert "Found 6 errors in 1 file" in told
    for phrase in (
        "\"Literal['inf']\"; expected \"Literal['linf', 'l2']\"",
        "\"Literal['random']\"; expected \"Literal['carry', 'zero', 'uniform']\"",
        '"FreeAdversarial" has no attribute "steps"',
        "\"Literal['L2']\"; expected \"Literal['linf', 'l2']\"",
        '"str" has no attribute "flatten"',  # what the loader yields
        "\"Literal['dlr']\"; expected \"Literal['ce', 'cw'] | Callable",
    ):
        assert phrase in told


@pytest.mark.slow
def test_a_users_script_passes_in_strict_mode_with_the_types_of_torch(check):
    assert "Success: no issues found in 5 source files" in check(True, script=SCRIPT, **examples())
