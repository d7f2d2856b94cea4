"""A finished folder as others get it."""

import json
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from typer.testing import CliRunner

from tests import tiny
from visper.cli import app
from visper.common.errors import ConfigError, DataError
from visper.config import load_run
from visper.evaluation.benchmarks.base import Column
from visper.evaluation.benchmarks.run import Result, save_results
from visper.model import push
from visper.model.card import write_card
from visper.model.push import prepare_upload
from visper.training import run_stage


@pytest.fixture(scope="module")
def made(tiny_llm, tiny_encoder, tmp_path_factory):
    """A PT and an IFT with LoRA after it."""
    folder = tmp_path_factory.mktemp("made")
    recipe = tiny.write_recipe(folder, "pt", tiny_llm, tiny_encoder, max_steps=1)
    run_stage(load_run(recipe))
    changes = {"stage": "ift", "name": "mine", "output": str(folder / "ift"), "start_from": str(folder / "pt")}
    run_stage(load_run(recipe, changes=[{**changes, "student": None, "lora": {"rank": 2}}]))
    return folder


def header_of(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_a_card_says_what_a_model_was_made_of_and_by_which_stages(made):
    card = (made / "ift" / "model" / "README.md").read_text()
    assert header_of(made / "ift" / "model")["pipeline_tag"] == "image-text-to-text"
    assert "# mine" in card and "LoRA of rank 2, merged" in card and "Not evaluated" in card
    stages = [line.split("|")[1].strip() for line in card.splitlines() if line.startswith(("| pt", "| ift"))]
    assert stages == ["pt", "ift"]


def test_nothing_in_a_model_folder_but_its_run_names_a_folder_of_this_machine(made):
    for file in (made / "ift" / "model").iterdir():
        if file.name != "run.yaml":
            assert os.fsencode(made) not in file.read_bytes(), file.name
            assert b"/tiny" not in file.read_bytes() or file.suffix == ".safetensors", file.name


def test_files_have_the_mode_of_any_new_file(made, tmp_path):
    (tmp_path / "new").write_text("")
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (made / "ift" / "model").iterdir()} == {expected}


def save_scores(model, name="realworldqa", share=0.5125, asked=765):
    column = Column("accuracy", share, (0.477, 0.548), asked)
    result = Result(name, asked, 765, [column], [column], [column], [], 0, 0, 0, Path())
    save_results(model / "answers" / f"{name}.scores.json", [result], str(model))


@pytest.fixture
def copied(made, tmp_path):
    """The stage's output elsewhere, and its card with what was evaluated since."""
    shutil.copytree(made / "ift", tmp_path / "ift")

    def card():
        write_card(tmp_path / "ift" / "model")
        return (tmp_path / "ift" / "model" / "README.md").read_text()

    return tmp_path / "ift", card


def test_scores_are_on_the_card(made):
    save_scores(made / "ift")
    write_card(made / "ift" / "model", "llama3")
    card = (made / "ift" / "model" / "README.md").read_text()
    assert "| realworldqa: accuracy | 51.2 (47.7 to 54.8) | 765 |" in card
    assert header_of(made / "ift" / "model")["license"] == "llama3"


def test_a_copy_of_a_model_keeps_its_scores_and_other_weights_in_its_place_do_not(copied):
    model, card = copied
    save_scores(model)
    shutil.copytree(model, model.parent / "again")
    write_card(model.parent / "again" / "model")
    assert "51.2" in (model.parent / "again" / "model" / "README.md").read_text()
    weights = model / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert "51.2" not in card() and "Not evaluated" in card()


def test_scores_of_a_part_of_the_questions_are_not_on_the_card(copied):
    model, card = copied
    save_scores(model, asked=100)
    assert "Not evaluated" in card()


def test_of_several_results_of_a_benchmark_the_newest_is_on_the_card(copied):
    model, card = copied
    save_scores(model, share=0.5)
    (model / "answers" / "realworldqa.scores.json").rename(model / "answers" / "all.scores.json")
    save_scores(model, share=0.25)
    os.utime(model / "answers" / "realworldqa.scores.json", (1, 1))
    assert card().count("realworldqa: accuracy") == 1 and "| 50.0 (" in card()


def test_a_dry_run_lists_the_files_and_uploads_nothing(made, monkeypatch):
    monkeypatch.setattr(push, "HfApi", None)
    found = CliRunner().invoke(app, ["push", str(made / "ift"), "someone/mine", "--dry-run"])
    assert found.exit_code == 0 and "model.safetensors" in found.output and "README.md" in found.output
    assert "run.yaml" not in found.output and "nothing was uploaded" in found.output


def test_what_is_uploaded_is_what_was_listed(made, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, folder_path, **_):
            calls.append(sorted(file.name for file in folder_path.iterdir()))
            return "https://huggingface.co/someone/mine"

    monkeypatch.setattr(push, "HfApi", Hub)
    found = CliRunner().invoke(app, ["push", str(made / "ift"), "someone/mine", "--private"])
    assert found.exit_code == 0, found.output
    assert calls[0] == ("someone/mine", {"private": True, "exist_ok": True})
    assert "config.json" in calls[1] and not {"run.yaml", "manifest.json"} & set(calls[1])


def test_a_hub_that_cannot_be_reached_is_no_bug(made, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port on which nobody listens
        monkeypatch.setattr(push, "HfApi", lambda: HfApi(f"http://127.0.0.1:{closed.getsockname()[1]}", token="none"))
        with pytest.raises(ConfigError, match=r"cannot upload to 'me/mine': .*refused; check the network, then repeat"):
            push.upload(made / "ift" / "model", "me/mine")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OfflineModeIsEnabled("offline mode is enabled."), "offline mode is enabled; check the network"),
        (LocalTokenNotFoundError("no token\nSee ..."), "no token; log in with `hf auth login`"),
        (ValueError("no file\nto upload"), "no file; log in with"),
    ],
)
def test_why_an_upload_failed_is_one_line(error, message, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, *_, **__):
            raise error

    monkeypatch.setattr(push, "HfApi", Hub)
    with pytest.raises(ConfigError, match=rf"cannot upload to 'me/mine': {message}"):
        push.upload(tmp_path, "me/mine")


def all_files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_push_changes_no_file_of_the_model(copied, monkeypatch):
    model, _ = copied
    save_scores(model)
    before = all_files(model)
    with prepare_upload(model, "mit") as folder:
        assert header_of(folder)["license"] == "mit" and "51.2" in (folder / "README.md").read_text()
    with prepare_upload(model / "adapter", base="someone/pt"):
        pass
    assert all_files(model) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("# mine", "# Our best"), ("Not evaluated", "Evaluated"), ("\n<!-- written", "\nAsk us.\n\n<!-- written")],
)
def test_a_card_that_was_edited_is_uploaded_as_it_is(old, new, made, tmp_path, caplog):
    shutil.copytree(made / "ift" / "model", tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    write_card(tmp_path / "model")
    card.write_text(card.read_text().replace(old, new))
    edited = card.read_text()
    assert new in edited
    with prepare_upload(tmp_path / "model", "mit") as folder:
        assert (folder / "README.md").read_text() == edited
    assert "was edited, or written by an older version, so it is uploaded as it is, without --license" in caplog.text
    card.unlink()
    with prepare_upload(tmp_path / "model", "mit") as folder:
        assert header_of(folder)["license"] == "mit"


def test_an_adapters_own_card_is_not_uploaded_without_saying_so(made, tmp_path, caplog):
    shutil.copytree(made / "ift" / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("base: /home/me")
    with prepare_upload(tmp_path / "adapter", base="someone/pt") as folder:
        assert "/home" not in (folder / "README.md").read_text()
    assert "README.md' is not uploaded" in caplog.text and "/home" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_needs_a_base_that_others_have(made):
    with (
        pytest.raises(ConfigError, match=r"a folder of this machine: push that.*--base"),
        prepare_upload(made / "ift" / "adapter"),
    ):
        pass
    with prepare_upload(made / "ift" / "adapter", base="someone/pt") as folder:
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/pt"
        assert header_of(folder)["base_model"] == "someone/pt"


def test_damaged_weights_are_not_shared(made, tmp_path):
    shutil.copytree(made / "pt" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors"), prepare_upload(tmp_path / "model"):
        pass
