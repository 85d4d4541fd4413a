"""Every snippet that a reader can copy runs, and the texts hold to what they promise."""

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def reader():
    """What somebody with a training script has before the first line of a snippet."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "criterion": torch.nn.CrossEntropyLoss(),
        "loader": [(torch.rand(4, 3, 8, 8), torch.arange(4))],
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, capsys):
    namespace = reader()
    for block in blocks(page, "python"):
        exec(block, namespace)


def test_the_readme_has_python_to_run():
    assert len(blocks("README.md", "python")) == 3


def test_the_loops_that_the_diffs_of_the_readme_end_with_train():
    diffs = blocks("README.md", "diff")
    assert len(diffs) == 2
    for diff in diffs:
        namespace = reader()
        before = namespace["model"][1].weight.detach().clone()
        lines = [line[1:] for line in diff.splitlines() if line[:1] != "-"]
        exec("from free_adv import FreeAdversarial\n" + "\n".join(lines), namespace)
        assert not torch.equal(namespace["model"][1].weight, before)
        added = [line for line in diff.splitlines() if line[:1] == "+" and "import" not in line]
        assert len(added) <= 4


@pytest.mark.parametrize(
    "diff", blocks("docs/guide.md", "diff"), ids=range(len(blocks("docs/guide.md", "diff")))
)
def test_a_host_needs_at_most_three_new_lines(diff):
    lines = diff.splitlines()
    for side in "-+":
        code = "\n".join(line[1:] for line in lines if line[:1] in (side, " "))
        ast.parse(textwrap.dedent(code))
    added = [line for line in lines if line[:1] == "+" and "import" not in line]
    assert 1 <= len(added) <= 3


@pytest.mark.parametrize("section", ["Plain PyTorch", "Mixed precision", "Gradient accumulation"])
@pytest.mark.parametrize("side", ["-", "+"])
def test_the_loops_of_the_guide_train_before_and_after_the_change(section, side):
    text = (ROOT / "docs/guide.md").read_text(encoding="utf-8").split(f"## {section}")[1]
    diff = re.search(r"^```diff\n(.*?)^```", text, re.M | re.S)[1]
    namespace = reader() | {"torch": torch, "device": torch.device("cpu"), "epochs": 8}
    namespace["loader"] *= 2
    before = namespace["model"][1].weight.detach().clone()
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (side, " ")]
    exec("from free_adv import FreeAdversarial\n" + "\n".join(lines), namespace)
    assert not torch.equal(namespace["model"][1].weight, before)
    assert ("free" in namespace) == (side == "+")


def test_each_command_of_the_readme_is_one_line_from_install_to_run():
    commands = blocks("README.md", "sh")
    assert len(commands) == 2
    assert all(c.startswith("pip install") and c.count("\n") == 1 for c in commands)


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_links_to_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link


def test_every_argument_is_in_the_table_of_the_readme():
    import inspect

    from free_adv import FreeAdversarial

    rows = "\n".join(re.findall(r"^\| `.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    for name in inspect.signature(FreeAdversarial).parameters:
        assert f"`{name}`" in rows, name


TABLE = r"<!-- (benchmarks/\S+\.json)(?: (\w+))? -->\n((?:\|.*\n)+)"


@pytest.mark.parametrize("page", PAGES)
def test_a_table_of_measurements_is_that_of_a_committed_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, key, table in re.findall(TABLE, text):
        record = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
        assert table.splitlines() == record[key or "table"], name
        assert {"torch", "machine", "commit"} <= first_environment(record).keys()
    unmarked = re.sub(TABLE, "", text)
    for row in re.findall(r"^\|.*$", unmarked, re.M):
        assert not re.search(r"\d\.\d", row), f"{page}: where is the file of {row}"


def first_environment(record):
    return record["environment"] if "environment" in record else record["runs"][0]["environment"]


def test_every_committed_result_is_in_a_page():
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for file in (ROOT / "docs" / "benchmarks").glob("*"):
        assert f"benchmarks/{file.name}" in pages
        if file.suffix == ".json":
            assert not re.search(r"/(tmp|home|root|work|data)/", file.read_text(encoding="utf-8"))


def test_the_ranges_over_seeds_in_the_readme_are_those_of_the_files():
    text = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    files = [ROOT / "docs" / "benchmarks" / f"quickstart-{seed}.json" for seed in range(3)]
    rows = [json.loads(f.read_text(encoding="utf-8"))["rows"] for f in files]
    for method, key, scale, digits, phrase in (
        ("free", "clean", 100, 1, "{} to {} % clean"),
        ("free", "robust", 100, 1, "{} to {} % under PGD-40"),
        ("free", "autoattack", 100, 1, "{} to {} % under AutoAttack"),
        ("pgd-7", "autoattack", 100, 1, "PGD-7 {} to {} %"),
        ("free", "relative", 1, 2, "Free took {} to {} times"),
    ):
        values = [scale * row[key] for run in rows for row in run if row["method"] == method]
        assert phrase.format(*(f"{f(values):.{digits}f}" for f in (min, max))) in text
