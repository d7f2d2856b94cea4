"""Conversations become input ids and labels, by the chat template that is saved with the processor.

Labels come from the character spans of one tokenization of the whole conversation. Re-tokenizing prefixes, the usual
way, drifts by a token wherever a merge crosses a turn's border, and silently supervises the wrong tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from visper.common.errors import DataError
from visper.data.images import output_size
from visper.data.rows.records import Record

IGNORED = -100
_SENTINEL = "\ue000{}\ue001"
_SENTINELS = re.compile("\ue000(\\d+)\ue001")

# Each message's content becomes a string, then the LLM's own template goes on. The image leads its turn, as in the
# published prompt: image, task tokens, newline, text. An `<image>` written into a user's text is the place of an image,
# as in LLaVA's rows, and of one more only where there are more tags than image parts. Servers that inspect a template's
# syntax tree (vLLM) take it for one of content parts only if it has a plain loop over `message['content']`.
_PREAMBLE = """{%- set turns = namespace(list=[]) -%}
{%- set system_prompt = SYSTEM_PROMPT -%}
{%- set fold_system = FOLD_SYSTEM -%}
{%- set lead = namespace(text='') -%}
{%- if system_prompt and (not messages or messages[0]['role'] != 'system') -%}
{%- if fold_system -%}{%- set lead.text = system_prompt ~ '\\n\\n' -%}
{%- else -%}{%- set turns.list = [{'role': 'system', 'content': system_prompt}] -%}{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
{%- set parts = namespace(images=0, text='', said=false, lead='') -%}
{%- if message['content'] is string -%}{%- set parts.text = message['content'] -%}
{%- elif message['content'] is not none -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set parts.images = parts.images + 1 -%}
{%- elif part['type'] == 'text' -%}{%- set parts.text = parts.text ~ part['text'] -%}{%- set parts.said = true -%}
{%- else -%}{{- raise_exception("expected content parts of type 'image' or 'text', found '" ~ part['type'] ~ "'") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set parts.lead = lead.text -%}{%- set lead.text = '' -%}
{%- set pieces = parts.text.split(IMAGE_TOKEN) -%}
{%- if pieces | length > 1 -%}
{%- set parts.images = [parts.images, pieces | length - 1] | max -%}
{%- set parts.text = pieces | join | trim -%}{%- set parts.said = parts.text != '' -%}
{%- endif -%}
{%- endif -%}
{%- set parts.lead = parts.lead ~ IMAGE_BLOCK * parts.images -%}
{%- if parts.images and parts.said -%}{%- set parts.lead = parts.lead ~ '\\n' -%}{%- endif -%}
{%- set turns.list = turns.list + [dict(message, content=parts.lead ~ parts.text)] -%}
{%- endfor -%}
{%- set messages = turns.list -%}
{{- '' }}"""


def student_template(
    llm_template: str, image_token: str, task_tokens: Sequence[str], system_prompt: str | None = None
) -> str:
    """The student's chat template: images become the image token and the task tokens, then the LLM's template.

    A message's content may be a string, a list of ``image`` and ``text`` parts, None or missing. An image stands as a
    part or as the image token in a user's text, which is taken out of the text.

    A system prompt goes first where a conversation has no system turn. An LLM whose template refuses or ignores system
    turns gets it at the head of the first user turn.

    Args:
        llm_template: the LLM tokenizer's own chat template (jinja).
        image_token: stands for the image; the processor repeats it once per image feature.
        task_tokens: put behind the image token, in this order; may be empty.
        system_prompt: None leaves the matter to the LLM's template.
    """
    fold = system_prompt is not None and not _accepts_system(llm_template)
    values = {
        "SYSTEM_PROMPT": _literal(system_prompt or ""),
        "FOLD_SYSTEM": "true" if fold else "false",
        "IMAGE_TOKEN": _literal(image_token),
        "IMAGE_BLOCK": _literal(image_token + "".join(task_tokens)),
    }
    preamble = _PREAMBLE.replace("\n{%-", "{%-").replace("\n{{-", "{{-")
    return re.sub("|".join(values), lambda name: values[name.group()], preamble) + llm_template


def unwrapped_template(template: str) -> str:
    """The LLM's own template inside one of ``student_template``; any other comes back as it is."""
    end = _PREAMBLE.rsplit("\n", 1)[-1]
    return template.split(end, 1)[1] if template.startswith("{%- set turns = ") and end in template else template


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _accepts_system(llm_template: str) -> bool:
    messages = [{"role": "system", "content": _SENTINEL.format(0)}, {"role": "user", "content": "."}]
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=llm_template, bos_token="", eos_token="", add_generation_prompt=True
        )
    except TemplateError:
        return False
    return _SENTINEL.format(0) in rendered[0]


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the tokenizer's chat template puts behind an answer.

    Raises:
        ValueError: the template puts none there.
    """
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": _SENTINEL.format(0)}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(rendered, str)
    return _find_end_of_turn(rendered.rsplit(_SENTINEL.format(0), 1)[-1], _special_pattern(tokenizer)).group()


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _pattern(tuple(sorted({*tokens, *tokenizer.all_special_tokens}, key=len, reverse=True)))


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))


def _find_end_of_turn(tail: str, special: re.Pattern[str]) -> re.Match[str]:
    found = special.search(tail)
    if found is None:
        raise ValueError(
            f"the chat template puts no special token behind an answer (it goes on with {tail[:40]!r}), so the model "
            "could not learn to stop: use an instruct version's template, or mark its end-of-turn token as special"
        )
    return found


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. ``labels`` repeat ``input_ids`` where supervised, else -100."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


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

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_tokens = max_tokens
        self.image_token_id = int(processor.image_token_id)
        self.num_image_tokens = _num_image_tokens(processor)
        self._special = _special_pattern(self.tokenizer)
        self._special_ids = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._skeletons: dict[tuple[tuple[str, ...], int | None, bool], _Skeleton] = {}

    def encode(self, record: Record) -> Encoded:
        """The record's ids and labels, the image expanded.

        Raises:
            DataError: the template refuses the conversation, the image alone is too long, or nothing is left to learn.
        """
        skeleton = self._skeleton(record)
        text, answers, cuts = self._fill(skeleton, record)
        ids, offsets = self._tokenize(text, cuts)
        labels = _supervise(ids, offsets, answers)
        expected = int(record.image_turn is not None)
        if ids.count(self.image_token_id) != expected:
            found = ids.count(self.image_token_id)
            raise DataError("image tokens", f"the chat template shows {found} images: expected {expected}")
        block = (0, 0)
        if expected:
            ids, labels, block = self._expand_image(ids, labels)
        truncated = len(ids) > self.max_tokens
        if truncated:
            ids, labels = _truncate(ids, labels, block, self.max_tokens)
        if all(label == IGNORED for label in labels):
            why = f"none within {self.max_tokens} tokens" if truncated else "every answer is empty"
            raise DataError("no supervised token", why)
        return Encoded(ids, labels, truncated)

    def _skeleton(self, record: Record) -> _Skeleton:
        silent_image = record.image_turn is not None and not record.turns[record.image_turn].text
        key = (tuple(turn.role for turn in record.turns), record.image_turn, silent_image)
        if key not in self._skeletons:
            self._skeletons[key] = self._render(*key)
        return self._skeletons[key]

    def _render(self, roles: tuple[str, ...], image_turn: int | None, silent_image: bool) -> _Skeleton:
        messages = []
        expected = []
        for i, role in enumerate(roles):
            content: list[dict[str, str]] = [{"type": "image"}] if i == image_turn else []
            if not (i == image_turn and silent_image):
                content.append({"type": "text", "text": _SENTINEL.format(i)})
                expected.append(i)
            messages.append({"role": role, "content": content})
        try:
            rendered = self.processor.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise DataError("chat template refuses the turns", f"{', '.join(roles[:6])}: {error}") from error
        pieces = _SENTINELS.split(rendered)
        turns = [int(i) for i in pieces[1::2]]
        if turns != expected:
            raise DataError("chat template leaves turns out", f"turns {expected} were given, {turns} came back")
        literals = pieces[0::2]
        ends = {
            place: _find_end_of_turn(literals[place + 1], self._special).end()
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


def lacks_first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer is to add its first token to a rendered conversation: its template has not written it.

    As transformers' processors decide at inference; training, `answer` and what looks inside must not differ.
    """
    return not (tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)))


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
