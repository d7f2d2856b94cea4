"""The wheel holds every file of the package, so that an installed visper finds its data."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SOURCES = PROJECT / "src"


def files(folder):
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    unpublished = ("__pycache__", ".egg-info")
    return {str(file) for file in found if not any(part.endswith(unpublished) for part in file.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built with the installed setuptools from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder)
    shutil.copytree(SOURCES / "visper", folder / "src" / "visper", ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    expected = files(SOURCES)
    data = {name for name in expected if not name.endswith(".py")}
    assert len(data) > 50, "recipes, catalog, bases"
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_data_files_arrive_unchanged(wheel):
    for name in files(SOURCES):
        assert wheel[name] == (SOURCES / name).read_bytes(), name


def test_the_wheel_brings_the_command_and_the_license(wheel):
    (entry_points,) = (name for name in wheel if name.endswith("entry_points.txt"))
    assert "visper = visper.cli:main" in wheel[entry_points].decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
