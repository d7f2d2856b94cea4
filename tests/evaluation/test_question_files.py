"""JSON, JSONL and Parquet give the same questions; what would score wrongly is refused by number."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from visper.common.errors import ConfigError, DataError
from visper.evaluation import Question
from visper.evaluation.question_files import open_questions

ROWS = [
    {"question": "which?", "answer": ["red", "crimson"], "image": "a.png", "kind": "color", "options": None, "id": "7"},
    {"question": "which?", "answer": ["B"], "image": "b.png", "kind": "choice", "options": ["red", "blue"], "id": "8"},
]
EXPECTED = [
    Question("which?", ("red", "crimson"), ("a.png",), "color", (), "7"),
    Question("which?", ("B", "blue"), ("b.png",), "choice", ("red", "blue"), "8"),
]


@pytest.fixture
def folder(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    return tmp_path


def write(folder, form):
    file = folder / f"q.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        file.write_text(json.dumps(ROWS) if form == "json" else "\n".join(map(json.dumps, ROWS)))
    return file


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_every_form_gives_the_same_questions_and_images(form, folder):
    questions, images = open_questions(write(folder, form), folder)
    assert questions == EXPECTED
    assert images.open("a.png").getpixel((0, 0)) == (255, 0, 0) and images.absent(["a.png", "c.png"]) == ["c.png"]
    with pytest.raises(ConfigError, match="pass their folder with --images"):
        open_questions(write(folder, form), None)


def test_embedded_images_need_no_folder_and_equal_ones_have_one_name(folder):
    content = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "b.png", "a.png")]
    rows = [{"question": "which?", "answer": "red", "image": image} for image in [*content, None]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    questions, images = open_questions(folder / "q.parquet", None)
    names = [question.images for question in questions]
    assert names[0] == names[2] != names[1] and names[3] == ()
    assert [images.open(*name).getpixel((0, 0)) for name in names[:2]] == [(255, 0, 0), (0, 0, 255)]


def test_lists_of_embedded_images_are_those_of_their_question(folder):
    held = {name: {"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "b.png")}
    rows = [
        {"question": "<image> or <image>?", "answer": "red", "image": [held["a.png"], held["b.png"]]},
        {"question": "which?", "answer": "blue", "image": [held["b.png"]]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    (two, one), images = open_questions(folder / "q.parquet", None)
    assert two.images[1:] == one.images
    assert [images.open(name).getpixel((0, 0)) for name in two.images] == [(255, 0, 0), (0, 0, 255)]


def test_a_parquet_file_without_a_column_is_named(folder):
    pq.write_table(pa.table({"question": ["q"], "gold": ["a"]}), folder / "q.parquet")
    with pytest.raises(DataError, match=r"q\.parquet' has no column 'answer'; it has question, gold"):
        open_questions(folder / "q.parquet", None)


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("B", ["red", "blue"], ("B", "blue")),
        ("(b)", ["red", "blue"], ("B", "blue")),
        ("Blue.", ["red", "blue"], ("B", "blue")),
        (2, ["1", "2", "3"], ("B", "2")),
        ("A", ["A", "B"], ("A", "A")),
        ("A", ["B", "A"], "which means A and B"),
        ("green", ["red", "blue"], "which is not an option: expected one option's letter (A to B) or text"),
        ("C", ["red", "blue"], "which is not an option"),
        ("A", ["red"], "'options' is \"['red']\": expected 2 to 26 different texts"),
        ("A", ["red", "Red."], "expected 2 to 26 different texts"),
        ("A", "red, blue", "expected 2 to 26 different texts"),
    ],
)
def test_the_right_option_is_a_letter_or_a_text_and_never_both(answer, options, expected, tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{"question": "?", "answer": answer, "options": options}]))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=re.escape(expected)):
            open_questions(tmp_path / "q.json", None)
    else:
        assert open_questions(tmp_path / "q.json", None)[0][0].answers == expected


def test_questions_without_a_kind_among_others_are_no_total(tmp_path):
    rows = [{"question": "?", "answer": "a", "kind": "color"}, {"question": "!", "answer": "a"}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    assert [question.kind for question in open_questions(tmp_path / "q.json", None)[0]] == ["color", "other"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("imgae", "has 'imgae', which is not read, and no 'image': rename the column"),
        ("images", "has 'images', which is not read, and no 'image'"),
        ("choices", "has 'choices', which is not read, and no 'options'"),
        ("photo", "has 'photo', which is not read, and no 'image': rename the column, or add 'image', null where"),
    ],
)
def test_a_column_under_another_name_is_refused(column, message, tmp_path):
    rows = [
        {"question": "?", "answer": "a"},
        {"question": "?", "answer": "a", column: ["a"] if column == "choices" else ["1.png"]},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=re.escape(f"question 1 {message}")):
        open_questions(tmp_path / "q.json", None)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("images", ["1.png"]),
        ("choices", ["a", "b"]),
        ("photo", {"bytes": b"", "path": None}),
        ("photo", [{"bytes": b"", "path": None}]),
        ("photo", b""),
        ("photo", "1.png"),
    ],
)
def test_a_column_of_parquet_under_another_name_is_refused(column, value, tmp_path):
    row = {"question": "?", "answer": "a", column: value}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=rf"q\.parquet' has '{column}', which is not read"):
        open_questions(tmp_path / "q.parquet", None)
    named = {"image": None, "options": None}
    pq.write_table(pa.Table.from_pylist([row | named]), tmp_path / "q.parquet")
    assert open_questions(tmp_path / "q.parquet", None)[0] == [Question("?", ("a",))]


@pytest.mark.parametrize("image", [{"bytes": None, "path": "a.png"}, [{"bytes": None, "path": "a.png"}], 5])
def test_an_image_without_its_bytes_is_no_question_without_an_image(image, tmp_path):
    pq.write_table(pa.Table.from_pylist([{"question": "?", "answer": "a", "image": image}]), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"image not embedded: row 0 has .*: expected the bytes of an image"):
        open_questions(tmp_path / "q.parquet", tmp_path)


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("null", '"a"', "expected question (a text)"),
        ('"?"', "NaN", "expected a text or"),
        ('"?"', "true", "expected a"),
    ],
)
def test_what_is_neither_text_nor_number_is_refused(question, answer, message, tmp_path):
    (tmp_path / "q.json").write_text(f'[{{"question": {question}, "answer": {answer}}}]')
    with pytest.raises(DataError, match=re.escape(message)):
        open_questions(tmp_path / "q.json", None)


def test_other_columns_may_be_there(tmp_path):
    rows = [{"question": "?", "answer": "a", "image": "1.png", "images": 1, "source": "web", "idx": 2, "uid": "x"}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    assert len(open_questions(tmp_path / "q.json", tmp_path)[0]) == 1


def test_a_folder_of_images_that_no_question_names_is_refused(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{"question": "?", "answer": "a"}]))
    with pytest.raises(ConfigError, match=r"no question of .* has an 'image': remove --images, or add the column"):
        open_questions(tmp_path / "q.json", tmp_path)
