"""What is public, what is typed and what the files say about each other."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import free_adv

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
workflows = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)


def test_the_public_names_are_these():
    assert dir(free_adv) == free_adv.__all__
    assert free_adv.__all__ == ["FreeAdversarial", "ThreatModel", "__version__", "evaluate", "pgd"]
    assert all(getattr(free_adv, name).__doc__ for name in free_adv.__all__)


def test_the_package_is_typed():
    assert (ROOT / "free_adv/py.typed").exists()


def test_torch_is_the_only_package_that_an_import_brings_in():
    code = (
        "import sys, torch; before = set(sys.modules); import free_adv; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(sorted(new - {'torch', 'free_adv'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_setting_stands_in_both_pyproject_and_setup_cfg():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.")[0]
    keys = set(re.findall(r"^([\w-]+) =", project, re.M))
    assert not keys & {key for section in setup.sections() for key in setup[section]}


def test_what_is_private_in_the_package_is_named_in_one_file_of_the_tests():
    for file in (ROOT / "tests").glob("*.py"):
        found = re.findall(r"\._loop\b|free_adv\.\w+ import", file.read_text(encoding="utf-8"))
        assert not found or file.name in ("internals.py", Path(__file__).name), (file.name, found)


def test_changelog_citation_and_version_agree():
    changelog = (ROOT / "docs/changelog.md").read_text(encoding="utf-8")
    assert f"## {free_adv.__version__}\n" in changelog
    citation = (ROOT / "docs/CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {free_adv.__version__}\n" in citation


@workflows
def test_every_action_is_pinned_to_a_commit_and_names_its_version(workflow):
    uses = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    assert uses
    assert [
        use for use in uses if not re.fullmatch(r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)
    ] == []


@workflows
def test_a_workflow_may_only_read_and_only_the_upload_of_a_release_may_prove_who_it_is(workflow):
    text = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert text["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in text["jobs"].items() if "permissions" in job}
    upload = {"publish": {"id-token": "write"}}
    assert more == (upload if workflow.name == "release.yml" else {})


def test_ci_runs_every_python_of_the_project_and_its_oldest_torch():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert jobs["check"]["strategy"]["matrix"]["python"] == pythons
    assert f'requires-python = ">={pythons[0]}"' in project
    torch = re.search(r'^dependencies = \["torch>=([\d.]+)"\]', project, re.M)[1]
    _, python, install, _ = jobs["oldest"]["steps"]
    assert python["with"]["python-version"] == pythons[0]
    assert f"'torch=={torch}.*'" in install["run"]
