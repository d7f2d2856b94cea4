"""The site's pages: all are in the navigation, and the API reference names packages and objects that exist.

`make docs` builds the site and fails on what only the builder can know, such as a link to a missing heading.
"""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import visper

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
REFERENCED = [name for page in PAGES.values() for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
WITHOUT_API = {"visper.demo", "visper.cli", "visper.quickstart", "visper.recipes", "visper.study"}
"""Commands and data: not for import by users."""


def pages_in(navigation):
    for entry in navigation:
        for value in [entry] if isinstance(entry, str) else entry.values():
            yield from pages_in(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    site = yaml.safe_load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages_in(site["nav"])) == sorted(PAGES)


@pytest.mark.parametrize("name", REFERENCED)
def test_the_api_reference_names_modules_that_exist(name):
    assert import_module(name).__doc__


def test_every_package_has_a_place_in_the_api_reference():
    packages = {f"visper.{folder.parent.name}" for folder in (PROJECT / "src" / "visper").glob("*/__init__.py")}
    shown = {".".join(name.split(".")[:2]) for name in REFERENCED}
    assert packages - WITHOUT_API <= shown and not WITHOUT_API & shown


def test_every_public_name_of_visper_is_in_the_api_reference():
    named = set(re.findall(r"`(\w+)`", PAGES["api/index.md"]))
    assert {name for name in visper.__all__ if not name.startswith("__")} <= named


@pytest.mark.parametrize("page", PAGES)
def test_pages_link_only_to_the_site_and_the_web(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page])
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not ((DOCS / page).parent / target).resolve().is_relative_to(DOCS)]
    missing += [target for target in local if not ((DOCS / page).parent / target).exists()]
    assert not missing, "name files outside docs/ by their path, without a link"


def test_the_page_on_reliability_names_tests_that_exist():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGES["reliability.md"]))
    assert len(named) > 20 and not [name for name in named if not (PROJECT / name).is_file()]
    attacks = {f"tests/attacks/{file.name}" for file in (PROJECT / "tests" / "attacks").glob("test_*.py")}
    assert attacks <= named
