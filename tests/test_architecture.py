"""Imports point one way: a lower package never imports a higher one."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "visper"
ORDER = ("config", "data", "model", "distillation", "training", "evaluation", "interop", "quickstart", "cli")
SIDE_BY_SIDE = {"evaluation": set(), "interop": set(), "quickstart": {"evaluation"}}
"""Packages to the right of training, and which of their neighbours each may use."""


def allowed(package: str) -> set[str]:
    if package == "cli":
        return set(ORDER)
    below = set(ORDER[: ORDER.index("training") + 1]) if package in SIDE_BY_SIDE else set(ORDER[: ORDER.index(package)])
    return below | SIDE_BY_SIDE.get(package, set()) | {package, "recipes"}


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("visper.")}
    return found


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_only_to_the_left(package):
    for file in (PACKAGE / package).rglob("*.py"):
        wrong = imported_packages(file) - allowed(package)
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {wrong}"


def test_every_package_has_its_place_in_the_order():
    packages = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert packages == set(ORDER) | {"recipes"}


def test_files_stay_readable():
    long = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if len(f.read_text().splitlines()) > 400}
    assert not long
