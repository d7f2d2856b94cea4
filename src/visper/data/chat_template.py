"""The student's chat template, built from its LLM's, and the checks that the LLM's template must pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from jinja2 import TemplateError
from tokenizers import processors
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from visper.common.errors import ConfigError, DataError

SENTINEL = "\ue000{}\ue001"
"""Placeholder for the text with this number in a rendered conversation."""

SENTINELS = re.compile("\ue000(\\d+)\ue001")

# This preamble turns each message's content into a string, then the LLM's own template follows. If a turn has one
# image, the image comes first, as in the published prompt: image, task tokens, newline, text. Several images stay where
# their parts or tags are, and nothing is added. An `<image>` in a user's text marks the place of an image, as in
# LLaVA's rows; it adds an image only if there are more tags than image parts. Servers that inspect a template's syntax
# tree (vLLM) recognize support for content parts only by a plain loop over `message['content']`.
_PREAMBLE = """{%- set turns = namespace(list=[]) -%}
{%- set system_prompt = SYSTEM_PROMPT -%}
{%- set fold_system = FOLD_SYSTEM -%}
{%- set lead = namespace(text='') -%}
{%- if system_prompt and (not messages or messages[0]['role'] != 'system') -%}
{%- if fold_system -%}{%- set lead.text = system_prompt ~ '\\n\\n' -%}
{%- else -%}{%- set turns.list = [{'role': 'system', 'content': system_prompt}] -%}{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
{%- set parts = namespace(images=0, text='', said=false, lead='', placed='') -%}
{%- if message['content'] is string -%}{%- set parts.text = message['content'] -%}
{%- elif message['content'] is not none -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set parts.images = parts.images + 1 -%}{%- set parts.placed = parts.placed ~ IMAGE_BLOCK -%}
{%- elif part['type'] == 'text' -%}
{%- set parts.text = parts.text ~ part['text'] -%}{%- set parts.said = true -%}
{%- set parts.placed = parts.placed ~ part['text'] | replace(IMAGE_TOKEN, '') -%}
{%- else -%}{{- raise_exception("expected content parts of type 'image' or 'text', found '" ~ part['type'] ~ "'") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set parts.lead = lead.text -%}{%- set lead.text = '' -%}
{%- set pieces = parts.text.split(IMAGE_TOKEN) -%}
{%- if pieces | length > 1 -%}
{%- if parts.images < pieces | length -%}
{%- set parts.images = pieces | length - 1 -%}
{%- set parts.placed = parts.text | trim | replace(IMAGE_TOKEN, IMAGE_BLOCK) -%}
{%- endif -%}
{%- set parts.text = pieces | join | trim -%}{%- set parts.said = parts.text != '' -%}
{%- endif -%}
{%- endif -%}
{%- if parts.images > 1 -%}{%- set parts.text = parts.placed -%}
{%- elif parts.images -%}{%- set parts.lead = parts.lead ~ IMAGE_BLOCK ~ ('\\n' if parts.said else '') -%}
{%- endif -%}
{%- set turns.list = turns.list + [dict(message, content=parts.lead ~ parts.text)] -%}
{%- endfor -%}
{%- set messages = turns.list -%}
{{- '' }}"""


def student_template(
    llm_template: str, image_token: str, task_tokens: Sequence[str], system_prompt: str | None = None
) -> str:
    """The student's chat template: the LLM's, with each image shown as the image token and the task tokens.

    A message's content may be a string, a list of ``image`` and ``text`` parts, None or missing. An image is given as a
    part or as the image token in a user's text. The only image of a turn moves to its start; several keep their places.

    The system prompt is used if a conversation has no system turn. If the LLM's template rejects or ignores system
    turns, the prompt becomes the start of the first user turn.

    Args:
        llm_template: the LLM tokenizer's own chat template (jinja).
        image_token: marks an image; the processor repeats it once per image feature.
        task_tokens: follow the image token, in this order; may be empty.
        system_prompt: None: whatever the LLM's template does.
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


def llm_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of an LLM's tokenizer, in the form that ``student_template`` needs.

    Of several named templates, the one named ``default`` is used, or the only one, without thinking
    (``answering_template``). If the tokenizer adds a BOS token, the returned template writes it at the very start of a
    prompt, because tools differ in whether they add BOS to a rendered prompt (transformers' processors do if the prompt
    does not begin with it, vLLM does not).

    Raises:
        ConfigError: there is no such template, prompts would begin or end with a wrong token, or answers do not follow
            the prompts.
    """
    name = f"the tokenizer '{tokenizer.name_or_path}'"
    template = answering_template(tokenizer, default_template(tokenizer, name))
    if not lacks_first_token(tokenizer, _question(tokenizer, template).lstrip()):
        template = template.lstrip()
        if lacks_first_token(tokenizer, _question(tokenizer, template)):
            raise ConfigError(
                f"the chat template of {name} writes whitespace before '{tokenizer.bos_token}', so prompts would get "
                "two of them: begin the template with {{- bos_token }} in a copy of the tokenizer's folder"
            )
        return template
    plain = _ids(tokenizer, _question(tokenizer, template), add_special_tokens=False)
    added = _ids(tokenizer, _question(tokenizer, template), add_special_tokens=True)
    first = [tokenizer.bos_token_id, *plain]
    if tokenizer.bos_token and added[: len(first)] == first:
        written = "{{- bos_token }}" + template
        if _ids(tokenizer, _question(tokenizer, written), add_special_tokens=False) == first:
            return written
    if added[len(added) - len(plain) :] != plain:
        raise ConfigError(
            f"{name} adds '{tokenizer.convert_ids_to_tokens(added[-1])}' after every text, which would end a prompt "
            "before its answer: remove it from 'post_processor' in tokenizer.json ('add_eos_token' in "
            "tokenizer_config.json) in a copy of its folder"
        )
    return template


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def default_template(owner: Any, name: str) -> str:
    """The chat template of a tokenizer or processor; of several named ones, the one named ``default``, or the only one.

    Raises:
        ConfigError: there is none; the message calls the owner ``name``.
    """
    template = owner.chat_template
    if isinstance(template, dict):
        chosen = next(iter(template)) if len(template) == 1 else "default"
        if chosen not in template:
            raise ConfigError(
                f"{name} has chat templates named {', '.join(sorted(template))} but none named default: copy its "
                "folder, and put only the template to use there, into chat_template.jinja"
            )
        template = template[chosen]
    if not template:
        raise ConfigError(f"{name} has no chat template: use the instruct version of the LLM")
    return str(template)


def _question(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    messages = [{"role": "user", "content": "."}]
    return _rendered(tokenizer, messages, chat_template=template, add_generation_prompt=True)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise ConfigError(
            f"the chat template of the tokenizer '{tokenizer.name_or_path}' rejects a question and its answer "
            f"({error}): correct it in chat_template.jinja in a copy of the tokenizer's folder"
        ) from error


@dataclass(frozen=True)
class GenerationPrompt:
    """What a template writes when it asks for an answer.

    Attributes:
        text: everything between the user's text and the answer.
        added: the end of it that only a request for an answer has; empty for templates that always write all of it.
        header: the same in a conversation that has the answer; should differ in whitespace only.
        conversation: all of that conversation, with its system turn, if the template writes one.
    """

    text: str
    added: str
    header: str
    conversation: str

    @property
    def leads_to_answers(self) -> bool:
        """Whether a prompt ends where a conversation has the answer, up to whitespace."""
        return "".join(self.header.split()) == "".join(self.text.split())

    def answer_start(self, literal: str) -> int:
        """The index in ``literal``, the text before an answer, at which the model is asked: the end of the prompt.

        Templates such as Mistral's write a space between the two, which tokenizers join to the answer's first word.
        """
        for prompt in (self.text, self.added):
            at = literal.rfind(prompt) if prompt else -1
            if at >= 0 and not literal[at + len(prompt) :].strip():
                return at + len(prompt)
        return len(literal)


def generation_prompt(owner: Any, template: str | None = None, as_parts: bool = True) -> GenerationPrompt:
    """How a template asks for an answer; all empty if it rejects a user's question or its answer.

    Args:
        owner: the processor or tokenizer that renders it.
        template: default: the owner's own.
        as_parts: contents are lists of parts, not strings.
    """
    user, assistant = (
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
        for role, text in (("user", SENTINEL.format(0)), ("assistant", SENTINEL.format(1)))
    )

    def render(messages: list[dict[str, Any]], asks: bool) -> str:
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": asks}
        return str(owner.apply_chat_template(messages, **options))

    def behind_question(rendered: str) -> str:
        return rendered.partition(SENTINEL.format(0))[2].partition(SENTINEL.format(1))[0]

    try:
        plain, text = behind_question(render([user], False)), behind_question(render([user], True))
        conversation = render([user, assistant], False)
    except TemplateError:
        return GenerationPrompt("", "", "", "")
    added = text[len(plain) :] if text.startswith(plain) else ""
    return GenerationPrompt(text, added, behind_question(conversation), conversation)


WITHOUT_THINKING = "{%- set enable_thinking = false -%}"
"""Prefix for a template. A student is trained on answers, so it must be asked for an answer and not for thoughts."""


def answering_template(owner: Any, template: str, as_parts: bool = False) -> str:
    """The template, with thinking switched off if it has such a switch.

    Thinking may be asked for in the generation prompt, before the answer (Qwen 3) or in the system turn (SmolLM3).

    Args:
        owner, as_parts: as in ``generation_prompt``.

    Raises:
        ConfigError: its prompts do not lead to its answers, with or without thinking.
    """
    found = generation_prompt(owner, template, as_parts)
    direct = generation_prompt(owner, WITHOUT_THINKING + template, as_parts)
    if direct != found and direct.leads_to_answers:
        return WITHOUT_THINKING + template
    if found.leads_to_answers:
        return template
    raise ConfigError(
        f"the chat template of '{getattr(owner, 'tokenizer', owner).name_or_path}' asks for an answer with "
        f"{found.text[-60:]!r}, but writes {found.header[-60:]!r} before one, so the model would be asked where it was "
        "never trained: use another model, or end the two alike in chat_template.jinja in a copy of its folder"
    )


PADDED = "\n {} \n"
"""A text with whitespace around it, which shows what a template strips."""
_BEFORE: tuple[tuple[str | None, str], ...] = (("", "\n "), ("\n", " "), (None, ""))
_BEHIND: tuple[tuple[str | None, str], ...] = (("", " \n"), ("\n", " "), (None, ""))
"""Arguments of ``str.strip``, and what they leave of the whitespace of ``PADDED``."""
_NOTHING: tuple[tuple[str | None, str], ...] = (("", ""),)


def stripped_by(literals: Sequence[str], padded: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """What a template strips from the start and the end of each text, as arguments of ``str.strip``.

    Args:
        literals: what the template writes before, between and after the texts.
        padded: the same, with each text in ``PADDED``.
    """
    last = len(literals) - 1
    starts: list[str | None] = []
    ends: list[str | None] = []
    for place, (literal, shown) in enumerate(zip(literals, padded, strict=True)):
        options = product(_BEHIND if place else _NOTHING, _BEFORE if place < last else _NOTHING)
        found = [(end, start) for (end, left), (start, right) in options if left + literal + right == shown]
        end, start = found[0] if found else ("", "")
        ends.append(end)
        starts.append(start)
    return list(zip(starts[:-1], ends[1:], strict=True))


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _accepts_system(llm_template: str) -> bool:
    messages = [{"role": "system", "content": SENTINEL.format(0)}, {"role": "user", "content": "."}]
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=llm_template, bos_token="", eos_token="", add_generation_prompt=True
        )
    except TemplateError:
        return False
    return SENTINEL.format(0) in rendered[0]


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the tokenizer's chat template writes after an answer.

    Raises:
        ConfigError: the template writes none there, or rejects the conversation.
    """
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": SENTINEL.format(0)}]
    rendered = _rendered(tokenizer, messages)
    return find_end_of_turn(rendered.rsplit(SENTINEL.format(0), 1)[-1], special_pattern(tokenizer)).group()


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern that finds the tokenizer's special tokens in a text, longer ones first."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _pattern(tuple(sorted({*tokens, *tokenizer.all_special_tokens}, key=len, reverse=True)))


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))


def find_end_of_turn(tail: str, special: re.Pattern[str]) -> re.Match[str]:
    """The first special token in the text that a template writes after an answer. Raises ConfigError if none."""
    found = special.search(tail)
    if found is None:
        raise ConfigError(
            f"the chat template writes no special token after an answer (but {tail[:40]!r}), so the model could not "
            "learn to stop: use the template of an instruct version, or mark its end-of-turn token as special"
        )
    return found


def lacks_first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer should add its special tokens: the rendered conversation does not begin with BOS.

    transformers' processors use the same rule at inference, and training must match it.
    """
    return not (tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)))


def keep_spaces(post_processor: Any) -> None:
    """Lets the character spans of a tokenizer's tokens include their spaces.

    The post-processor of GPT-NeoX's tokenizers and many others, by default, cuts them off, so that tokens of spaces
    would be empty, and lost. It does not change the ids.
    """
    for step in post_processor if isinstance(post_processor, processors.Sequence) else [post_processor]:
        if getattr(step, "trim_offsets", False):
            step.trim_offsets = False


def with_blocks(literals: list[str], image_token: str, blocks: Sequence[str]) -> list[str]:
    """A rendered template's literals with each image token replaced by its block, in order.

    Raises:
        DataError: there is not one block for each image token.
    """
    pieces = [literal.split(image_token) for literal in literals]
    shown = sum(len(parts) - 1 for parts in pieces)
    if shown != len(blocks):
        raise DataError("image tokens", f"the chat template shows {shown} images: expected {len(blocks)}")
    texts = iter(blocks)
    return [parts[0] + "".join(next(texts) + part for part in parts[1:]) for parts in pieces]


def behind_images(template: str, text: str) -> str:
    """A model's chat template, extended to insert ``text`` after each image of a message."""
    return BEHIND_IMAGES.replace("TEXT", text) + template


BEHIND_IMAGES = (
    "{%- set shown = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if not message['content'] or message['content'] is string -%}"
    "{%- set shown.messages = shown.messages + [message] -%}"
    "{%- else -%}"
    "{%- set own = namespace(parts=[]) -%}"
    "{%- for content in message['content'] -%}"
    "{%- set own.parts = own.parts + [content] -%}"
    "{%- if content['type'] in ('image', 'image_url') -%}"
    "{%- set own.parts = own.parts + [{'type': 'text', 'text': 'TEXT'}] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set shown.messages = shown.messages + [dict(message, content=own.parts)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = shown.messages -%}"
)
"""Prefix for a template: adds a text part after each image part of its messages."""
