"""What GitHub reads: workflows name what exists, and agree with pyproject.toml on the supported versions of Python."""

import re
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(file for file in (PROJECT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml")
PYPROJECT = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")  # as text: tomllib came with Python 3.11
TARGETS = set(
    re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
)
SUPPORTED = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)


def load(file):
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow):
    return "\n".join(step["run"] for step in steps(workflow) if "run" in step)


def test_there_is_a_workflow_for_each_task():
    assert {file.stem for file in WORKFLOWS} >= {"lint", "tests", "nightly", "transformers-main", "docs", "release"}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_can_be_run(file):
    workflow = load(file)
    assert workflow["name"] and workflow[True], "'on' is read as a boolean by YAML 1.1"
    assert workflow["permissions"] == {"contents": "read"}, "jobs ask for more where they need it"
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] and set(job.get("needs", "").split()) <= workflow["jobs"].keys(), name
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step.get("uses", "a/b@v1")), step


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_name_commands_that_exist(file):
    run = commands(load(file))
    assert set(re.findall(r"\bmake ([\w-]+)", run)) <= TARGETS
    for script in re.findall(r"\bbash (\S+)", run):
        assert (PROJECT / script).is_file(), script


def test_tests_run_on_every_supported_python_with_newest_and_lowest_versions():
    (requires,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', PYPROJECT, re.MULTILINE)
    matrix = load(PROJECT / ".github" / "workflows" / "tests.yml")["jobs"]["versions"]["strategy"]["matrix"]
    assert matrix["python"] == SUPPORTED and SUPPORTED[0] == requires
    assert matrix["versions"] == ["newest"] and {"python": requires, "versions": "lowest"} in matrix["include"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_use_supported_pythons(file):
    for step in steps(load(file)):
        version = step.get("with", {}).get("python-version")
        assert version is None or version == "${{ matrix.python }}" or version in SUPPORTED


def test_only_the_release_publishes_and_without_a_token():
    release = load(PROJECT / ".github" / "workflows" / "release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}
    publish = release["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert not [file for file in WORKFLOWS if "secrets." in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_issue_forms_are_complete(file):
    form = load(file)
    assert form["name"] and form["description"] and form["body"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    assert all(field["attributes"].get("label") for field in form["body"] if field["type"] != "markdown")


def test_hooks_run_what_lint_runs():
    config = load(PROJECT / ".pre-commit-config.yaml")
    local = {hook["entry"].split()[0] for repo in config["repos"] if repo["repo"] == "local" for hook in repo["hooks"]}
    assert local == {".venv/bin/ruff", ".venv/bin/mypy"}


def test_the_citation_names_the_version_and_the_paper():
    citation = load(PROJECT / "CITATION.cff")
    assert f'version = "{citation["version"]}"' in PYPROJECT
    (paper,) = citation["references"]
    assert f'Paper = "{paper["url"]}"' in PYPROJECT
