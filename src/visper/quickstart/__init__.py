"""The offline world: rendered scenes, small base models, all stages, questions and a report."""

from pathlib import Path

BASES = Path(__file__).parent / "bases"
"""The small base models that ship with the package; ``tools/quickstart_bases`` builds them."""
