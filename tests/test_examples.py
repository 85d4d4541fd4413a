"""The examples do what they say, run as a user runs them."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import collapse
import pytest
import torch.distributed.fsdp
import variants

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def table(out):
    """Method to (clean, robust), as fractions."""
    pattern = r"^(natural|[Ff]ree|N-FGSM|fgsm-rs|pgd-7)\s.*?([\d.]+)%\s+([\d.]+)%"
    rows = re.findall(pattern, out, re.M)
    return {name: (float(clean) / 100, float(robust) / 100) for name, clean, robust in rows}


RESULT = r"clean +[\d.]+% robust +[\d.]+%"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
DRY_RUNS = [  # what each prints; the slow tests are those of longer imports, and second ones of a host
    ("amp=fp16 updates=2:", "with_amp.py --amp fp16", ()),
    ("amp=bf16 updates=2:", "with_amp.py", pytest.mark.slow),
    ("natural .*\n.*bounds=None\nfree", "with_text.py", ()),
    ("ranks=2 updates=2 fsdp=False:", f"{TORCHRUN} with_ddp.py", ()),
    ("ranks=2 updates=2 fsdp=True:", f"{TORCHRUN} with_ddp.py --fsdp", pytest.mark.slow),
    ("devices=1 updates=8:", "with_lightning.py --accelerator cpu --accumulate 2", ()),
    ("devices=2 updates=8:", "with_lightning.py --accelerator cpu --devices 2", pytest.mark.slow),
    (
        "processes=2 epochs=2:",
        f"{TORCHRUN} with_accelerate.py --cpu --accumulate 2",
        pytest.mark.slow,
    ),
    ("updates=4:", "with_trainer.py --accumulate 2", pytest.mark.slow),
    ("updates=2:", "with_ignite.py", pytest.mark.slow),
    ("updates=2:", "with_fastai.py", pytest.mark.slow),
]


def script(word):
    """The path of a script: a host's by its name, others by their folder and name."""
    places = [EXAMPLES / word, EXAMPLES / "hosts" / word] if word.endswith(".py") else []
    return next((str(place) for place in places if place.exists()), word)


@pytest.mark.slow  # .ci/run makes it too
def test_the_quick_start_trains_prints_its_table_and_draws_its_picture(tmp_path):
    words = [sys.executable, script("quickstart.py")]
    job = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    rows = table(job.stdout)
    assert list(rows) == ["natural", "Free", "N-FGSM"], job.stderr
    for name in ("Free", "N-FGSM"):
        assert rows[name][1] > rows["natural"][1] + 0.4
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_the_loops_of_the_quick_start_differ_in_three_lines():
    text = (EXAMPLES / "quickstart.py").read_text()
    loops = re.findall(r"^for _ in range.*?schedule\.step\(\)\n", text, re.M | re.S)
    natural, free, n_fgsm = (re.sub(r" *# .*", "", loop).splitlines() for loop in loops)
    assert n_fgsm == free
    assert [line for line in free if line not in natural] == [
        "for _ in range(free.epochs(24)):",
        "    for x, y in free.replay(loader):",
        "        free.step(loss)",
    ]
    assert "set_num_threads(1)" in text


@pytest.mark.slow
def test_the_comparison_has_a_row_for_each_method_a_record_and_a_picture(tmp_path):
    words = [
        sys.executable,
        script("experiments/compare.py"),
        "--dry-run",
        "--json",
        "compare.json",
    ]
    job, place = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path), tmp_path
    methods = ["natural", "free", "fgsm-rs", "pgd-7"]
    assert list(table(job.stdout)) == methods, job.stderr
    assert (place / "compare.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((place / "compare.json").read_text())
    assert [row["method"] for row in record["rows"]] == methods
    assert all({"clean", "robust", "relative"} <= row.keys() for row in record["rows"])
    assert record["table"][0] == "| method | time, relative | clean | PGD-40 |"
    names = [line.split(" | ")[0] for line in record["table"][2:]]
    assert names == ["| natural", "| Free, m=2", "| FGSM-RS", "| PGD-7"]
    assert {"torch", "machine", "commit"} <= record["environment"].keys()


@pytest.mark.slow
def test_a_study_of_collapse_says_what_each_threshold_would_have_told(tmp_path, capsys):
    table, picture = tmp_path / "collapse.json", tmp_path / "collapse.png"
    command = ["--passes", "8", "--looks", "2", "--seeds", "1", "--settings", "eps 0.15, m=4"]
    threads = torch.get_num_threads()
    collapse.main([*command, "--json", str(table), "--plot", str(picture)])
    torch.set_num_threads(threads)
    (run,) = json.loads(table.read_text())["runs"]
    assert [row["update"] for row in run["curve"]] == [92, 184]
    assert picture.read_bytes().startswith(b"\x89PNG")

    def made(*looks):
        keys = "update", "robust", "alignment"
        return [dict(zip(keys, (u, r, [0.0, a]), strict=True)) for u, r, a in looks]

    falls = made((1, 0.3, 0.4), (2, 0.4, 0.1), (3, 0.1, 0.1), (4, 0.0, 0.1))
    stays = made((1, 0.3, 0.4), (2, 0.1, 0.4), (3, 0.3, 0.4))
    never = made((1, 0.05, 0.4), (2, 0.0, 0.1))
    assert [collapse.collapse(curve) for curve in (falls, stays, never)] == [3, None, None]
    assert [collapse.alarm(curve, 0.5) for curve in (falls, stays, never)] == [2, None, 2]
    row = collapse.rules([{"curve": c} for c in (falls, stays, never)])[2 + 1]
    assert row == "| 0.5 | 1 of 1 | 1 to 1 | 1 of 2 |"


@pytest.mark.slow
def test_the_variants_run():
    words = [sys.executable, script("experiments/variants.py"), "--dry-run"]
    job = subprocess.run(words, capture_output=True, text=True)
    assert len(re.findall(r"\d+\.\d ± ", job.stdout)) == len(variants.VARIANTS), job.stderr


@pytest.mark.parametrize(
    ("expected", "command"),
    [pytest.param(e, c, id=c[c.index("with") :], marks=m) for e, c, m in DRY_RUNS],
)
def test_the_script_of_each_host_runs(expected, command, tmp_path):
    if "--fsdp" in command and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    if "with_fastai.py" in command:
        pytest.importorskip("fastai.vision.all")
    words = [sys.executable, *map(script, command.split()), "--dry-run"]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(expected, result.stdout)
    assert re.search(RESULT, result.stdout)
    assert "Warning: every rank" not in result.stderr


def test_accelerate_saves_and_resumes(tmp_path):
    words = ["hosts/with_accelerate.py", "--cpu", "--out", tmp_path / "state", "--dry-run"]
    out = run(*words).stdout
    assert re.search(f"processes=1 epochs=2:.*{RESULT}", out, re.S)
    assert (tmp_path / "state" / "custom_checkpoint_0.pkl").exists()
    assert run(*words).stdout == out


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("hosts/with_*.py")), ids=lambda p: p.name)
def test_a_host_script_has_at_most_three_lines_of_ours_beyond_the_import(script):
    ours = [line for line in script.read_text().splitlines() if "# free-adv" in line]
    assert sum("import" in line for line in ours) == 1
    assert len(ours) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_free_training_makes_the_digits_network_robust(seed, tmp_path):
    out = run("experiments/compare.py", "--seed", seed, "--plot", tmp_path / "p.png").stdout
    clean, robust = table(out)["free"]
    assert clean >= 0.975
    assert robust >= 0.78


HOSTS = {
    "accelerate",
    "fastai",
    "ignite",
    "lightning",
    "transformers",
}  # and whom attacks.py compares
OTHERS = {"art", "foolbox", "pyautoattack", "torchattacks"}
MODULES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # whose names on the index are others


def test_the_extra_brings_what_the_examples_import():
    scripts = list(EXAMPLES.rglob("*.py"))
    ours = {script.stem for script in scripts} | {"free_adv", "torch"}
    found = set()
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    wanted = found - ours - sys.stdlib_module_names - HOSTS - OTHERS
    project = (EXAMPLES.parent / "pyproject.toml").read_text()
    brought = {}
    for name, end in (("examples", r"^\]"), ("quickstart", r"\]$")):
        extra = re.search(rf"^{name} = \[(.*?){end}", project, re.M | re.S)
        brought[name] = set(re.findall(r'"([\w-]+)', extra[1]))
    assert brought["quickstart"] == {"scikit-learn", "matplotlib"}
    both = brought["examples"] - {"free-adv"} | brought["quickstart"]
    assert {MODULES.get(name, name) for name in wanted} == both


def test_scripts_import_helpers_from_beside_them_or_from_the_folder_that_a_line_names():
    scripts = list(EXAMPLES.rglob("*.py"))
    folder_of = {script.stem: script.parent for script in scripts}
    for script in scripts:
        text = script.read_text()
        added = re.findall(
            r'^sys\.path\.append\(str\(Path\(__file__\)\.parents\[1\] / "(\w+)"\)\)', text, re.M
        )
        assert len(added) == text.count("sys.path") <= 1, script
        folders = {script.parent, *(EXAMPLES / name for name in added)}
        for name in re.findall(r"^(?:import|from) (\w+)", text, re.M):
            assert folder_of.get(name, script.parent) in folders, (script, name)
        copied = script.parent.name == "hosts" or script.stem in (
            "quickstart",
            "cifar10",
            "imagenet",
        )
        assert not (copied and added), script


def test_every_script_is_in_the_table_of_the_readme_under_its_folder():
    text = (EXAMPLES / "README.md").read_text()
    for script in EXAMPLES.rglob("*.py"):
        if "__main__" in script.read_text():
            assert f"`{script.relative_to(EXAMPLES)}`" in text, script


def test_helpers_of_two_folders_do_not_share_a_name():
    names = [script.stem for script in EXAMPLES.rglob("*.py")]
    assert len(names) == len(set(names))
