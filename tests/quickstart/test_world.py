"""A world folder is complete or absent, and holds what LLaVA's formats say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visper.quickstart import world
from visper.quickstart.world import write_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "small"
    write_world(path, seed=1, scenes=40, held_out=60)
    return path


def test_every_record_has_its_image_and_one_image_tag(folder: Path) -> None:
    for name in ("pretrain.json", "instruct.json"):
        for record in json.loads((folder / name).read_text()):
            assert (folder / "images" / record["image"]).exists()
            turns = record["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert sum(t["value"].count("<image>") for t in turns) == turns[0]["value"].count("<image>") == 1


def test_questions_are_about_held_out_images(folder: Path) -> None:
    questions = json.loads((folder / "questions.json").read_text())
    assert questions and all(set(q) == {"image", "question", "answer", "kind"} for q in questions)
    assert all(q["image"].startswith("held_out") and (folder / "images" / q["image"]).exists() for q in questions)


def test_exact_maps_lie_in_the_order_of_their_images(folder: Path) -> None:
    with np.load(folder / "held_out.npz") as maps:
        assert maps["depth"].shape == maps["classes"].shape == maps["instances"].shape == (60, 96, 96)
        assert str(maps["images"][7]) == "held_out_000007.png"
    assert Image.open(folder / "images" / "held_out_000007.png").size == (96, 96)


def test_an_existing_world_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="give the new world another folder"):
        write_world(folder, seed=1, scenes=1, held_out=1)


def test_a_world_that_fails_half_way_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(world, "write_json", broken)
    with pytest.raises(OSError, match="disk full"):
        write_world(tmp_path / "w", seed=1, scenes=2, held_out=2)
    assert not (tmp_path / "w").exists()
