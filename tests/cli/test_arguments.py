"""What a command reads, it never overwrites."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from visper.cli import app
from visper.cli.arguments import require_other_files
from visper.common.errors import ConfigError

READ = "which this command reads and would overwrite: name another file"
ROWS = '[{"id": "1", "image": "a.png", "conversations": []}]'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate MODEL --questions q.jsonl --answers q.jsonl", f"--answers, is 'q.jsonl', {READ}"),
        ("evaluate MODEL --questions q.jsonl --answers link.jsonl", f"--answers, is 'link.jsonl', {READ}"),
        ("evaluate . --questions answers/q.jsonl", f"--answers, is 'answers/q.jsonl', {READ}"),
        ("data check q.json --images . --report q.json", f"--report is 'q.json', {READ}"),
        ("data check q.json --images . --drop ./q.json", f"--drop is 'q.json', {READ}"),
        ("data check q.json --images . --run r.yaml --drop r.yaml", f"--drop is 'r.yaml', {READ}"),
        ("data check q.json --images . --drop x --report x", "--drop is 'x', the same file as --report"),
        ("look MODEL --image a.png -o a.png", f"--out is 'a.png', {READ}"),
        ("probe MODEL --task d --images . -o p --rows p.probe-rows.json", f"rows is 'p.probe-rows.json', {READ}"),
        ("probe MODEL --task d --images . -o p --teachers p.probe.yaml", f"recipe is 'p.probe.yaml', {READ}"),
        ("probe MODEL --task d --images . -o p --rows q.json --plot q.json", f"--plot is 'q.json', {READ}"),
    ],
)
def test_a_command_never_overwrites_what_it_reads(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers").mkdir()
    for name in ("q.json", "q.jsonl", "answers/q.jsonl", "p.probe-rows.json"):
        (tmp_path / name).write_text('{"question": "what?", "answer": "red"}' if name.endswith("l") else ROWS)
    for name in ("r.yaml", "p.probe.yaml"):
        (tmp_path / name).write_text("extends: quickstart/pt")
    (tmp_path / "link.jsonl").symlink_to("q.jsonl")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(ConfigError) as refused:
        CliRunner().invoke(app, arguments.split(), catch_exceptions=False)
    assert message in str(refused.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_new_files_and_old_outputs_may_be_written(tmp_path):
    (tmp_path / "old").write_text("")
    (tmp_path / "read").write_text("")
    require_other_files(
        {"--a": tmp_path / "old", "--b": tmp_path / "new", "--c": None}, tmp_path / "read", "llava", None
    )
