"""Parses rows into records. A row has one of four formats:

    LLaVA     {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}
    messages  {"images": ["a.jpg"], "messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}
    pairs     {"images": ["a.jpg"], "texts": [{"user": "What?", "assistant": "..."}]}   (The Cauldron, FineVision)
    caption   {"image": "a.jpg", "text": "A cat on a mat."}

Each may have ``image`` or ``images``, with a path or a list of paths, and ``system``, the system turn of a conversation
without one (as in LLaMA-Factory's files). The content of a message is a text or a list of parts. A tag or an image part
marks the place of an image. Published files contain repeated ids, strings and integers, conversations that begin with
the model, text rows that mention the tag, and rows with one image but no tag. A row that cannot be trained on as it was
meant raises a ``DataError``, counted by its reason.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from visper.common.errors import DataError, kind_of
from visper.common.files import OUTSIDE
from visper.config.data import RowField
from visper.data.rows.json_rows import read_rows
from visper.data.rows.records import Record, ShownImage, Turn

IMAGE_TAG = "<image>"
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
FIELDS = get_args(RowField)
"""The keys of a row that are read, under these names or mapped by a source's ``columns``."""
MEDIA_KEYS = ("video", "videos", "audio", "audios")
OBJECTS = "objects"
"""The key of ms-swift's rows for the values of their placeholders."""
TURN_WEIGHTS = ("weight", "loss", "train", "training")
"""Keys with which other libraries mark turns that are not trained (OpenAI, ms-swift, axolotl)."""
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".jp2", ".avif"),
)
CAPTION_QUESTION = "Describe the image concisely."
"""The user's turn for a caption row."""
Part = tuple[int, Any]
"""An image part: number of characters of the turn's text before it, and the image that it names, if any."""
_MEDIA_TAG = "(?:<image>|<video>|<audio>)"
_SHOWS_MEDIA = re.compile(rf"\s*{_MEDIA_TAG}|.*{_MEDIA_TAG}\s*\Z", re.DOTALL)
_IMAGE_IN_TEXT = re.compile(rf"<img>[^<>\n]+(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})</img>", re.IGNORECASE)
_PLACEHOLDER = re.compile("<bbox>|<ref-object>")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_SWAPPED = "; if user and model are swapped, exchange 'human' and 'gpt' ('user' and 'assistant')"
_LONGEST_NAME = 255  # bytes, on every usual file system


class Embedded(str):
    """The name of an image whose bytes the data set contains. No file is opened by it, so it may be any text."""


class NotEmbedded(str):
    """The path of an image that a data set names but does not contain."""


@dataclass(frozen=True)
class Parsed:
    """A row's conversation and its images, with paths as in the row."""

    turns: tuple[Turn, ...]
    images: tuple[ShownImage, ...]
    image_tags: int  # number of tags and image parts in the user's turns


def parse_row(row: Any, sample_id: str, images: Path) -> Record:
    """Parses a row into a record whose images are in the folder ``images``.

    Raises:
        DataError: the row is not a conversation of alternating turns, its numbers of images and tags differ, or it has
            other media than images.
    """
    parsed = parse(row)
    return Record(sample_id, parsed.turns, tuple(replace(one, path=str(images / one.path)) for one in parsed.images))


def parse(row: Any) -> Parsed:
    """Parses a row and removes its tags from the text; see ``parse_row``.

    Raises:
        DataError: see ``parse_row``.
    """
    if not isinstance(row, dict):
        found = f"a text, or a line that is not JSON: {row[:60]!r}" if isinstance(row, str) else kind_of(row)
        raise DataError("not a row", f"expected an object with 'conversations' or 'messages', found {found}")
    for name in MEDIA_KEYS:
        if row.get(name):
            raise DataError("media other than images", f"the row has '{name}': only images are read")
    turns, parts = _conversation(row)
    if row.get(OBJECTS) and any(_PLACEHOLDER.search(turn.text) for turn in turns):
        raise DataError(
            "unfilled placeholder", f"'{OBJECTS}' is not read: write its values in place of <bbox>, <ref-object>"
        )
    listed = [*_listed(row.get("image")), *_listed(row.get("images"))]
    placed = [_place_images(turn, named) for turn, named in zip(turns, parts, strict=True)]
    places = [(i, at, name) for i, (_, own) in enumerate(placed) for at, name in own]
    nameless = sum(name is None for *_, name in places)
    if not listed and nameless == len(places):
        _refuse_unseen_media(turns, sum(map(len, parts)), _remedy(row))
        return Parsed(tuple(turns), (), len(places))
    if len(listed) == 1 and not places:
        _refuse_tags_in_answers(turn.text for turn in turns if turn.role == "assistant")
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        return Parsed(tuple(turns), (ShownImage(_file_name(listed[0]), first),), 0)
    if len(listed) != nameless:
        images = len(listed) + len(places) - nameless
        raise DataError(
            "images and tags differ",
            f"images: {images}, tags '{IMAGE_TAG}' and image parts: {len(places)}; the user's turns need one tag or "
            "part per image, at its place",
        )
    names = iter(listed)
    shown = (ShownImage(_file_name(next(names) if name is None else name), i, at) for i, at, name in places)
    return Parsed(tuple(turn for turn, _ in placed), tuple(shown), len(places))


def _place_images(turn: Turn, parts: list[Part]) -> tuple[Turn, list[Part]]:
    """The turn without its tags, and its images (tags and parts alike) with their places in that text.

    The only image of a turn is moved to its start, wherever the tag was, as in the code of LLaVA and LLaVA-NeXT.
    """
    if turn.role != "user" or not (parts or IMAGE_TAG in turn.text):
        return turn, []
    said = turn.text if parts else turn.text.strip()
    ats = [at for at, _ in parts]
    text, places = "", []
    for part, start, end in zip([None, *parts], [0, *ats], [*ats, len(said)], strict=True):
        if part is not None:
            places.append((len(text), part[1]))
        first, *behind_tags = said[start:end].split(IMAGE_TAG)
        text += first
        for piece in behind_tags:
            places.append((len(text), None))
            text += piece
    if len(places) > 1:
        return Turn("user", text), places
    return Turn("user", text if parts else text.strip()), [(0, places[0][1])]


def _conversation(row: Mapping[str, Any]) -> tuple[list[Turn], list[list[Part]]]:
    """The turns, and the image parts of each turn."""
    said = row.get("conversations")
    if said is None:
        said = row.get("messages")
    if said is None and isinstance(row.get("texts"), list) and all(isinstance(pair, dict) for pair in row["texts"]):
        said = _turns_of_pairs(row)
    if said is None and isinstance(row.get("text"), str):
        if not (row.get("image") or row.get("images")):
            raise DataError("no image", f"the row is a caption ('text') without an image{_remedy(row)}")
        _refuse_tags_in_answers([row["text"]])
        question = [{"type": "image"}, {"type": "text", "text": CAPTION_QUESTION}]
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": row["text"]}]
    if not isinstance(said, list) or not said:
        raise DataError("no conversation", f"expected a list of turns, found {str(said)[:80]!r}")
    read = [read_turn(turn) for turn in said]
    first = read[0][0]
    if first.role == "assistant":
        if (row.get("image") or row.get("images")) and _SHOWS_MEDIA.match(first.text):
            raise DataError("turns swapped", f"the model's first turn shows the image: {first.text[:60]!r}{_SWAPPED}")
        read = read[1:]
    if row.get("system") and not (read and read[0][0].role == "system"):
        read = [read_turn({"role": "system", "content": row["system"]}), *read]
    turns = [turn for turn, _ in read]
    speakers = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(speakers))]
    if not speakers or speakers != expected or any(turn.role == "system" for turn in turns[1:]):
        found = ", ".join(turn.role for turn in turns[:6]) or "no turn by the user"
        swapped = _SWAPPED if speakers[:1] == ["assistant"] else ""
        raise DataError("turns do not alternate", f"expected user, assistant, user, ...; found {found}{swapped}")
    if len(speakers) == 1:
        alone = f"the model's only turn comes first and is left out, as it answers nothing{_SWAPPED}"
        why = alone if first.role == "assistant" else "the conversation has no turn by the model"
        raise DataError("no answer", why)
    return turns, [parts for _, parts in read]


def _turns_of_pairs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions and answers as turns. If they have no tag, all images come before the first question."""
    turns = [{"role": role, "content": pair.get(role)} for pair in row["texts"] for role in ("user", "assistant")]
    questions = [turn["content"] for turn in turns[::2]]
    images = len(_listed(row.get("image"))) + len(_listed(row.get("images")))
    if images > 1 and questions and all(isinstance(said, str) and IMAGE_TAG not in said for said in questions):
        turns[0]["content"] = f"{IMAGE_TAG}\n" * images + questions[0]
    return turns


def read_turn(turn: Any) -> tuple[Turn, list[Part]]:
    """Parses a turn and its image parts.

    Raises:
        DataError: it has no role or text, has other media than images, is marked not to be trained, or contains text
            that cannot be tokenized.
    """
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    content = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if role is None or not isinstance(content, str | list):
        keys = "'from' and 'value', or 'role' and 'content'"
        raise DataError("bad turn", f"expected {keys}, by one of {', '.join(ROLES)}; found {str(turn)[:80]!r}")
    marked = [key for key in TURN_WEIGHTS if role == "assistant" and turn.get(key) not in (None, True)]
    if marked:
        raise DataError(
            "turn with a weight",
            f"'{marked[0]}' is {turn[marked[0]]!r}, but every answer is trained fully: remove the key, or the turn",
        )
    texts: list[str] = []
    images: list[Part] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url") and role == "user":
            images.append((sum(map(len, texts)), _name_in(part)))
        elif kind in ("video", "audio", "video_url", "audio_url", "input_audio"):
            raise DataError("media other than images", f"a part of type '{kind}': only images are read")
        else:
            raise DataError(
                "bad turn", f"expected parts of type 'text' or, by the user, 'image'; found {str(part)[:80]!r}"
            )
    text = "".join(texts)
    if _HALF_PAIR.search(text):
        raise DataError("bad text", "half of a surrogate pair, or bytes that are not UTF-8: it cannot be tokenized")
    return Turn(role, text), images


def _refuse_unseen_media(turns: list[Turn], parts: int, remedy: str) -> None:
    """Refuses an image part, Qwen-VL's ``<img>PATH</img>``, and a tag at the start or end of a turn; elsewhere, a tag
    is just text."""
    if parts:
        raise DataError("media without a file", f"a message has an image part, but the row names no image{remedy}")
    for turn in turns:
        if turn.role == "user" and (_SHOWS_MEDIA.match(turn.text) or _IMAGE_IN_TEXT.search(turn.text)):
            raise DataError("media without a file", f"no 'image' or 'images' for the tag in {turn.text[:60]!r}{remedy}")


def _refuse_tags_in_answers(answers: Iterable[str]) -> None:
    """Refuses a tag at the start or end of an answer of a row whose questions have none."""
    tagged = next(filter(_SHOWS_MEDIA.match, answers), None)
    if tagged is not None:
        raise DataError("tag in an answer", f"{tagged[:60]!r} would be trained as text: only a question shows an image")


def unread_image(row: Mapping[str, Any]) -> str | None:
    """The key of a row that names or holds an image by its value but is not read, if the row has neither ``image`` nor
    ``images``, not even as null: probably a misspelled or unmapped ``image``."""
    if "image" in row or "images" in row:
        return None
    others = (key for key in row if key not in FIELDS and key not in MEDIA_KEYS)
    return next((key for key in others if _looks_like_image(row[key])), None)


def _looks_like_image(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _looks_like_image(value[0])
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), str) or _looks_like_image(value.get("path"))
    return isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES) and "\n" not in value


def _remedy(row: Mapping[str, Any]) -> str:
    key = unread_image(row)
    return "" if key is None else f"; '{key}' looks like one: rename it, or map it with columns: {{image: {key}}}"


def _listed(named: Any) -> list[Any]:
    return [image for image in (named if isinstance(named, list) else [named]) if image not in (None, "", {})]


def _file_name(image: Any) -> str:
    if isinstance(image, Embedded):
        return str(image)
    if isinstance(image, NotEmbedded):
        raise DataError("image not embedded", f"{str(image)!r} is given without its bytes: give 'images', its folder")
    if isinstance(image, dict):
        image = image.get("path") or image.get("url")
    if not isinstance(image, str):
        raise DataError("bad image path", f"expected a path, found {kind_of(image)}")
    if "://" in image or image.startswith("data:"):
        raise DataError("bad image path", f"expected a file, found {image[:80]!r}: save the image as a file first")
    longest = max(len(part.encode("utf-8", "replace")) for part in image.split("/"))
    if _HALF_PAIR.search(image) or "\0" in image or longest > _LONGEST_NAME:
        raise DataError("bad image path", f"{image[:80]!r} cannot be the name of a file")
    if posixpath.isabs(image) or posixpath.normpath(image).split("/")[0] == "..":
        raise DataError(OUTSIDE, f"{image[:200]!r}: paths must be relative to the images folder and stay inside it")
    return image


def image_names(file: Path) -> Iterator[str]:
    """The image paths in a file's rows, unchanged. Bad rows are not reported; ``open_records`` does that.

    Raises:
        DataError: the file is missing or is not a list of rows.
    """
    for row in read_rows(file):
        if isinstance(row, dict):
            named = [*_listed(row.get("image")), *_listed(row.get("images")), *_names_in_parts(row)]
            yield from (name for name in named if isinstance(name, str))


def _names_in_parts(row: Mapping[str, Any]) -> Iterator[Any]:
    said = row.get("conversations") or row.get("messages")
    for turn in said if isinstance(said, list) else []:
        content = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        yield from (_name_in(part) for part in (content if isinstance(content, list) else []) if isinstance(part, dict))


def _name_in(part: Mapping[str, Any]) -> Any:
    """The image that an image part names; None if the part only marks its place."""
    return next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
