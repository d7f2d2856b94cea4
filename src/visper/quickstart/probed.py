"""Scores of probes by what `visper probe --score` names, the offline world's exact maps among them."""

from __future__ import annotations

from pathlib import Path

from visper.common.errors import ConfigError
from visper.config import Run
from visper.evaluation.predictions import PreTrained, predict_images
from visper.evaluation.probe.measures import (
    COCO,
    DA2K,
    Finding,
    coco_findings,
    cosine_findings,
    da2k_findings,
    require_set,
)
from visper.evaluation.probe.recipe import images_below
from visper.evaluation.visualize import PROMPT
from visper.quickstart.controls import HeldOut, findings
from visper.quickstart.objective import drawing_teachers, sources_of

SETS = {DA2K: da2k_findings, COCO: coco_findings}
JUDGED = 300
"""Held-out scenes that are judged; as many others give the controls."""


def require_scorable(run: Run, what: str, root: Path) -> None:
    """Refuses what ``score_on`` could not score, before the probes of ``run`` are trained.

    Raises:
        ConfigError: ``what`` is neither a set nor a folder; or see ``require_set``.
    """
    if what in SETS:
        require_set(run, what, root)
    elif not Path(what).is_dir():
        raise ConfigError(f"--score {what}: neither {', '.join(SETS)} nor a folder")


def score_on(found: PreTrained, what: str, root: Path, limit: int | None = None) -> list[Finding]:
    """Scores on a set of ``SETS`` under ``root``, on a quickstart's world, or on a folder of images.

    Raises:
        ConfigError: see ``require_scorable``.
    """
    require_scorable(found.run, what, root)
    if what in SETS:
        return SETS[what](found, root, limit)
    folder = Path(what)
    if (folder / "held_out.npz").is_file():
        return world_findings(found, folder, limit or JUDGED)
    return cosine_findings(found, images_below(folder)[:limit], folder.absolute().name)


def world_findings(found: PreTrained, world: Path, judged: int) -> list[Finding]:
    """Depth error and pixels right against the exact maps of held-out scenes, and centered cosines."""
    scenes = HeldOut.read(world, 2 * judged)
    half = len(scenes.images) // 2
    fit, rest = scenes.part(0, half), scenes.part(half, 2 * half)
    teachers = drawing_teachers(found.run)
    predicted = predict_images(found.model, rest.images, PROMPT)
    return findings(predicted, sources_of(found.run, None, teachers), teachers, fit, rest)
