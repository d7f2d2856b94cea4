"""``visper data check``: a report on a source of rows and its images, counted per folder.

A row is *unusable* if training would leave it out: it is not a conversation, an image is missing, empty or cannot be
decoded, or none of its tokens would be supervised: every answer is empty or, for the tokenizer of a given run, cut off.
Other findings (a GIF named .jpg, a tag without an image, one empty answer of several, a duplicate) are only counted.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table

from visper.common.cache import key
from visper.common.console import printable
from visper.common.errors import DataError
from visper.common.files import OUTSIDE, atomic_path, write_text
from visper.config.data import MAX_PIXELS
from visper.data.checks.image_files import Verdict, look, look_at_all, look_at_embedded, verdicts_file
from visper.data.checks.moved_images import moved_images
from visper.data.checks.unknown_words import UnknownWords, unknown_words
from visper.data.checks.unread_images import unread_images
from visper.data.normalize import reencode
from visper.data.rows.formats import IMAGE_TAG
from visper.data.rows.records import Drop, DropList, is_supervised, unsupervised
from visper.data.rows.table import ROLE_LETTERS, Part, Records, RecordTable

if TYPE_CHECKING:
    from visper.data.chat import ConversationEncoder

TOTAL = "total"
TEXT_ONLY = "(text only)"
NO_CONVERSATION = "(no conversation)"
EXAMPLES = 5
WIDEST_NAME = len(NO_CONVERSATION)
"""Longer names of sources are continued on the next line of a table's header."""
FINDINGS = (
    "rows",
    "several images",
    "images",
    "images present",
    "missing image",
    "empty image file",
    "not an image",
    "broken image",
    "huge image",
    "huge metadata",
    "format not allowed",
    OUTSIDE,
    "mislabeled image",
    "image without tag",
    "tag without image",
    "unread image",
    "empty answer",
    "no supervised token",
    "text cut",
    "answer tokens",
    "unknown tokens",
    "duplicate",
    "unusable",
)
FETCHED_AGAIN = ("missing image", "empty image file", "not an image", "broken image")
Fetch = Callable[[list[Path]], None]


@dataclass
class Report:
    """The result of ``check``: counts per source, unusable rows, verdicts on images."""

    file: Path
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    drops: DropList = field(default_factory=DropList)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    encoded: bool = False
    unknown: UnknownWords = field(default_factory=UnknownWords)
    warnings: list[str] = field(default_factory=list)

    def note(self, source: str, what: str, sample: str = "", count: int = 1) -> None:
        """Counts a finding in a source; the first few samples are kept as examples."""
        self.counts[source][what] += count
        self.counts[TOTAL][what] += count
        if sample and len(self.examples[what]) < EXAMPLES:
            self.examples[what].append(sample)

    def content(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "file": str(self.file),
            "total": dict(self.counts[TOTAL]),
            "sources": {name: dict(counts) for name, counts in self.counts.items() if name != TOTAL},
            "examples": dict(self.examples),
            "unusable": self.drops.counts(),
            "supervision checked": self.encoded,
            "unknown words": {"share": self.unknown.share, "words": list(self.unknown.words)},
        }

    def tables(self, width: int) -> Iterator[Table]:
        """The counts for a console of ``width`` characters: a line per finding, a column per source, the total first.

        Findings that no source has are left out. Sources that do not fit follow in further tables.
        """
        reasons = [what for what in self.counts[TOTAL] if what not in FINDINGS]
        shown = [
            what
            for what in (*FINDINGS[:-1], *reasons, FINDINGS[-1])
            if self.counts[TOTAL][what] or what in ("rows", "unusable")
        ]
        sources = [TOTAL, *sorted(self.counts.keys() - {TOTAL})]
        while sources:
            table = Table("", title=self.file.name, box=None, pad_edge=False)
            room = width - max(map(cell_len, shown))
            columns = [[f"{self.counts[source][what]:,}" for what in shown] for source in sources]
            for source, numbers in zip(list(sources), columns, strict=True):
                name = printable(source)
                own = max(min(cell_len(name), WIDEST_NAME), *map(len, numbers))
                room -= own + 2  # two spaces between columns
                if room < 0 and len(table.columns) > 1:
                    break
                table.add_column(name, justify="right", width=own, overflow="fold")
                sources.remove(source)
            for line in zip(shown, *columns[: len(table.columns) - 1], strict=True):
                table.add_row(*line)
            yield table


def source_of(image: str | None) -> str:
    """The source of a row: the top folder of its first image; numbered folders (LLaVA-Pretrain's) are one source."""
    if image is None:
        return TEXT_ONLY
    folders = PurePath(image).parts[:-1]
    return "(images)" if not folders or folders[0].isdecimal() else folders[0]


def check(
    place: str | Path,
    part: Part,
    encoder: ConversationEncoder | None = None,
    quiet: bool = False,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Report:
    """Checks every row and every image of one source.

    Args:
        place: where the source is, for the report.
        part: the source, under the name that drop lists use.
        encoder: a run's encoder; None: what is cut off or unknown to a tokenizer is not checked.
        workers: processes; default: one per core.
        max_pixels: a larger image counts as huge.
    """
    name, table, folder = part.name, part.table, part.images
    report = Report(Path(place), encoded=encoder is not None)
    _note_bad_rows(report, table.drops(name))
    names = table.image_names()
    records = Records([part])
    if folder is not None:
        named = {image: str(folder / image) for own in names for image in own}
        kept = verdicts_file(table.path.parent, folder, max_pixels)
        report.verdicts = look_at_all(folder, list(named), kept, quiet, workers, max_pixels)
        _note_images(report, {image: (path, report.verdicts[path]) for image, path in named.items()})
        shown = [[report.verdicts[named[image]] for image in names[row]] for row in records.rows.tolist()]
    else:
        shown = list(look_at_embedded(records, quiet, workers, max_pixels))
        both = zip(records.rows.tolist(), shown, strict=True)
        held = {image: verdict for row, own in both for image, verdict in zip(names[row], own, strict=False)}
        _note_images(report, {image: (image, verdict) for image, verdict in held.items()})
    report.warnings = unread_images(records)
    found = None
    if encoder is not None:
        from visper.data.rows.lengths import measure  # imports torch and transformers, not needed for rows and images

        found = measure(records, encoder, quiet)
        report.unknown = unknown_words(records, found, encoder, None)
        report.warnings += moved_images(records, found, encoder)
    seen: set[str] = set()
    for index, row in enumerate(records.rows.tolist()):
        source, sample_id = source_of(next(iter(names[row]), None)), table.sample_id(row, name)
        report.note(source, "rows")
        for what in _oddities(table, row, names[row], seen):
            report.note(source, what, sample_id)
        if found is not None and found.truncated[index]:
            report.note(source, "text cut")
        if found is not None and found.num_text[index]:
            report.note(source, "answer tokens", count=int(found.num_text[index]))
            report.note(source, "unknown tokens", count=int(found.num_unknown[index]))
        problem = unsupervised(_answers(table, row)) if found is None else found.problems.get(index)
        faults = _faults(problem, shown[index])
        for reason, detail in faults.items():
            report.note(source, reason, sample_id)
            report.drops.add(sample_id, reason, detail)
        if sample_id in report.drops:
            report.note(source, "unusable")
    return report


def _note_bad_rows(report: Report, drops: Iterable[Drop]) -> None:
    for drop in drops:
        report.drops.add(drop.sample_id, drop.reason, drop.detail)
        report.note(NO_CONVERSATION, "rows")
        report.note(NO_CONVERSATION, drop.reason, drop.sample_id)
        report.note(NO_CONVERSATION, "unusable")


def _note_images(report: Report, found: Mapping[str, tuple[str, Verdict]]) -> None:
    """Counts images, given by their name: where each is, and its verdict."""
    for image, (path, verdict) in found.items():
        report.note(source_of(image), "images")
        if verdict.reason != "missing image":
            report.note(source_of(image), "images present")
        if verdict.mislabeled(path):
            report.note(source_of(image), "mislabeled image", f"{path}: {verdict.format}")


def _oddities(table: RecordTable, row: int, images: Sequence[str], seen: set[str]) -> Iterator[str]:
    """Findings about a row that are no reason to leave it out."""
    roles, texts = table.value("roles", row), table.value("texts", row)
    if len(images) > 1:
        yield "several images"
    if images and not table.value("image_tags", row):
        yield "image without tag"
    if not images and any(IMAGE_TAG in text for role, text in zip(roles, texts, strict=True) if role == "u"):
        yield "tag without image"
    if table.value("unread_image", row) is not None:
        yield "unread image"
    if not all(map(is_supervised, _answers(table, row))):
        yield "empty answer"
    content = key(str(table.images(row)), roles, *texts)
    if content in seen:
        yield "duplicate"
    seen.add(content)


def _answers(table: RecordTable, row: int) -> list[str]:
    turns = zip(table.value("roles", row), table.value("texts", row), strict=True)
    return [text for role, text in turns if role == ROLE_LETTERS["assistant"]]


def _faults(problem: tuple[str, str] | None, verdicts: Sequence[Verdict]) -> dict[str, str]:
    """The reasons for which training would leave a row out: reason -> detail."""
    faults = dict([] if problem is None else [problem])
    for verdict in verdicts:
        if verdict.reason is not None:
            faults.setdefault(verdict.reason, verdict.detail)
    return faults


def repair(reports: Sequence[Report], fetch: Fetch | None = None) -> tuple[int, list[Drop]]:
    """Re-encodes images whose format does not match their name, and fetches missing and broken ones again.

    Args:
        reports: results of ``check``; check again afterwards.
        fetch: replaces files by fresh copies as far as it can. It is called with files of which another copy may be
            valid, not with those outside their folder, too large, or of a format that is not allowed.

    Returns:
        The number of repaired files, and the files that could not be repaired.

    Raises:
        DataError: raised by ``fetch``, after all re-encoding.
    """
    mended, lost = 0, []
    verdicts = {path: verdict for report in reports for path, verdict in report.verdicts.items()}
    for path, verdict in verdicts.items():
        if verdict.mislabeled(path):
            try:
                with atomic_path(Path(path)) as partial:
                    reencode(Path(path), path, partial)
                mended += 1
            except (DataError, OSError) as error:
                lost.append(Drop(path, "cannot be written", str(error)))
    bad = {path: verdict for path, verdict in verdicts.items() if verdict.reason is not None}
    again = [path for path, verdict in bad.items() if verdict.reason in FETCHED_AGAIN]
    if fetch is not None and again:
        fetch([Path(path) for path in again])
        fetched = {path: look(path) for path in again}
        mended += sum(verdict.reason is None for verdict in fetched.values())
        bad = {path: verdict for path, verdict in {**bad, **fetched}.items() if verdict.reason is not None}
    return mended, lost + [Drop(path, str(verdict.reason), verdict.detail) for path, verdict in bad.items()]


def write_report(reports: Sequence[Report], place: Path) -> None:
    """Writes the reports as JSON, one entry per conversation file, atomically."""
    content = {
        "rows": sum(report.counts[TOTAL]["rows"] for report in reports),
        "unusable": sum(len(report.drops) for report in reports),
        "files": [report.content() for report in reports],
    }
    write_text(place, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def summary(report: Report) -> str:
    """One line: the number of rows that training would leave out, and why."""
    counts: Sequence[Any] = [f"{reason} {count}" for reason, count in report.drops.counts().items()]
    rows = report.counts[TOTAL]["rows"]
    return f"{len(report.drops)} of {rows} rows are unusable" + (f": {', '.join(counts)}" if counts else "")
