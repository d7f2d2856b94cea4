"""Any row, however odd, is a sample or a counted drop; it never ends a run, nor costs another row."""

import gzip
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from tests.data.test_chat import CHATML, make_processor
from visper.common.console import printable
from visper.common.errors import DataError
from visper.data.chat import ConversationEncoder
from visper.data.collator import Sample
from visper.data.dataset import ConversationDataset, keep_good, lost_images
from visper.data.rows.lengths import measure
from visper.data.rows.records import Drop, DropList
from visper.data.rows.sources import open_records

TEXTS = (
    "What?",
    "<image>\nWhat?",
    "What <image> is <image>?",
    "",
    " \t\n",
    "\ud800",
    "\x00\x1b[2J\u202e",
    "<|im_end|><|im_start|>system",
    "<video>",
    "é" * 3000,
    "\ufeff文字",
    "{% for %}{{ x }}",
)
NAMES = (
    "good.png",
    "./good.png",
    "folder/../good.png",
    "../secret.png",
    "/etc/passwd",
    "link.png",
    "away/secret.png",
    "",
    ".",
    "..",
    "~",
    "good.png/",
    "good.png/x",
    "a\0b",
    "a\x1b[31mb.png",
    "x" * 300,
    "/".join(["x" * 200] * 30),
    "C:\\good.png",
    "http://x/y.png",
    "data:image/png;base64,",
    "\ud800.png",
    "eps.jpg",
    "bomb.png",
    "cut.jpg",
    "empty.png",
    "page.png",
    "$HOME/good.png",
)
SCALARS = (None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, [], {}, [[]], [None], {"": None})
KEYS = ("id", "image", "images", "conversations", "messages", "system", "text", "video", "audios", "model", "")


def deep(depth):
    found = "x"
    for level in range(depth):
        found = [found] if level % 2 else {"a": found}
    return found


def value(chance, depth=0):
    """Something that JSON can hold."""
    kind = chance.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return chance.choice(TEXTS)
    if kind == 2:
        return chance.choice(NAMES)
    if kind < 5:
        return chance.choice(SCALARS)
    if kind == 5:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 6:
        return {chance.choice((*KEYS, "from", "value", "type")): value(chance, depth + 1) for _ in range(3)}
    return deep(chance.choice((5, 100, 450)))


def turn(chance, role):
    names = chance.choice((("from", "value"), ("role", "content")))
    role = {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "role": role}[names[0]]
    content = chance.choice((TEXTS[role == "user"], TEXTS[role == "user"], chance.choice(TEXTS)))
    if chance.random() < 0.2:
        parts = ({"type": "text", "text": content}, {"type": "image"}, {"type": "image", "image": chance.choice(NAMES)})
        content = [chance.choice((*parts, {"type": value(chance)}, value(chance))) for _ in range(3)]
    return {names[0]: role, names[1]: content}


def odd_row(chance):
    """A row that is nearly right: some of its values, keys or turns are replaced, left out or repeated."""
    said = [turn(chance, role) for role in ("user", "assistant") * chance.choice((1, 1, 1, 2))]
    row = {"id": chance.randrange(9), chance.choice(("conversations", "conversations", "messages")): said}
    if chance.random() < 0.7:
        named = chance.choice((NAMES[0], chance.choice(NAMES)))
        row[chance.choice(("image", "image", "images"))] = chance.choice((named, [named], [named, "good.png"]))
    for _ in range(chance.choice((0, 0, 1, 2))):
        attack = chance.randrange(6)
        if attack == 0:
            row[chance.choice(KEYS)] = value(chance)
        elif attack == 1:
            row.pop(chance.choice(list(row)), None)
        elif attack == 2 and said:
            said[chance.randrange(len(said))] = value(chance)
        elif attack == 3 and said and isinstance(said[0], dict):
            said[0][chance.choice(("from", "value", "role", "content"))] = value(chance)
        elif attack == 4:
            said.insert(chance.randrange(len(said) + 1), turn(chance, chance.choice(("system", "tool", "assistant"))))
        elif chance.random() < 0.3:
            return value(chance)
    return row


def torn(line, chance):
    """A line with a byte changed, lost or cut off."""
    content = bytearray(line)
    at = chance.randrange(len(content))
    content[at : at + chance.randrange(3)] = chance.choice((b"", b"\xff", b'"', b"[", b"\0"))
    return bytes(content if chance.random() < 0.7 else content[:at]).replace(b"\n", b" ") or b" "


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with a good image, bad ones, and links that lead outside."""
    tmp_path = tmp_path_factory.mktemp("attacked")
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "far").mkdir()
    red = Image.new("RGB", (12, 8), "red")
    red.save(folder / "good.png")
    red.save(tmp_path / "secret.png")
    red.save(tmp_path / "far" / "secret.png")
    red.save(folder / "eps.jpg", "EPS")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    red.resize((99, 99)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
    (folder / "empty.png").touch()
    (folder / "page.png").write_text("<html>gone</html>")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "away").symlink_to(tmp_path / "far")
    return folder


def survive(file: Path, images: Path, count: int) -> tuple[int, int]:
    """Reads, surveys and loads every row of ``file``; returns the numbers of samples and of drops."""
    encoder, drops = ConversationEncoder(make_processor(CHATML), 500), DropList()
    records = open_records([(file, images)], drops)
    assert len(records) + len(drops) == count
    found = measure(records, encoder, quiet=True)
    good, _ = keep_good(records, found, lost_images(records, found), drops)
    assert len(good) + len(drops) == count
    loaded = [ConversationDataset(good, encoder)[i] for i in range(len(good))]
    assert all(isinstance(one, Sample | Drop) for one in loaded)
    assert all(not one.images or one.images[0].size == (12, 8) for one in loaded if isinstance(one, Sample))
    drops.extend(one for one in loaded if isinstance(one, Drop))
    assert all(printable(text) == text for drop in drops for text in (drop.sample_id, drop.detail))
    drops.write(file.with_suffix(".dropped"))
    assert [drop.sample_id for drop in DropList.read(file.with_suffix(".dropped"))] == [d.sample_id for d in drops]
    return count - len(drops), len(drops)


def attack(tmp_path, images, seeds):
    """As a list and as lines of the same rows, then with some of the lines torn."""
    rows = [odd_row(random.Random(seed)) for seed in seeds]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    lines = [json.dumps(row).encode() for row in rows]
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(lines))
    counts = survive(tmp_path / "list.json", images, len(rows))
    assert counts == survive(tmp_path / "lines.jsonl", images, len(rows))
    assert min(counts) > len(rows) // 20  # the attack is neither blunt nor deadly
    some = random.Random(len(rows))
    torn_lines = [lines[0], *(torn(line, some) if some.random() < 0.3 else line for line in lines[1:])]
    (tmp_path / "torn.jsonl").write_bytes(b"\n".join(torn_lines))
    survive(tmp_path / "torn.jsonl", images, sum(bool(line.strip()) for line in torn_lines))


def test_odd_rows_are_samples_or_counted_drops(tmp_path, images):
    attack(tmp_path, images, range(500))


@pytest.mark.nightly
def test_twenty_thousand_odd_rows_are_samples_or_counted_drops(tmp_path, images):
    attack(tmp_path, images, range(1000, 21_000))


def test_numbers_and_nesting_past_pythons_limits_cost_their_row_alone(tmp_path, images):
    good = json.dumps({"id": 1, "conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]})
    nested = [good.replace("1", "[" * depth + "]" * depth, 1) for depth in (300, 900, 990, 100_000)]
    rows = [good, good.replace("1", "9" * 5000, 1), *nested, good]
    (tmp_path / "lines.jsonl").write_text("\n".join(rows))
    samples, drops = survive(tmp_path / "lines.jsonl", images, len(rows))
    assert samples >= 2 and drops >= 1
    (tmp_path / "list.json").write_text(f"[{','.join(rows[:3])},{good}]")
    assert survive(tmp_path / "list.json", images, 4)[0] >= 2


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_list_is_an_error_that_names_it_or_costs_some_rows(tmp_path, images, seed):
    chance, file = random.Random(seed), tmp_path / "rows.json"
    content = bytearray(json.dumps([odd_row(random.Random(n)) for n in range(5)]).encode())
    if seed % 3 == 0:
        content = bytearray(gzip.compress(content, mtime=0))
    for _ in range(chance.randrange(1, 4)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content[: len(content) if seed % 4 else chance.randrange(len(content))])
    try:
        drops = DropList()
        records = open_records([(file, images)], drops)
    except DataError as error:
        assert str(file) in str(error)
    else:
        assert len(records) + len(drops)
