"""Conversations become input ids and labels, by the chat template that is saved with the processor.

Labels come from the character spans of one tokenization of the whole conversation. Re-tokenizing prefixes, the usual
way, drifts by a token wherever a merge crosses a turn's border, and silently supervises the wrong tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from tokenizers.models import Unigram

from visper.common.errors import DataError
from visper.data.chat_template import (
    SENTINEL,
    SENTINELS,
    find_end_of_turn,
    lacks_first_token,
    special_pattern,
)
from visper.data.images import output_size
from visper.data.rows.records import Record

IGNORED = -100
_IMAGE, _TEXT = "i", "t"


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. ``labels`` repeat ``input_ids`` where supervised, else -100.

    ``image_tokens`` counts the image tokens of each image. Of the supervised tokens, ``num_text`` are text (not the
    ends of turns), and ``num_unknown`` of these the unknown token. Both are 0 for a tokenizer that knows every text.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    image_tokens: tuple[int, ...] = ()
    num_text: int = 0
    num_unknown: int = 0


@dataclass(frozen=True)
class _Skeleton:
    """The template rendered for conversations of one form, cut at the places where the texts go."""

    literals: list[str]
    answer_ends: dict[int, int]  # index of a text -> characters of the next literal up to the end of the turn's token


class ConversationEncoder:
    """Turns records into tokens with a LLaVA processor.

    Args:
        processor: a ``LlavaProcessor`` whose chat template shows images (see ``student_template``).
        max_tokens: longest row; only text is cut, from the end, never an image and its task tokens.
    """

    def __init__(self, processor: Any, max_tokens: int = sys.maxsize) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_tokens = max_tokens
        self._special = special_pattern(self.tokenizer)
        self._unknown_id = _unknown_id(self.tokenizer)
        self._special_ids = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.image_token_id, self.num_image_tokens = self._read_image_tokens()
        self._behind_image = self._special_ids - {self.image_token_id}
        self._skeletons: dict[tuple[tuple[tuple[str, str], ...], bool], _Skeleton] = {}

    @property
    def image_text(self) -> str:
        """What stands for an image in the text that is tokenized, where that is not the image token alone."""
        return ""

    def _read_image_tokens(self) -> tuple[int, int]:
        """The id of the image token, and how many of it an image has."""
        return int(self.processor.image_token_id), _num_image_tokens(self.processor)

    def encode(self, record: Record, sizes: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """The record's ids and labels, the images expanded.

        Args:
            sizes: width and height of its images, for students that see images in their own resolution.

        Raises:
            DataError: the template refuses the conversation, the images alone are too long, or nothing is left to
                learn.
        """
        ids, labels, blocks = self._tokens(record, False, sizes)
        image_tokens = tuple(ids[start:end].count(self.image_token_id) for start, end in blocks)
        truncated = len(ids) > self.max_tokens
        if truncated:
            ids, labels = _truncate(ids, labels, blocks, self.max_tokens)
        if labels.count(IGNORED) == len(labels):
            why = f"none within {self.max_tokens} tokens" if truncated else "every answer is empty"
            raise DataError("no supervised token", why)
        return Encoded(ids, labels, truncated, image_tokens, *self._count_unknown(labels))

    def _count_unknown(self, labels: list[int]) -> tuple[int, int]:
        if self._unknown_id is None:
            return 0, 0
        unknown = labels.count(self._unknown_id)
        not_text = self._special_ids - {self._unknown_id} | {IGNORED}
        return len(labels) - sum(map(not_text.__contains__, labels)), unknown

    def unknown_words(self, record: Record) -> list[str]:
        """The words of the record's answers that hold an unknown token, in order; also those behind ``max_tokens``.

        Raises:
            DataError: the template refuses the conversation.
        """
        text, answers, cuts = self._fill(record, asks=False)
        ids, offsets = self._tokenize(text, cuts)
        labels = supervise(ids, offsets, answers)
        spans = [span for label, span in zip(labels, offsets, strict=True) if label == self._unknown_id]
        return [_word_around(text, *span) for span in spans]

    def prompt(self, record: Record, sizes: Sequence[tuple[int, int]] | None = None) -> list[int]:
        """The ids of a conversation up to where its next answer begins, the images expanded; never cut.

        They are the ids of training: a text that spells the image token or a control token out stays text, which it
        would not in a prompt rendered by the processor.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._tokens(record, True, sizes)[0]

    def _tokens(
        self, record: Record, asks: bool, sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Ids, labels and each image's block ``[start, end)``; with ``asks`` the header of an answer comes behind."""
        text, answers, cuts = self._fill(record, asks)
        ids, offsets = self._tokenize(text, cuts)
        labels = supervise(ids, offsets, answers)
        found, expected = ids.count(self.image_token_id), len(record.images)
        if found != expected:
            raise DataError("image tokens", f"the chat template shows {found} images: expected {expected}")
        return self._expand_images(ids, labels)

    def _render(self, turns: tuple[tuple[str, str], ...], asks: bool) -> _Skeleton:
        """The template's text around the texts of turns, each given by its role and form (see ``_texts``)."""
        messages: list[dict[str, Any]] = []
        speakers: list[str] = []
        for role, form in turns:
            content = []
            for part in form:
                if part == _IMAGE:
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": SENTINEL.format(len(speakers))})
                    speakers.append(role)
            messages.append({"role": role, "content": content})
        try:
            rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except TemplateError as error:
            roles = ", ".join(role for role, _ in turns[:6])
            raise DataError("chat template refuses the turns", f"{roles}: {error}") from error
        pieces = SENTINELS.split(rendered)
        found = [int(i) for i in pieces[1::2]]
        if found != list(range(len(speakers))):
            raise DataError("chat template leaves texts out", f"{len(speakers)} were given, {found} came back")
        literals = pieces[0::2]
        ends = {
            place: find_end_of_turn(literals[place + 1], self._special).end()
            for place, role in enumerate(speakers)
            if role == "assistant"
        }
        return _Skeleton(literals, ends)

    def _fill(
        self, record: Record, asks: bool, blocks: Sequence[str] = ()
    ) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The whole text, the spans to supervise, and where to cut so that no text spells a control token.

        ``blocks`` take the places of the template's image tokens, if given.
        """
        texts, turns = _texts(record)
        if (turns, asks) not in self._skeletons:
            self._skeletons[turns, asks] = self._render(turns, asks)
        skeleton = self._skeletons[turns, asks]
        literals = _with_blocks(skeleton.literals, self.processor.image_token, blocks) if blocks else skeleton.literals
        parts = [literals[0]]
        at = len(literals[0])
        answers, cuts = [], []
        for place, text in enumerate(texts):
            literal = literals[place + 1]
            # Cut behind the first character of each control token spelt out in a text, overlapping ones too.
            found = self._special.search(text)
            while found is not None:
                cuts.append(at + found.start() + 1)
                found = self._special.search(text, found.start() + 1)
            if place in skeleton.answer_ends and text.strip():
                answers.append((at, at + len(text) + skeleton.answer_ends[place]))
            parts += [text, literal]
            at += len(text) + len(literal)
        return "".join(parts), answers, cuts

    def _tokenize(self, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans ``(start, end)`` in ``text``."""
        ids, offsets = self._piece(text[: cuts[0]] if cuts else text, lacks_first_token(self.tokenizer, text))
        for start, end in pairwise([*cuts, len(text)]):
            # Behind a newline, or SentencePiece would put a space before the piece; then without it.
            more, spans = self._piece("\n" + text[start:end], False)
            own = [i for i, (first, last) in enumerate(spans) if last > max(first, 1)]
            ids += [more[i] for i in own]
            offsets += [(max(spans[i][0] - 1, 0) + start, spans[i][1] - 1 + start) for i in own]
        return ids, offsets

    def _piece(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        out = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return list(out["input_ids"]), list(out["offset_mapping"])

    def _expand_images(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Repeats each image's token, and gives its block ``[start, end)``: the image and the special tokens behind."""
        blocks: list[tuple[int, int]] = []
        for _ in range(ids.count(self.image_token_id)):
            at = ids.index(self.image_token_id, blocks[-1][1] if blocks else 0)
            behind = at + 1
            while behind < len(ids) and ids[behind] in self._behind_image and labels[behind] == IGNORED:
                behind += 1
            more = self.num_image_tokens - 1
            ids = [*ids[:at], *[self.image_token_id] * more, *ids[at:]]
            labels = [*labels[:at], *[IGNORED] * more, *labels[at:]]
            blocks.append((at, behind + more))
        return ids, labels, blocks


def _with_blocks(literals: list[str], image_token: str, blocks: Sequence[str]) -> list[str]:
    """The template's literals with an image's text in the place of each image token, in order."""
    pieces = [literal.split(image_token) for literal in literals]
    shown = sum(len(parts) - 1 for parts in pieces)
    if shown != len(blocks):
        raise DataError("image tokens", f"the chat template shows {shown} images: expected {len(blocks)}")
    texts = iter(blocks)
    return [parts[0] + "".join(next(texts) + part for part in parts[1:]) for parts in pieces]


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that the tokenizer's model gives what it does not know; None where it knows every text.

    Not ``tokenizer.unk_token_id``: byte-level tokenizers give that name to their end-of-text token.
    """
    model = tokenizer.backend_tokenizer.model
    token = getattr(model, "unk_token", None if not isinstance(model, Unigram) else tokenizer.unk_token)
    return None if token is None else model.token_to_id(token)


def _word_around(text: str, start: int, end: int) -> str:
    """``text[start:end]`` with the letters and digits on both sides of it."""
    start = end - len(text[start:end].lstrip())  # SentencePiece counts the space before a word as its own
    before = re.search(r"\w*$", text[:start])
    behind = re.match(r"\w*", text[end:])
    assert before is not None and behind is not None
    return before.group() + text[start:end] + behind.group()


def _num_image_tokens(processor: Any) -> int:
    """Tokens the processor puts in place of one image (the count of ``LlavaProcessor``)."""
    side = output_size(processor.image_processor) // int(processor.patch_size)
    dropped = processor.vision_feature_select_strategy == "default"
    return side * side + int(processor.num_additional_image_tokens) - int(dropped)


def supervise(ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> list[int]:
    """Labels: the tokens that begin inside an answer's span. One that begins in the header belongs to the header."""
    labels = [IGNORED] * len(ids)
    token = 0
    for start, end in answers:
        while token < len(ids) and offsets[token][0] < start:
            token += 1
        while token < len(ids) and offsets[token][0] < end:
            labels[token] = ids[token] if offsets[token][1] > offsets[token][0] else IGNORED
            token += 1
    return labels


def _truncate(
    ids: list[int], labels: list[int], blocks: list[tuple[int, int]], max_tokens: int
) -> tuple[list[int], list[int]]:
    """Cuts text from the end, and keeps the images' blocks ``[start, end)`` whole, also those behind the cut."""
    in_blocks = sum(end - start for start, end in blocks)
    room = max_tokens - in_blocks
    if room < 0:
        raise DataError(
            "images longer than a row", f"the {in_blocks} tokens of {len(blocks)} exceed max_tokens = {max_tokens}"
        )
    kept: list[int] = []
    behind = 0
    for start, end in [*blocks, (len(ids), len(ids))]:
        text = range(behind, min(start, behind + room))
        kept += [*text, *range(start, end)]
        room -= len(text)
        behind = end
    return [ids[i] for i in kept], [labels[i] for i in kept]


def _texts(record: Record) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """The texts of a conversation, cut where images stand, and each turn's role and form.

    A form has a letter for each text and image of a turn, in order. Beside images, empty texts are left out.
    """
    texts: list[str] = []
    turns = []
    images = iter(record.images)
    image = next(images, None)
    for number, turn in enumerate(record.turns):
        form, at = "", 0
        while image is not None and image.turn == number:
            if image.at > at:
                texts.append(turn.text[at : image.at])
                form, at = form + _TEXT, image.at
            form += _IMAGE
            image = next(images, None)
        if at < len(turn.text) or not form:
            texts.append(turn.text[at:])
            form += _TEXT
        turns.append((turn.role, form))
    return texts, tuple(turns)
