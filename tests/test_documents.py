"""Every snippet that a reader can copy runs, and the texts hold to what they promise."""

import ast
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
        assert ((ROOT / page).parent / link).exists(), link


def test_every_argument_is_in_the_table_of_the_readme():
    import inspect

    from free_adv import FreeAdversarial

    rows = "\n".join(re.findall(r"^\| `.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    for name in inspect.signature(FreeAdversarial).parameters:
        assert f"`{name}`" in rows, name
