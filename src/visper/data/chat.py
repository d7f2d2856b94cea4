"""Encodes conversations as input ids and labels, with the chat template that is saved with the processor.

The whole conversation is tokenized once, and labels are found by character spans. The usual way, tokenizing prefixes
again, is off by a token wherever a merge crosses the border of a turn, and silently supervises the wrong tokens.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers.models import Unigram

from visper.common.errors import DataError
from visper.data.chat_template import (
    PADDED,
    SENTINEL,
    SENTINELS,
    find_end_of_turn,
    generation_prompt,
    keep_spaces,
    lacks_first_token,
    special_pattern,
    stripped_by,
    with_blocks,
)
from visper.data.images import output_size
from visper.data.rows.records import Record, is_supervised, unsupervised

IGNORED = -100
_IMAGE, _TEXT = "i", "t"


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. ``labels`` equal ``input_ids`` where supervised, else -100.

    ``image_tokens`` holds the number of image tokens of each image. ``num_text`` counts supervised tokens without
    end-of-turn tokens, and ``num_unknown`` the unknown tokens among them. Both are 0 for a tokenizer without an unknown
    token.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    image_tokens: tuple[int, ...] = ()
    num_text: int = 0
    num_unknown: int = 0


@dataclass(frozen=True)
class _Skeleton:
    """The template rendered for conversations of one form, split where the texts are inserted."""

    literals: list[str]
    # Index of an answer's text -> characters that belong to the answer: of the literal before it, those behind the
    # generation prompt, and of the literal behind it, those up to and including the end of turn.
    answers: dict[int, tuple[int, int]]
    # What the template strips from each text (``stripped_by``); nothing from answers, as in the published code.
    stripped: list[tuple[str | None, str | None]]


class _Filled(NamedTuple):
    """A conversation's text, with character positions in it."""

    text: str
    answers: list[tuple[int, int]]  # what to supervise
    asked: list[int]  # ends of prompts that no token may cross
    cuts: list[int]  # where to cut it so that texts contain no control tokens


class ConversationEncoder:
    """Encodes records as tokens with a LLaVA processor.

    Args:
        processor: a ``LlavaProcessor`` whose chat template handles images (see ``student_template``).
        max_tokens: longest row. Only text is cut, from the end; images and their task tokens are kept.
    """

    of_any_size = True
    """Whether an image has the same number of tokens whatever its size."""

    def __init__(self, processor: Any, max_tokens: int = sys.maxsize) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_tokens = max_tokens
        keep_spaces(self.tokenizer.backend_tokenizer.post_processor)
        self._special = special_pattern(self.tokenizer)
        self._unknown_id = _unknown_id(self.tokenizer)
        self._special_ids = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.image_token_id, self.num_image_tokens = self._read_image_tokens()
        self._behind_image = self._special_ids - {self.image_token_id}
        self._generation_prompt = generation_prompt(processor)
        self._skeletons: dict[tuple[tuple[tuple[str, str], ...], bool], _Skeleton] = {}

    @property
    def image_text(self) -> str:
        """The text that replaces an image before tokenization; empty if that is the image token alone."""
        return ""

    def _read_image_tokens(self) -> tuple[int, int]:
        """The id of the image token, and the number of image tokens per image."""
        return int(self.processor.image_token_id), _num_image_tokens(self.processor)

    def encode(self, record: Record, sizes: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """The record's ids and labels, with one image token per image feature.

        Args:
            sizes: width and height of each image, for students that read images at their own resolution. Without them,
                such a row is neither cut nor refused for its length: its images may be smaller than assumed.

        Raises:
            DataError: the template rejects the conversation, the images alone exceed ``max_tokens``, or no token is
                supervised.
        """
        ids, labels, blocks = self._tokens(record, False, sizes)
        image_tokens = tuple(ids[start:end].count(self.image_token_id) for start, end in blocks)
        truncated = len(ids) > self.max_tokens
        if truncated and (sizes is not None or self.of_any_size or not record.images):
            ids, labels = _truncate(ids, labels, blocks, self.max_tokens)
        if labels.count(IGNORED) == len(labels):
            empty = unsupervised(turn.text for turn in record.turns if turn.role == "assistant")
            raise DataError(*empty or ("no supervised token", f"none within {self.max_tokens} tokens"))
        return Encoded(ids, labels, truncated, image_tokens, *self._count_unknown(labels))

    def _count_unknown(self, labels: list[int]) -> tuple[int, int]:
        if self._unknown_id is None:
            return 0, 0
        unknown = labels.count(self._unknown_id)
        not_text = self._special_ids - {self._unknown_id} | {IGNORED}
        return len(labels) - sum(map(not_text.__contains__, labels)), unknown

    def unknown_words(self, record: Record) -> list[str]:
        """The words of the record's answers that contain an unknown token, in order, also beyond ``max_tokens``.

        Raises:
            DataError: the template rejects the conversation.
        """
        filled = self._fill(record, asks=False)
        _, labels, offsets = self._label(filled)
        text = filled.text
        spans = [span for label, span in zip(labels, offsets, strict=True) if label == self._unknown_id]
        return [_word_around(text, *span) for span in spans]

    def prompt(self, record: Record, sizes: Sequence[tuple[int, int]] | None = None) -> list[int]:
        """The ids of a conversation up to the start of its next answer; never cut.

        They are the ids of training: the text of an image token or control token stays text, which it would not in a
        prompt rendered by the processor.

        Raises:
            DataError: the template rejects the conversation.
        """
        return self._tokens(record, True, sizes)[0]

    def _tokens(
        self, record: Record, asks: bool, sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Ids, labels and each image's block ``[start, end)``; ``asks`` appends the header of an answer."""
        ids, labels, _ = self._label(self._fill(record, asks))
        found, expected = ids.count(self.image_token_id), len(record.images)
        if found != expected:
            raise DataError("image tokens", f"the chat template shows {found} images: expected {expected}")
        return self._expand_images(ids, labels)

    def moves_images(self, record: Record) -> bool:
        """Whether the template shows images elsewhere among the texts, such as all of a turn's before its text.

        Raises:
            DataError: the template rejects the conversation.
        """
        _, turns = _texts(record)
        given = "".join(form for _, form in turns).split(_TEXT)
        shown = (literal.count(self.processor.image_token) for literal in self._skeleton(turns, asks=False).literals)
        return list(map(len, given)) != list(shown)

    def shows_behind_images(self, record: Record, token: str) -> bool:
        """Whether the template writes ``token`` behind each image, before the next one.

        Raises:
            DataError: the template rejects the conversation.
        """
        shown = "".join(self._skeleton(_texts(record)[1], asks=False).literals)
        return all(token in behind for behind in shown.split(self.processor.image_token)[1:])

    def _skeleton(self, turns: tuple[tuple[str, str], ...], asks: bool) -> _Skeleton:
        if (turns, asks) not in self._skeletons:
            self._skeletons[turns, asks] = self._render(turns, asks)
        return self._skeletons[turns, asks]

    def _render(self, turns: tuple[tuple[str, str], ...], asks: bool) -> _Skeleton:
        """The template's text around the texts of the turns, which are given by role and form (see ``_texts``)."""
        literals, speakers = self._literals(turns, asks, "{}")
        padded, _ = self._literals(turns, asks, PADDED)
        answers = {
            place: (
                len(literals[place]) - self._generation_prompt.answer_start(literals[place]),
                find_end_of_turn(literals[place + 1], self._special).end(),
            )
            for place, role in enumerate(speakers)
            if role == "assistant"
        }
        stripped = [
            ("", "") if place in answers else found for place, found in enumerate(stripped_by(literals, padded))
        ]
        return _Skeleton(literals, answers, stripped)

    def _literals(self, turns: tuple[tuple[str, str], ...], asks: bool, text: str) -> tuple[list[str], list[str]]:
        """What the template writes before, between and after the texts, and the role of each text's turn.

        Args:
            text: what each text is, with a place for its sentinel.
        """
        messages: list[dict[str, Any]] = []
        speakers: list[str] = []
        for role, form in turns:
            content = []
            for part in form:
                if part == _IMAGE:
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": text.format(SENTINEL.format(len(speakers)))})
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
        return pieces[0::2], speakers

    def _fill(self, record: Record, asks: bool, blocks: Sequence[str] = ()) -> _Filled:
        """The conversation's text; ``blocks``, if given, replace the template's image tokens."""
        texts, turns = _texts(record)
        skeleton = self._skeleton(turns, asks)
        literals = with_blocks(skeleton.literals, self.processor.image_token, blocks) if blocks else skeleton.literals
        parts = [literals[0]]
        at = len(literals[0])
        answers, asked, cuts = [], [], []
        for place, (given, (before, behind)) in enumerate(zip(texts, skeleton.stripped, strict=True)):
            text = given.lstrip(before).rstrip(behind)
            literal = literals[place + 1]
            # Cut after the first character of each control token that occurs in a text, including overlapping ones.
            found = self._special.search(text)
            while found is not None:
                cuts.append(at + found.start() + 1)
                found = self._special.search(text, found.start() + 1)
            if place in skeleton.answers and is_supervised(text):
                lead, end = skeleton.answers[place]
                answers.append((at - lead, at + len(text) + end))
                # A token may join a prompt to whitespace with which an answer begins, as in the published code.
                asked += [at - lead] if lead or not text[0].isspace() else []
            parts += [text, literal]
            at += len(text) + len(literal)
        return _Filled("".join(parts), answers, asked, cuts)

    def _label(self, filled: _Filled) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Ids, labels and character spans; a prompt has the tokens that it has alone, without its answer."""
        text, cuts = filled.text, filled.cuts
        ids, offsets = self._tokenize(text, cuts)
        begins = [start for start, _ in offsets]
        before = ((place, bisect_left(begins, place) - 1) for place in filled.asked)
        # A token joins the prompt to the answer's first word, or splits the whitespace before it, as GPT-2's does.
        changed = [
            place
            for place, token in before
            if token >= 0 and (offsets[token][1] > place or text[begins[token] - 1 : place].isspace())
        ]
        if changed:
            ids, offsets = self._tokenize(text, sorted({*cuts, *changed}))
        return ids, supervise(ids, offsets, filled.answers), offsets

    def _tokenize(self, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans ``(start, end)`` in ``text``."""
        ids, offsets = self._piece(text[: cuts[0]] if cuts else text, lacks_first_token(self.tokenizer, text))
        for start, end in pairwise([*cuts, len(text)]):
            # SentencePiece puts a space before a text: tokenize after a newline, then remove its tokens. A few
            # tokenizers have tokens of a newline and a word.
            more, spans = self._piece("\n" + text[start:end], False)
            if any(first < 1 < last for first, last in spans):
                more, spans = self._piece("\0" + text[start:end], False)
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
        """Repeats image tokens; also returns each image's block ``[start, end)``, with the special tokens after it."""
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


def _unknown_id(tokenizer: Any) -> int | None:
    """The id of the unknown token; None if the tokenizer can encode every text.

    Not ``tokenizer.unk_token_id``, which in byte-level tokenizers is the end-of-text token.
    """
    model = tokenizer.backend_tokenizer.model
    token = getattr(model, "unk_token", None if not isinstance(model, Unigram) else tokenizer.unk_token)
    return None if token is None else model.token_to_id(token)


def _word_around(text: str, start: int, end: int) -> str:
    """``text[start:end]`` extended by the letters and digits on both sides."""
    start = end - len(text[start:end].lstrip())  # SentencePiece counts the space before a word as part of it
    before = re.search(r"\w*$", text[:start])
    behind = re.match(r"\w*", text[end:])
    assert before is not None and behind is not None
    return before.group() + text[start:end] + behind.group()


def _num_image_tokens(processor: Any) -> int:
    """The number of tokens per image, computed as in ``LlavaProcessor``."""
    side = output_size(processor.image_processor) // int(processor.patch_size)
    dropped = processor.vision_feature_select_strategy == "default"
    return side * side + int(processor.num_additional_image_tokens) - int(dropped)


def supervise(ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> list[int]:
    """Labels: supervises the tokens that begin inside an answer's span."""
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
    """Cuts text from the end, but keeps all image blocks ``[start, end)``, even those after the cut."""
    in_blocks = sum(end - start for start, end in blocks)
    room = max_tokens - in_blocks
    if room < 0:
        raise DataError(
            "images longer than a row", f"{len(blocks)} images have {in_blocks} tokens: max_tokens is {max_tokens}"
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
    """The texts of a conversation, split at the images, and each turn's role and form.

    A form has one letter per text and image of a turn, in order. Empty texts next to images are left out.
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
