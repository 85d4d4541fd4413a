"""The examples do what they say, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def table(out):
    """Method to (clean, robust), as fractions."""
    pattern = r"^(natural|free|pgd-7)\s.*?([\d.]+)%\s+([\d.]+)%"
    rows = re.findall(pattern, out, re.M)
    return {name: (float(clean) / 100, float(robust) / 100) for name, clean, robust in rows}


def test_the_quick_start_trains_prints_its_table_and_draws_its_picture(tmp_path):
    result = run("quickstart.py", "--fast", "--out", tmp_path / "new" / "picture.png")
    rows = table(result.stdout)
    assert list(rows) == ["natural", "free", "pgd-7"]
    assert rows["free"][1] > rows["natural"][1] + 0.2
    assert (tmp_path / "new/picture.png").read_bytes().startswith(b"\x89PNG")
    assert "train free" in result.stderr  # the progress bar


def test_the_variants_run(tmp_path):
    out = run("variants.py", "--passes", 2, "--replays", 2, "--seeds", 1).stdout
    assert len(re.findall(r"\d+\.\d ± ", out)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_free_training_makes_the_digits_network_robust(seed, tmp_path):
    out = run("quickstart.py", "--seed", seed, "--out", tmp_path / "picture.png").stdout
    clean, robust = table(out)["free"]
    assert clean >= 0.975
    assert robust >= 0.78
