"""Scores probes on the sets that `visper probe --score` accepts, including the offline world's exact maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visper.common.errors import ConfigError
from visper.config import Run, load_run
from visper.data.checks.overlap import file_images, shared_images
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.sampler import spread
from visper.evaluation.predictions import PreTrained, load_pre_trained, predict_images
from visper.evaluation.probe.curves import SCORES, read_findings, save_findings
from visper.evaluation.probe.measures import (
    COCO,
    DA2K,
    Finding,
    coco_files,
    coco_findings,
    cosine_findings,
    da2k_files,
    da2k_findings,
    require_set,
)
from visper.evaluation.probe.recipe import images_below, probe_run, rows_file, teacher_targets_of, write_rows
from visper.evaluation.visualize import PROMPT
from visper.quickstart.controls import HeldOut, findings
from visper.quickstart.objective import drawing_teachers, sources_of
from visper.training import is_finished, run_stage

SETS = {DA2K: da2k_findings, COCO: coco_findings}
FILES = {DA2K: da2k_files, COCO: coco_files}
JUDGED = 300
"""Number of held-out scenes that are judged; the same number of others gives the controls."""

PROBED = ("depth", "seg")
TRAINING = ("optimization.global_batch=16", "optimization.lr=3e-3", "optimization.precision=float32")
"""Settings for the probes of a world: batch and learning rate of the quickstart's own heads."""


def probe_world(model: Path, world: Path, bases: Path, judged: int, length: str, out: Path) -> list[Finding]:
    """Probes every layer of a model for depth and classes: trained on a world's scenes, scored on held-out ones.

    Args:
        length: an override that sets the length of the training, such as ``optimization.epochs=2``.
        out: the probes' folder; finished results there are read.
    """
    if not (out / SCORES).exists():
        rows = rows_file(out)
        write_rows(world / "images", rows, world / "pretrain.json")
        targets = teacher_targets_of(load_run("quickstart/pt"), PROBED, "quickstart/pt")
        targets = {t: own.model_copy(update={"model": str(bases / f"teacher_{t}")}) for t, own in targets.items()}
        run = probe_run(model, out, targets, rows, world / "images", (*TRAINING, length))
        if not is_finished(run):
            run_stage(run, resume=True, followed=True)
        save_findings(score_on(load_pre_trained(out), str(world), world, judged), out / SCORES)
    return read_findings(out)


def require_scorable(run: Run, what: str, root: Path) -> None:
    """Checks that ``score_on`` can score on ``what``, before the probes of ``run`` are trained.

    Raises:
        ConfigError: ``what`` is neither a set nor a folder, or the set is not usable (see ``require_set``).
    """
    if what in SETS:
        require_set(run, what, root)
    elif not Path(what).is_dir():
        raise ConfigError(f"--score {what}: expected {', '.join(SETS)} or a folder of images")


def require_apart(rows: Path, images: Path, what: str, root: Path, limit: int | None = None) -> None:
    """Checks that no image that ``score_on`` scores is trained on, under this or another name.

    Scenes of a quickstart's world are in one file, apart from those that it trains on; they are not compared.

    Args:
        what, root, limit: what is scored, as for ``score_on``.

    Raises:
        ConfigError: some are; the message counts them and names one.
    """
    if what in FILES:
        files = FILES[what](root, limit)
    elif (Path(what) / "held_out.npz").is_file():
        return
    else:
        files = spread(images_below(Path(what)), limit)
    shared = shared_images(file_images(files), open_records([(rows, images)], DropList()))
    if shared:
        name, same = next(iter(shared.values()))
        raise ConfigError(
            f"--score {what}: the heads are trained on {len(shared)} of its {len(files)} images, such as '{name}' "
            f"('{same}'): give another folder to --score, or --images or --rows without these images"
        )


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
        scored = world_findings(found, folder, limit or JUDGED)
    else:
        scored = cosine_findings(found, spread(images_below(folder), limit))
    return [replace(one, of=str(folder.resolve())) for one in scored]


def world_findings(found: PreTrained, world: Path, judged: int) -> list[Finding]:
    """Depth error and pixel accuracy against the exact maps of held-out scenes, and centered cosines.

    Args:
        judged: maximum number of judged scenes; see ``HeldOut.halves``.
    """
    fit, rest = HeldOut.halves(world, judged)
    teachers = drawing_teachers(found.run)
    predicted = predict_images(found.model, rest.images, PROMPT)
    scored = findings(predicted, sources_of(found.run, None, teachers), teachers, fit, rest)
    return [replace(one, images=len(rest.images)) for one in scored]
