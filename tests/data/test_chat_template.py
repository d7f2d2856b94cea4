"""The student's chat template adds task tokens to an image for every renderer and every form of a message."""

from typing import Any

import pytest
from jinja2 import Environment, TemplateError, nodes
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from tests.data.test_chat import (
    SYSTEM,
    TASK_TOKENS,
    TEMPLATES,
    make_processor,
    make_tokenizer,
    sentencepiece_tokenizer,
)
from tools.quickstart_bases.vocabulary import CHAT_TEMPLATE as QUICKSTART
from visper.data.chat_template import llm_template, student_template

ALL_TEMPLATES = {**TEMPLATES, "quickstart": QUICKSTART}
BLOCK = "<image>" + "".join(TASK_TOKENS)
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def takes_content_parts(template: str) -> bool:
    """Whether servers send content parts to this template, by the rule of vLLM's ``auto`` content format.

    They look for a loop over ``message['content']``, where ``message`` runs over ``messages`` or over a name that
    ``messages`` was assigned to. Filters, tests and slices are looked through, other operators are not. Assigning
    messages to anything but a name, such as a namespace's attribute, makes them give up.
    """
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)

    def comes_from(node: nodes.Node, name: str, key: str | None = None) -> bool:
        while isinstance(node, (nodes.Filter, nodes.Test)) or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            assert node.node is not None
            node = node.node
        if key is not None:
            is_item = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == key
            if is_item or (isinstance(node, nodes.Getattr) and node.attr == key):
                node = node.node
            else:
                return False
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name

    def named(target: nodes.Node) -> str:
        if not isinstance(target, nodes.Name):
            raise TypeError("messages are assigned to what is not a name")
        return target.name

    def loops(names: set[str], key: str | None) -> set[str]:
        return {
            named(loop.target) for loop in tree.find_all(nodes.For) if any(comes_from(loop.iter, n, key) for n in names)
        }

    messages: set[str] = set()
    found = {"messages"}
    while found - messages:
        messages |= found
        assigned = tree.find_all(nodes.Assign)
        found = {named(a.target) for a in assigned if any(comes_from(a.node, name) for name in messages)}
    return bool(loops(loops(messages, None), "content"))


@pytest.mark.parametrize(
    ("loop", "accepted"),
    [
        ("{% for m in messages %}{% for p in m['content'] %}{% endfor %}{% endfor %}", True),
        ("{% set ms = messages[1:] %}{% for m in ms %}{% for p in m.content | list %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m['content'] or [] %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", False),
    ],
)
def test_the_rule_knows_loops_over_content(loop: str, accepted: bool) -> None:
    assert takes_content_parts(loop) is accepted


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_servers_send_content_parts_to_every_students_template(name: str, system: str | None) -> None:
    assert takes_content_parts(student_template(ALL_TEMPLATES[name], "<image>", TASK_TOKENS, system))


def render(name: str, messages: list[dict[str, Any]], as_parts: bool) -> str:
    """The prompt. ``as_parts`` writes messages as servers do that send parts: each text as a part, None as no part."""
    if as_parts:
        written: list[dict[str, Any]] = []
        for message in messages:
            content = message.get("content")
            parts = [text(content)] if isinstance(content, str) else content or []
            written.append({**message, "content": parts})
        messages = written
    processor = make_processor(ALL_TEMPLATES[name])
    rendered: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered


WAYS = {
    "string, tag first": "<image>\nWhat?",
    "string, tag last": "What?\n<image>",
    "string, tag alone in its line": "Look:\n<image>\nWhat?",
    "image part first": [IMAGE, text("What?")],
    "image part last": [text("What?"), IMAGE],
    "image part between": [text("What"), IMAGE, text("?")],
    "text part with tag": [text("<image>\nWhat?")],
    "text parts, one of them the tag": [text("<image>"), text("What?")],
    "image part and its tag": [IMAGE, text("<image>\nWhat?")],
    "text part with tag, then the image part": [text("What? <image>"), IMAGE],
}


@pytest.mark.parametrize("as_parts", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_every_way_of_writing_an_image_gives_it_its_task_tokens(name: str, way: str, as_parts: bool) -> None:
    rendered = render(name, [user(WAYS[way])], as_parts)
    words = "Look:\n\nWhat?" if "line" in way else "What?"
    expected = render(name, [user("PLACE")], as_parts=False).replace("PLACE", f"{BLOCK}\n{words}")
    assert rendered == expected
    tokenizer = make_tokenizer(ALL_TEMPLATES[name])
    assert task_tokens(tokenizer, rendered) == 24


def task_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    wanted = set(tokenizer.convert_tokens_to_ids(TASK_TOKENS))
    return sum(token in wanted for token in ids)


@pytest.mark.parametrize("as_parts", [False, True])
@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_each_of_two_user_turns_gives_its_image_its_own(name: str, as_parts: bool) -> None:
    answer = {"role": "assistant", "content": "A cat."}
    rendered = render(name, [user("<image>\nWhat?"), answer, user([text("And "), text("here?"), IMAGE])], as_parts)
    assert rendered.count(BLOCK) == rendered.count("<image>") == 2
    assert rendered.index(BLOCK) < rendered.index("A cat.") < rendered.rindex(f"{BLOCK}\nAnd here?")
    later = render(name, [user("<image>\nWhat?"), answer, user("Sure?")], as_parts)
    assert later.count("<image>") == 1 and later.index(BLOCK) < later.index("What?")


@pytest.mark.parametrize("content", ["<image>", [IMAGE], [text("<image>")], [IMAGE, text("<image>")]])
def test_an_image_alone_has_no_newline_behind_it(content: Any) -> None:
    assert f"<|im_start|>user\n{BLOCK}<|im_end|>" in render("chatml", [user(content)], as_parts=False)


@pytest.mark.parametrize("as_parts", [False, True])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (" one <image> and <image>\nSame?\n", "one B and B\nSame?"),
        ("<image>\n<image>\nSame?", "B\nB\nSame?"),
        ([text("one "), IMAGE, text(" and "), IMAGE, text("?")], "one B and B?"),
        ([IMAGE, IMAGE, text("Same?")], "BBSame?"),
        ([IMAGE, IMAGE], "BB"),
        ([IMAGE, IMAGE, text("one <image> and <image>?")], "one B and B?"),
        ([IMAGE, text("one <image> and <image>?")], "one B and B?"),
        ([IMAGE, text("one and "), IMAGE, text(" <image>?")], "Bone and B ?"),
    ],
)
@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_several_images_of_a_turn_stay_where_they_stand(name: str, content: Any, expected: str, as_parts: bool) -> None:
    rendered = render(name, [user(content)], as_parts)
    assert rendered == render(name, [user("PLACE")], as_parts=False).replace("PLACE", expected.replace("B", BLOCK))


@pytest.mark.parametrize("answer", [{"content": None}, {}, {"content": ""}, {"content": []}])
@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_an_answer_without_content_is_an_empty_one(name: str, answer: dict[str, Any]) -> None:
    messages = [user("<image>\nWhat?"), {"role": "assistant", **answer}, user("Well?")]
    empty = render(name, [messages[0], {"role": "assistant", "content": ""}, messages[2]], as_parts=False)
    assert render(name, messages, as_parts=False) == render(name, messages, as_parts=True) == empty
    assert empty.count(BLOCK) == empty.count("<image>") == 1 and "None" not in empty


def test_only_a_users_text_shows_images() -> None:
    messages = [{"role": "system", "content": "a <image>"}, user("b"), {"role": "assistant", "content": "c <image>"}]
    rendered = render("chatml", messages, as_parts=False)
    assert "a <image><|im_end|>" in rendered and "c <image><|im_end|>" in rendered
    assert not any(token in rendered for token in TASK_TOKENS)


@pytest.mark.parametrize("content", [[{"type": "audio"}], ["What?"], {"type": "text", "text": "What?"}])
def test_content_that_would_be_lost_is_refused(content: Any) -> None:
    with pytest.raises(TemplateError, match="expected content parts of type 'image' or 'text'"):
        render("chatml", [user(content)], as_parts=False)


def test_a_system_prompt_may_hold_any_words() -> None:
    odd = "IMAGE_BLOCK, FOLD_SYSTEM and SYSTEM_PROMPT"
    template = student_template(TEMPLATES["chatml"], "<image>", TASK_TOKENS, odd)
    rendered = make_tokenizer(template).apply_chat_template([user("Hi")], tokenize=False)
    assert isinstance(rendered, str) and rendered.startswith(f"<|im_start|>system\n{odd}<|im_end|>")


@pytest.mark.parametrize(("prefix", "writes"), [("every piece", True), ("first piece", False)])
def test_the_first_token_is_left_to_the_tokenizer_where_writing_it_would_change_the_text(
    prefix: str, writes: bool
) -> None:
    """A space that only the first piece gets would be lost behind a first token that the template writes."""
    tokenizer = sentencepiece_tokenizer(prefix, rstrip=False)
    first = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    tokenizer.chat_template = (
        "{% for m in messages %}a {{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    )
    expected = ("{{- bos_token }}" if writes else "") + tokenizer.chat_template
    assert llm_template(tokenizer) == expected
