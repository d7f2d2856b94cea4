"""Measures of a layer's predictions, each value with its controls.

There are measures for three sets: any folder of images (cosines with the teacher's targets), DA-2K (which of two points
is closer) and COCO's panoptic maps (classes of the pixels). FID of drawings is left out: it needs the weights of an
image generator, and is biased for few images.

Shape suffixes: S = images, N = teacher tokens, E = teacher width, H, W = pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visper.common.console import track
from visper.common.errors import ConfigError, DataError, counted
from visper.common.files import read_json_object
from visper.config import Geometry, Run
from visper.data.images import arrange, background_of, open_image
from visper.data.sampler import spread
from visper.data.vlm import seen_geometry
from visper.distillation import Teacher
from visper.distillation.teachers.depth_anything import DepthAnythingTeacher
from visper.distillation.teachers.oneformer import OneFormerTeacher
from visper.evaluation.intervals import grouped, wilson_grouped
from visper.evaluation.predictions import PreTrained, layer_of, predict_images, task_of, teacher_targets
from visper.evaluation.visualize import PROMPT

BATCH = 16
TEACHER, OTHER, MEAN = "teacher", "other image's prediction", "mean target"
OTHER_TARGET = "another scene's target"
TIES_WRONG = "ties to the second point"
MEAN_OF = 512
"""Number of images for the mean target whose map is scored as a control."""
DA2K, COCO = "da-2k", "coco-panoptic-val2017"
NEEDS = {
    DA2K: ("depth_anything", ("eval/DA-2K/annotations.json",)),
    COCO: ("oneformer", ("coco/annotations/panoptic_val2017.json", "coco/panoptic_val2017", "coco/val2017")),
}
"""Data set -> the kind of teacher that decodes predictions into its maps, and the set's files below the root."""


@dataclass(frozen=True)
class Finding:
    """One measure of one layer, with the values of its controls.

    Attributes:
        name: "task/layer".
        higher: whether higher is better.
        interval: 95 % interval of the value, over images.
        of: path of the scored folder; None for a set that ``measure`` names.
        images: number of scored images; 0: not recorded.
    """

    name: str
    measure: str
    value: float
    controls: dict[str, float]
    higher: bool = True
    interval: tuple[float, float] | None = None
    of: str | None = None
    images: int = 0

    @property
    def task(self) -> str:
        """The task of ``name``."""
        return task_of(self.name)

    @property
    def kind(self) -> tuple[str, str, str | None, int]:
        """What findings of several layers share, if they can be compared."""
        return self.task, self.measure, self.of, self.images

    @property
    def layer(self) -> int:
        """The layer of ``name``."""
        return layer_of(self.name)

    @property
    def controls_text(self) -> str:
        """The controls, as the tables show them."""
        return ", ".join(f"{name} {value:.3f}" for name, value in self.controls.items())

    @property
    def beats_controls(self) -> bool:
        """Whether the value is better than every control but two: the teacher, an upper bound, and its own value with
        ties counted as wrong, which is equal where there are no ties.
        """
        others = [value for name, value in self.controls.items() if name not in (TEACHER, TIES_WRONG)]
        return all(self.value > other if self.higher else self.value < other for other in others)


def centered_cosine(predicted_SNE: Tensor, target_SNE: Tensor, mean_NE: Tensor) -> Tensor:
    """``[S]``: cosine of prediction and target, each minus the mean target, to leave out what all images share."""
    return F.cosine_similarity((predicted_SNE - mean_NE).flatten(1), (target_SNE - mean_NE).flatten(1))


def cosine_findings(found: PreTrained, files: Sequence[Path]) -> list[Finding]:
    """Cosines with the teachers' targets over images that the probes were not trained on.

    Raises:
        DataError: fewer than two images.
    """
    if len(files) < 2:
        raise DataError("no images", f"{counted(len(files), 'image')} to score on: give at least two, for the control")
    means = _mean_targets(found, files)
    columns: dict[str, tuple[list[Tensor], ...]] = {}
    for _, predicted, targets in _batches(found, files, "cosines"):
        for name, values in predicted.items():
            target, mean = targets[task_of(name)], means[task_of(name)]
            rows = (
                centered_cosine(values, target, mean),
                centered_cosine(values.roll(1, 0), target, mean) if len(values) > 1 else torch.empty(0),
                F.cosine_similarity(values.flatten(1), target.flatten(1)),
                F.cosine_similarity(mean.flatten()[None], target.flatten(1)),
            )
            for column, row in zip(columns.setdefault(name, ([], [], [], [])), rows, strict=True):
                column.append(row)
    result = []
    for name, parts in columns.items():
        own, other, raw, constant = (grouped([[value] for value in torch.cat(part).tolist()]) for part in parts)
        result.append(Finding(name, "centered cosine", own[0], {OTHER: other[0]}, interval=own[1], images=len(files)))
        result.append(Finding(name, "cosine", raw[0], {MEAN: constant[0]}, interval=raw[1], images=len(files)))
    return result


def _mean_targets(found: PreTrained, files: Sequence[Path]) -> dict[str, Tensor]:
    """Task -> mean target ``[N, E]``, the best that a prediction can be without looking at the image."""
    sums: dict[str, Tensor] = {}
    for _, _, targets in _batches(found, files, "mean targets", predict=False):
        for task, target in targets.items():
            sums[task] = sums.get(task, torch.zeros(())) + target.double().sum(0)
    return {task: (total / len(files)).float() for task, total in sums.items()}


def require_set(run: Run, name: str, root: Path) -> None:
    """Checks that a probe's run can be scored on a set of ``NEEDS``; needs no trained heads.

    Raises:
        ConfigError: the set is not under ``root``, no task has its kind of teacher, or images are cropped or padded.
    """
    kind, places = NEEDS[name]
    for place in places:
        if not (root / place).exists():
            raise ConfigError(f"no '{root / place}': `visper data prepare {name} --root {root}` downloads it")
    kinds = {task: own.target.kind for task, own in run.distillation.tasks.items()} if run.distillation else {}
    if kind not in kinds.values():
        raise ConfigError(f"{name} needs a teacher of kind '{kind}', but the probe's tasks have {kinds}")
    if run.data.geometry is not Geometry.SQUASH:
        raise ConfigError(
            f"{name} compares positions in the image, which needs geometry squash, but this model sees images with "
            f"'{run.data.geometry}': score it on a folder of images"
        )


def da2k_files(root: Path, limit: int | None = None) -> list[Path]:
    """The images of DA-2K, at most ``limit``, evenly spaced: sorted by name, they are sorted by kind of scene."""
    folder = root / "eval" / "DA-2K"
    marks = read_json_object(folder / "annotations.json")
    return [folder / name for name in spread(sorted(marks), limit)]


def coco_files(root: Path, limit: int | None = None) -> list[Path]:
    """The images of COCO val2017 that have a panoptic map, at most ``limit``, evenly spaced."""
    table = read_json_object(root / "coco" / "annotations" / "panoptic_val2017.json")
    stems = sorted(Path(one["file_name"]).stem for one in table["annotations"])
    return [root / "coco" / "val2017" / f"{stem}.jpg" for stem in spread(stems, limit)]


@dataclass(frozen=True)
class Pair:
    """Two points, (y, x) in pixels of the upright image, and whether the first is the closer one."""

    first: Sequence[float]
    second: Sequence[float]
    first_closer: bool


def da2k_findings(found: PreTrained, root: Path, limit: int | None = None) -> list[Finding]:
    """DA-2K: share of pairs that the decoded depth puts in the right order; ties go to the first point.

    The first is the closer one in all published pairs, so a flat map is right everywhere; the control with ties to the
    second point shows how much of a score comes from ties.

    Raises:
        ConfigError: see ``require_set``.
    """
    folder = root / "eval" / "DA-2K"
    require_set(found.run, DA2K, root)
    marks = read_json_object(folder / "annotations.json")
    files = da2k_files(root, limit)
    pairs = {file: _pairs(marks[file.relative_to(folder).as_posix()]) for file in files}

    def score(teacher: Teacher, values: Tensor, seen: Image.Image, file: Path) -> dict[str, list[float]]:
        depth = teacher.decode(values)[0, 0]
        ahead = [float(_at(depth, pair.first, seen) - _at(depth, pair.second, seen)) for pair in pairs[file]]
        closer = [pair.first_closer for pair in pairs[file]]
        rules = {"": [by >= 0 for by in ahead], TIES_WRONG: [by > 0 for by in ahead]}
        return {rule: [float(a == b) for a, b in zip(said, closer, strict=True)] for rule, said in rules.items()}

    # Wilson's, because a t-interval would have no width where all pairs are right.
    return _decoded(found, files, "DA-2K", score, DepthAnythingTeacher, wilson_grouped)


def coco_findings(found: PreTrained, root: Path, limit: int | None = None) -> list[Finding]:
    """COCO val2017: mean over images of the mean IoU over the classes in an image's map; unlabeled pixels left out.

    The prediction replaces OneFormer's last feature map. Its finer maps come from the image itself, so that even
    another image's prediction has a score: compare with that control.

    Raises:
        ConfigError: see ``require_set``.
    """
    folder = root / "coco"
    require_set(found.run, COCO, root)
    table = read_json_object(folder / "annotations" / "panoptic_val2017.json")
    numbers = {category["id"]: number for number, category in enumerate(table["categories"])}
    marks = {Path(one["file_name"]).stem: one for one in table["annotations"]}
    files = coco_files(root, limit)

    def score(teacher: Teacher, values: Tensor, seen: Image.Image, file: Path) -> dict[str, list[float]]:
        assert isinstance(teacher, OneFormerTeacher)
        (drawn,) = teacher.segment(values, teacher.see([seen]), "semantic")
        mark = marks[file.stem]
        labels = {one["id"]: numbers[one["category_id"]] for one in mark["segments_info"]}
        exact = _class_map(folder / "panoptic_val2017" / mark["file_name"], labels, drawn.segments.shape)
        return {"": [mean_iou(drawn.segments.cpu() - 1, exact)]}

    return _decoded(found, files, "mIoU", score, OneFormerTeacher)


def mean_iou(predicted_HW: Tensor, exact_HW: Tensor, ignored: int = 255) -> float:
    """Intersection over union, averaged over the classes in the exact map; ``ignored`` pixels do not count."""
    known = exact_HW != ignored
    ours, theirs = predicted_HW[known], exact_HW[known]
    shares = []
    for number in theirs.unique().tolist():
        union = ((ours == number) | (theirs == number)).sum()
        shares.append(float(((ours == number) & (theirs == number)).sum() / union))
    return sum(shares) / len(shares) if shares else 0.0


Score = Callable[[Teacher, Tensor, Image.Image, Path], dict[str, list[float]]]
"""Teacher, one image's embedding ``[1, N, E]``, the image as the model sees it, its file -> scores, under "", and by
other rules, each under its name, as controls."""


def _decoded(
    found: PreTrained,
    files: Sequence[Path],
    measure: str,
    score: Score,
    kind: type[Teacher],
    interval_of: Callable[[list[list[float]]], tuple[float, float] | None] = lambda images: grouped(images)[1],
) -> list[Finding]:
    """Mean scores of layers, for tasks with this kind of teacher; controls: its own, its mean, another image's."""
    tasks = [task for task, teacher in found.teachers.items() if isinstance(teacher, kind)]
    means = _mean_targets(found, spread(files, MEAN_OF))
    scores: dict[str, list[list[float]]] = {}

    def add(name: str, values: Tensor, seen: Image.Image, file: Path) -> None:
        for rule, values_of in score(found.teachers[task_of(name)], values, seen, file).items():
            scores.setdefault(f"{name}/{rule}" if rule else name, []).append(values_of)

    last: dict[str, Tensor] = {}
    for batch, predicted, targets in _batches(found, files, measure):
        for at, (file, seen) in enumerate(batch):
            own = {name: values[at : at + 1] for name, values in predicted.items() if task_of(name) in tasks}
            for task in tasks:
                add(f"{task}/{TEACHER}", targets[task][at : at + 1], seen, file)
                add(f"{task}/{MEAN}", means[task][None], seen, file)
            for name, values in own.items():
                add(name, values, seen, file)
                if name in last:
                    add(f"{name}/{OTHER}", last[name], seen, file)
            last = own
    result = []
    for name in last:
        value, interval = grouped(scores[name])[0], interval_of(scores[name])
        task = task_of(name)
        places = {rule: f"{name}/{rule}" for rule in (TIES_WRONG, OTHER)}
        places |= {control: f"{task}/{control}" for control in (MEAN, TEACHER)}
        controls = {control: grouped(scores[place])[0] for control, place in places.items() if place in scores}
        result.append(Finding(name, measure, value, controls, interval=interval, images=len(files)))
    return result


Shown = list[tuple[Path, Image.Image]]


def _batches(
    found: PreTrained, files: Sequence[Path], what: str, predict: bool = True
) -> Iterator[tuple[Shown, dict[str, Tensor], dict[str, Tensor]]]:
    """Batches: files with the images as the model sees them, predictions by layer, targets by task."""
    processor = found.model.processor
    geometry, background = seen_geometry(processor), background_of(processor.image_processor)
    starts: Iterable[int] = track(range(0, len(files), BATCH), what)
    for start in starts:
        chosen = files[start : start + BATCH]
        images = [open_image(file) for file in chosen]
        seen = [arrange(image, geometry, background) for image in images]
        predicted = predict_images(found.model, images, PROMPT) if predict else {}
        targets = {task: teacher_targets(teacher, seen) for task, teacher in found.teachers.items()}
        yield list(zip(chosen, seen, strict=True)), predicted, targets


def _pairs(marks: Sequence[Mapping[str, Any]]) -> list[Pair]:
    return [Pair(m["point1"], m["point2"], m["closer_point"] == "point1") for m in marks]


def _at(values_HW: Tensor, point: Sequence[float], image: Image.Image) -> Tensor:
    """The value at a point (y, x) of ``image``, which the values cover."""
    y, x = (
        min(int(place / pixels * cells), cells - 1)
        for place, pixels, cells in zip(point, (image.height, image.width), values_HW.shape, strict=True)
    )
    return values_HW[y, x]


def _class_map(file: Path, labels: Mapping[int, int], size: Sequence[int]) -> Tensor:
    """``[H, W]`` class of each pixel of COCO's id map (R + 256 G + 65536 B), 255 where there is none."""
    with Image.open(file) as image:
        rgb = np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.NEAREST), dtype=np.int64)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    classes = np.full(ids.shape, 255, dtype=np.int64)
    for segment, number in labels.items():
        classes[ids == segment] = number
    return torch.from_numpy(classes)
