"""Looking at a finished PT: each tapped layer beside the teacher, and what is said where there is nothing to see."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests import tiny, tiny_teachers
from visper.cli import app
from visper.common.errors import ConfigError, DataError
from visper.config import Data, load_run
from visper.evaluation import predictions
from visper.evaluation.predictions import load_pre_trained, predict_images, teacher_targets
from visper.evaluation.visualize import first_images, folder_gallery, look, needs_gallery
from visper.training import run_stage

TILE, CAPTION = 384 + 6, 24


def recipe(folder, llm, encoder, **changes):
    rows = folder / "rows"
    if not rows.exists():
        tiny.write_rows(rows, images=5, text_rows=1)
    run = {
        "name": "tiny",
        "stage": "pt",
        "output": str(folder / "pt"),
        "student": {"llm": str(llm), "encoder": str(encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
        "distillation": tiny.distillation(),
        "optimization": {"global_batch": 2, "micro_batch": 2, "lr": 1e-2, "max_steps": 1, "precision": "float32"},
        **changes,
    }
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    return load_run(folder / "run.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llm, tiny_encoder):
    """The folder of a PT of one step."""
    folder = tmp_path_factory.mktemp("look")
    run_stage(recipe(folder, tiny_llm, tiny_encoder))
    return folder / "pt"


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(5).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def test_teachers_are_tried_on_the_device_where_they_run(trained, monkeypatch):
    def build(*given):
        raise ConfigError(f"on {given[-1]}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(predictions, "build_teachers", build)
    with pytest.raises(ConfigError, match="on cuda"):
        load_pre_trained(trained)


def test_predictors_and_queries_are_those_that_were_saved(trained):
    found = load_pre_trained(trained)
    state = found.model.state_dict()
    for name, value in load_file(trained / "distillation" / "weights.safetensors").items():
        assert torch.equal(state[name], value)
    assert not found.model.training and list(found.teachers) == ["depth", "seg", "gen"]


def test_the_model_folder_leads_there_too(trained):
    assert load_pre_trained(trained / "model").run == load_pre_trained(trained).run


def test_predictions_do_not_depend_on_the_batch(trained, image):
    model, other = load_pre_trained(trained).model, image.transpose(Image.Transpose.ROTATE_90)
    together = predict_images(model, [image, other], "what?")
    alone = predict_images(model, [other], "what?")
    assert list(together) == ["depth/1", "depth/3", "seg/2", "seg/4", "gen/3"]
    for name, value in alone.items():
        torch.testing.assert_close(together[name][1:], value, rtol=0, atol=1e-5)


def test_each_task_is_a_row_and_each_layer_a_tile_in_the_teachers_colors(trained, image):
    found = load_pre_trained(trained)
    sheet = look(found, image)
    # Image, teacher, two layers; three tasks.
    assert sheet.size == (4 * TILE + 6, 3 * (TILE + CAPTION))
    teacher = found.teachers["depth"]
    target = teacher_targets(teacher, [image])
    predicted = predict_images(found.model, [image], "Describe the image concisely.")["depth/3"]
    for column, embedding in ((1, target), (3, predicted)):
        drawn = teacher.decode(embedding, reference=target)[0, :, 0, 0] * 255
        corner = sheet.getpixel((6 + column * TILE + 5, CAPTION + 5))
        assert np.abs(np.array(corner) - drawn.numpy()).max() <= 1


def test_a_one_token_target_is_never_drawn_as_a_map(trained, image):
    """Without a gallery its row holds the image and a blank tile, whose caption says why."""
    sheet = look(load_pre_trained(trained), image)
    left, top = 6 + TILE, 2 * (TILE + CAPTION) + CAPTION
    colors = sheet.crop((left, top, sheet.width, sheet.height)).getcolors()
    assert [color for _, color in colors] == [(255, 255, 255)]


def test_where_a_teacher_draws_nothing_the_nearest_images_are_shown(trained):
    found = load_pre_trained(trained)
    assert needs_gallery(found)
    gallery = first_images(found.run.data)
    assert len(gallery) == 5
    sheet = look(found, gallery[2], gallery=gallery)
    # The nearest of an image's own target is the image: first quarter of the teacher's tile in the third row.
    left, top = 6 + TILE, 2 * (TILE + CAPTION) + CAPTION
    shown = np.asarray(sheet.crop((left, top, left + 192, top + 192)), dtype=int)
    expected = np.asarray(gallery[2].resize((192, 192)), dtype=int)
    assert np.abs(shown - expected).max() <= 1


def test_embedded_images_of_two_sources_are_all_in_the_gallery(tmp_path):
    sources = []
    for seed, name in enumerate("ab"):
        rows = tiny.write_rows(tmp_path / name, images=3, text_rows=0, seed=seed)
        (tmp_path / f"set-{name}").mkdir()
        tiny.write_parquet(rows, tmp_path / f"set-{name}" / "rows.parquet")
        sources.append({"parquet": str(tmp_path / f"set-{name}" / "rows.parquet")})
    found = first_images(Data.model_validate({"sources": sources}))
    assert len({image.tobytes() for image in found}) == 6


def test_a_gallery_can_be_any_folder_with_images(trained, tmp_path):
    assert len(folder_gallery(trained.parent / "rows", count=3)) == 3
    with pytest.raises(DataError, match="no image can be read"):
        folder_gallery(tmp_path)


def test_a_run_whose_images_are_gone_has_no_gallery(trained):
    run = load_run(trained / "run.yaml", ["data.sources=[{json: /gone.json, images: /gone}]"])
    assert first_images(run.data) == []


def test_published_kinds_of_teachers_are_drawn(tmp_path, tiny_llm, tiny_encoder, image):
    """Depth by its head, segments by both decoders, the image embedding by its neighbors, features by components."""
    places = {
        "depth": tiny_teachers.save(tiny_teachers.depth_model(), tmp_path / "depth"),
        "seg": tiny_teachers.save_oneformer(tmp_path / "seg"),
        "gen": tiny_teachers.save_unclip(tmp_path / "gen"),
        "dino": tiny_teachers.save_vision(tmp_path / "dino", "dinov2", mlp_ratio=1),
    }
    kinds = {
        "depth": {"kind": "depth_anything", "size": 56},
        "seg": {"kind": "oneformer", "size": 64},
        "gen": {"kind": "unclip", "subfolder": "image_encoder"},
        "dino": {"kind": "features", "size": 56},
    }
    tasks = {
        task: {
            "target": {**kind, "model": str(places[task])}, "layers": [2], "head": {"heads": 2, "head_width": 4},
        }
        for task, kind in kinds.items()
    }  # fmt: skip
    tokens = {"order": list(kinds), "per_task": 4}
    student = {"llm": str(tiny_llm), "encoder": str(tiny_encoder), "task_tokens": tokens}
    run_stage(recipe(tmp_path, tiny_llm, tiny_encoder, student=student, distillation={"tasks": tasks}))
    image.save(tmp_path / "image.png")
    asked = (
        "look",
        str(tmp_path / "pt"),
        "--image",
        str(tmp_path / "image.png"),
        "-o",
        str(tmp_path / "a" / "b.png"),
    )
    result = CliRunner().invoke(app, list(asked), catch_exceptions=False)
    assert result.exit_code == 0
    with Image.open(tmp_path / "a" / "b.png") as sheet:
        assert sheet.size == (3 * TILE + 6, 4 * (TILE + CAPTION))


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.png", "PNG")]
)
def test_a_drawing_has_the_format_that_its_name_says(trained, image, tmp_path, name, kind):
    image.save(tmp_path / "image.png")
    asked = ["look", str(trained), "--image", str(tmp_path / "image.png"), "-o", str(tmp_path / name)]
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
    with Image.open(tmp_path / name) as sheet:
        assert sheet.format == kind


@pytest.mark.parametrize("name", ["a.jpgg", "a.gif", "a.pdf", "a", ".png"])
def test_a_drawing_of_another_format_is_refused_before_anything_is_read(tmp_path, name):
    result = CliRunner().invoke(app, ["look", "nowhere", "--image", "nothing.png", "-o", str(tmp_path / name)])
    assert result.exit_code == 2 and ".jpeg, .webp" in result.output


def test_an_ift_folder_has_nothing_to_look_at(trained, tmp_path):
    (tmp_path / "ift").mkdir()
    (tmp_path / "ift" / "run.yaml").write_text(
        f"extends: {trained / 'run.yaml'}\nstage: ift\nstart_from: runs/a/pt\nstudent: null\ndistillation: null\n"
    )
    with pytest.raises(ConfigError, match=r"has no embedding predictors: stage 'ift' keeps none.*'runs/a/pt'"):
        load_pre_trained(tmp_path / "ift")
    with pytest.raises(ConfigError, match=r"no folder '.*nowhere.*': give the output"):
        load_pre_trained(tmp_path / "nowhere" / "at" / "all")


def test_a_missing_teacher_is_named_with_the_way_out(trained):
    away = "distillation.tasks.depth.target={kind: features, model: /gone/teacher_depth}"
    with pytest.raises(ConfigError, match=r"task 'depth'.*'/gone/teacher_depth'[\s\S]*--set dist"):
        load_pre_trained(trained, [away])


def test_a_teacher_of_another_shape_is_refused(trained):
    with pytest.raises(ConfigError, match="were trained with teachers of other shapes"):
        load_pre_trained(trained, ["distillation.tasks.depth.target.width=12"])


def test_other_layers_than_the_saved_ones_are_refused(trained):
    with pytest.raises(ConfigError, match=r"such as 'objective\.predictors\.depth_"):
        load_pre_trained(trained, ["distillation.tasks.depth.layers=[2]"])


def test_broken_weights_are_never_half_read(trained, tmp_path):
    weights = load_file(trained / "distillation" / "weights.safetensors")
    del weights["objective.logit_scales.depth"]
    (tmp_path / "distillation").mkdir()
    save_file(weights, tmp_path / "distillation" / "weights.safetensors")
    (tmp_path / "distillation" / "run.yaml").write_text((trained / "run.yaml").read_text())
    (tmp_path / "model").symlink_to(trained / "model")
    with pytest.raises(ConfigError, match=r"differ in 1 weight, such as 'objective.logit_scales.depth'"):
        load_pre_trained(tmp_path)
