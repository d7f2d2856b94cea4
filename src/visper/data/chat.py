"""Conversations become input ids and labels, by the chat template that is saved with the processor.

Labels come from the character spans of one tokenization of the whole conversation. Re-tokenizing prefixes, the usual
way, drifts by a token wherever a merge crosses a turn's border, and silently supervises the wrong tokens.
"""

from __future__ import annotations

import re
import sys
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


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. ``labels`` repeat ``input_ids`` where supervised, else -100.

    Of the supervised tokens, ``num_text`` are text (not the ends of turns), and ``num_unknown`` of these the unknown
    token. Both are 0 for a tokenizer that knows every text.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    num_text: int = 0
    num_unknown: int = 0


@dataclass(frozen=True)
class _Skeleton:
    """The template rendered for one sequence of roles, cut at the places where the texts go."""

    literals: list[str]
    turns: list[int]
    answer_ends: dict[int, int]  # index into turns -> characters of the next literal up to the end of the turn's token


class ConversationEncoder:
    """Turns records into tokens with a LLaVA processor.

    Args:
        processor: a ``LlavaProcessor`` whose chat template shows the image (see ``student_template``).
        max_tokens: longest row; only text is cut, from the end, never the image and its task tokens.
    """

    def __init__(self, processor: Any, max_tokens: int = sys.maxsize) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_tokens = max_tokens
        self.image_token_id = int(processor.image_token_id)
        self.num_image_tokens = _num_image_tokens(processor)
        self._special = special_pattern(self.tokenizer)
        self._unknown_id = _unknown_id(self.tokenizer)
        self._special_ids = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._skeletons: dict[tuple[tuple[str, ...], int | None, bool, bool], _Skeleton] = {}

    def encode(self, record: Record) -> Encoded:
        """The record's ids and labels, the image expanded.

        Raises:
            DataError: the template refuses the conversation, the image alone is too long, or nothing is left to learn.
        """
        ids, labels, block = self._tokens(record, asks=False)
        truncated = len(ids) > self.max_tokens
        if truncated:
            ids, labels = _truncate(ids, labels, block, self.max_tokens)
        if all(label == IGNORED for label in labels):
            why = f"none within {self.max_tokens} tokens" if truncated else "every answer is empty"
            raise DataError("no supervised token", why)
        return Encoded(ids, labels, truncated, *self._count_unknown(labels))

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
        text, answers, cuts = self._fill(self._skeleton(record, asks=False), record)
        ids, offsets = self._tokenize(text, cuts)
        labels = _supervise(ids, offsets, answers)
        spans = [span for label, span in zip(labels, offsets, strict=True) if label == self._unknown_id]
        return [_word_around(text, *span) for span in spans]

    def prompt(self, record: Record) -> list[int]:
        """The ids of a conversation up to where its next answer begins, the image expanded; never cut.

        They are the ids of training: a text that spells the image token or a control token out stays text, which it
        would not in a prompt rendered by the processor.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._tokens(record, asks=True)[0]

    def _tokens(self, record: Record, asks: bool) -> tuple[list[int], list[int], tuple[int, int]]:
        """Ids, labels and the image's block ``[start, end)``; with ``asks`` the header of an answer comes behind."""
        text, answers, cuts = self._fill(self._skeleton(record, asks), record)
        ids, offsets = self._tokenize(text, cuts)
        labels = _supervise(ids, offsets, answers)
        expected = int(record.image_turn is not None)
        if ids.count(self.image_token_id) != expected:
            found = ids.count(self.image_token_id)
            raise DataError("image tokens", f"the chat template shows {found} images: expected {expected}")
        return self._expand_image(ids, labels) if expected else (ids, labels, (0, 0))

    def _skeleton(self, record: Record, asks: bool) -> _Skeleton:
        silent_image = record.image_turn is not None and not record.turns[record.image_turn].text
        key = (tuple(turn.role for turn in record.turns), record.image_turn, silent_image, asks)
        if key not in self._skeletons:
            self._skeletons[key] = self._render(*key)
        return self._skeletons[key]

    def _render(self, roles: tuple[str, ...], image_turn: int | None, silent_image: bool, asks: bool) -> _Skeleton:
        messages = []
        expected = []
        for i, role in enumerate(roles):
            content: list[dict[str, str]] = [{"type": "image"}] if i == image_turn else []
            if not (i == image_turn and silent_image):
                content.append({"type": "text", "text": SENTINEL.format(i)})
                expected.append(i)
            messages.append({"role": role, "content": content})
        try:
            rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except TemplateError as error:
            raise DataError("chat template refuses the turns", f"{', '.join(roles[:6])}: {error}") from error
        pieces = SENTINELS.split(rendered)
        turns = [int(i) for i in pieces[1::2]]
        if turns != expected:
            raise DataError("chat template leaves turns out", f"turns {expected} were given, {turns} came back")
        literals = pieces[0::2]
        ends = {
            place: find_end_of_turn(literals[place + 1], self._special).end()
            for place, turn in enumerate(turns)
            if roles[turn] == "assistant"
        }
        return _Skeleton(literals, turns, ends)

    def _fill(self, skeleton: _Skeleton, record: Record) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The whole text, the spans to supervise, and where to cut so that no text spells a control token."""
        parts = [skeleton.literals[0]]
        at = len(skeleton.literals[0])
        answers, cuts = [], []
        for place, turn in enumerate(skeleton.turns):
            text = record.turns[turn].text
            literal = skeleton.literals[place + 1]
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

    def _expand_image(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int], tuple[int, int]]:
        at = ids.index(self.image_token_id)
        behind = at + 1
        while behind < len(ids) and ids[behind] in self._special_ids and labels[behind] == IGNORED:
            behind += 1
        more = self.num_image_tokens - 1
        ids = [*ids[:at], *[self.image_token_id] * more, *ids[at:]]
        labels = [*labels[:at], *[IGNORED] * more, *labels[at:]]
        return ids, labels, (at, behind + more)


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


def _supervise(ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> list[int]:
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
    ids: list[int], labels: list[int], block: tuple[int, int], max_tokens: int
) -> tuple[list[int], list[int]]:
    """Cuts text from the end, and keeps the image block ``[start, end)`` whole even where it lies behind the cut."""
    start, end = block
    if end <= max_tokens:
        return ids[:max_tokens], labels[:max_tokens]
    room = max_tokens - (end - start)
    if room < 0:
        raise DataError("image longer than a row", f"its {end - start} tokens exceed max_tokens = {max_tokens}")
    keep = min(room, start)
    return ids[:keep] + ids[start:end], labels[:keep] + labels[start:end]
