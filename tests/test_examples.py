"""The examples do what they say, run as a user runs them."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed.fsdp

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def table(out):
    """Method to (clean, robust), as fractions."""
    pattern = r"^(natural|free|pgd-7)\s.*?([\d.]+)%\s+([\d.]+)%"
    rows = re.findall(pattern, out, re.M)
    return {name: (float(clean) / 100, float(robust) / 100) for name, clean, robust in rows}


RESULT = r"clean +[\d.]+% robust +[\d.]+%"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DRY_RUNS = [
    (r"amp=fp16 updates=2:", "with_amp.py", "--amp", "fp16"),
    (r"amp=bf16 updates=2:", "with_amp.py"),
    (r"devices=1 updates=8:", "with_lightning.py", "--accelerator", "cpu", "--accumulate", "2"),
    (r"devices=2 updates=8:", "with_lightning.py", "--accelerator", "cpu", "--devices", "2"),
    (r"processes=1 epochs=2:", "with_accelerate.py", "--cpu", "--out", "FOLDER"),
    (r"processes=2 epochs=2:", *TORCHRUN, "with_accelerate.py", "--cpu", "--accumulate", "2"),
    (r"updates=3:", "with_trainer.py", "--accumulate", "2"),
    (r"natural .*\nfree", "with_text.py"),
    (r"updates=2:", "with_ignite.py"),
    (r"updates=2:", "with_fastai.py"),
    (r"ranks=2 updates=2:", *TORCHRUN, "with_ddp.py"),
    (r"ranks=2 updates=2:", *TORCHRUN, "with_fsdp.py"),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The scripts of this file by their commands, two at a time: most of their time goes by in imports."""
    picture = tmp_path_factory.mktemp("out") / "new" / "picture.png"
    quick = ["quickstart.py", "--passes", "8", "--plot", str(picture)]
    commands = [quick, ["variants.py", "--dry-run"]]
    commands += [[*command, "--dry-run"] for _, *command in DRY_RUNS]
    folder = str(tmp_path_factory.mktemp("state"))

    def start(command):
        settings = {"capture_output": True, "text": True, "cwd": EXAMPLES}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [folder if word == "FOLDER" else word for word in command]
        return subprocess.run([sys.executable, *command], env=environment, **settings)

    with ThreadPoolExecutor(2) as pool:
        yield {tuple(command[:-1]): pool.submit(start, command) for command in commands}


def test_the_quick_start_trains_prints_its_table_and_draws_its_picture(started):
    job = started["quickstart.py", "--passes", "8", "--plot"].result()
    rows = table(job.stdout)
    assert list(rows) == ["natural", "free", "pgd-7"], job.stderr
    assert rows["free"][1] > rows["natural"][1] + 0.2
    assert Path(job.args[-1]).read_bytes().startswith(b"\x89PNG")
    assert "train free" in job.stderr  # the progress bar


def test_the_variants_run(started):
    assert len(re.findall(r"\d+\.\d ± ", started["variants.py",].result().stdout)) == 5


@pytest.mark.parametrize(
    ("expected", "command"),
    [pytest.param(e, c, id=" ".join(c[-3:])) for e, *c in DRY_RUNS],
)
def test_the_script_of_each_host_runs(expected, command, started):
    if "with_fsdp.py" in command and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    if "with_fastai.py" in command:
        pytest.importorskip("fastai.vision.all")
    result = started[tuple(command)].result()
    assert result.returncode == 0, result.stderr
    assert re.search(expected, result.stdout)
    assert re.search(RESULT, result.stdout)
    assert "Warning: every rank" not in result.stderr


def test_accelerate_saves_and_resumes(started):
    job = started["with_accelerate.py", "--cpu", "--out", "FOLDER"].result()
    folder = Path(job.args[-2])
    assert (folder / "custom_checkpoint_0.pkl").exists()
    again = run("with_accelerate.py", "--cpu", "--out", folder, "--dry-run").stdout
    assert again == job.stdout


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("with_*.py")), ids=lambda p: p.name)
def test_a_host_script_has_at_most_three_lines_of_ours_beyond_the_import(script):
    ours = [line for line in script.read_text().splitlines() if "# free-adv" in line]
    assert sum("import" in line for line in ours) == 1
    assert len(ours) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_free_training_makes_the_digits_network_robust(seed, tmp_path):
    out = run("quickstart.py", "--seed", seed, "--plot", tmp_path / "picture.png").stdout
    clean, robust = table(out)["free"]
    assert clean >= 0.975
    assert robust >= 0.78
