"""Imports point one way: a lower package never imports a higher one, and no files import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
PACKAGE = SOURCES / "visper"
ORDER: tuple[tuple[str, ...], ...] = (
    ("common",),
    ("config",),
    ("data",),
    ("model",),
    ("distillation",),
    ("target_store", "published"),
    ("training",),
    ("planning", "evaluation"),
    ("demo", "quickstart"),
    ("study",),
    ("cli",),
)
"""Lowest first. Packages of one level do not import each other."""
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports() -> dict[str, set[str]]:
    """Every module of the package -> the modules of the package that it imports, anywhere in the file."""
    files = {module_name(file): file for file in PACKAGE.rglob("*.py")}
    imports: dict[str, set[str]] = {}
    for name, file in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    found.add(submodule if submodule in files else str(node.module))
        imports[name] = {other for other in found if other in files and other != name}
    return imports


IMPORTS = read_imports()


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("package", LEVEL)
def test_packages_import_only_lower_ones(package):
    upward = {
        f"{module} -> {other}"
        for module, others in IMPORTS.items()
        for other in others
        if package_of(module) == package != package_of(other)
        and package_of(other) in LEVEL
        and LEVEL[package_of(other)] >= LEVEL[package]
    }
    assert not upward


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_package_has_its_place_in_the_order():
    packages = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert packages == set(LEVEL) | {"recipes"}


def test_files_stay_readable():
    long = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if len(f.read_text().splitlines()) > 400}
    assert not long


def test_functions_stay_readable():
    long = {
        f"{file.relative_to(PACKAGE)}:{node.name}"
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or node.lineno) - node.lineno >= 60
    }
    assert not long
