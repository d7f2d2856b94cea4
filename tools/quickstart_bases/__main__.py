"""Builds the quickstart's bases: ``python -m tools.quickstart_bases --out DIR``, from the project's root.

They take the place of the published models of a real run: image encoders, an LLM that knows the texts, and three
teachers. Building takes one thread and about two hours with the default minutes. Every part is a ``from_pretrained``
folder in float16, complete or absent; run the command again and finished parts are skipped. ``quality.json`` has the
scores of each part on scenes of a held-out series.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from tools.quickstart_bases.contrastive import train_contrastive
from tools.quickstart_bases.encoder import train_encoder
from tools.quickstart_bases.llm import train_llm
from tools.quickstart_bases.scene_arrays import SceneArrays, draw_scene_arrays
from tools.quickstart_bases.teachers import CONFIGS, train_teacher
from visper.common.files import atomic_path, write_text

TRAIN_SERIES, HELD_OUT_SERIES = 101, 102
"""Scene series for training and measuring the bases; worlds of the quickstart use other seeds."""
MINUTES = {
    "encoder": 21.0,
    "encoder_contrastive": 7.0,
    "llm": 75.0,
    "teacher_depth": 4.0,
    "teacher_seg": 4.0,
    "teacher_gen": 6.0,
}

Trainer = Callable[[SceneArrays, SceneArrays, Path, float], dict[str, float]]
_TRAINERS: dict[str, Trainer] = {
    "encoder": train_encoder,
    "encoder_contrastive": train_contrastive,
    "llm": train_llm,
    **{f"teacher_{task}": partial(train_teacher, task) for task in CONFIGS},
}


def build_bases(
    out: Path, *, scenes: int = 20_000, held_out: int = 1000, minutes: dict[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """Builds the parts that are missing in ``out`` and returns the scores of all parts, ``{part: {measure: value}}``.

    Args:
        out: folder of the bases; the rendered scenes are kept in ``out/.scenes`` while parts are missing.
        scenes: number of training scenes (mirroring doubles them).
        held_out: number of scenes to measure on.
        minutes: CPU minutes of each part's training, instead of ``MINUTES``.
    """
    out.mkdir(parents=True, exist_ok=True)
    spans = {**MINUTES, **(minutes or {})}
    if unknown := set(spans) - set(_TRAINERS):
        raise ValueError(f"unknown parts {sorted(unknown)}: the bases are {', '.join(_TRAINERS)}")
    quality_file = out / "quality.json"
    quality = json.loads(quality_file.read_text()) if quality_file.exists() else {}
    missing = [part for part in _TRAINERS if not (out / part).exists()]
    if missing:
        train = draw_scene_arrays(TRAIN_SERIES, scenes, out / ".scenes" / "train.pickle")
        tests = draw_scene_arrays(HELD_OUT_SERIES, held_out, out / ".scenes" / "held_out.pickle")
        for part in missing:
            with atomic_path(out / part) as beside:
                quality[part] = _TRAINERS[part](train, tests, beside, spans[part])
            write_text(quality_file, json.dumps(quality, indent=1))
        shutil.rmtree(out / ".scenes")
    return dict(quality)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.quickstart_bases", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the bases; finished parts in it are skipped")
    parser.add_argument("--scenes", type=int, default=20_000, help="number of training scenes")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="divide the minutes of all parts by this, for a quick trial"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    minutes = {part: span / options.speed for part, span in MINUTES.items()}
    for part, scores in build_bases(options.out, scenes=options.scenes, minutes=minutes).items():
        print(part, {measure: round(value, 4) for measure, value in scores.items()})


if __name__ == "__main__":
    main()
