"""The offline world: rendered scenes, small base models, all stages, questions and a report."""

from pathlib import Path

BASES = Path(__file__).parent / "bases"
"""Folder of the small base models that ship with the package, built by ``tools/quickstart_bases``."""
