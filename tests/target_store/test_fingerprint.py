"""What a target follows from: whatever changes it changes the key, and nothing else does."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from visper.common.errors import ConfigError
from visper.config import Target
from visper.data.images import arrange, open_image, rgb_bytes
from visper.distillation.teachers import SquashedImage
from visper.model import revisions
from visper.target_store import fingerprint as fingerprint
from visper.target_store.fingerprint import Fingerprint, revision_of

GRAY = (100, 110, 120)


def key_of(model, geometry="squash", background=GRAY, kind="features", **options):
    return Fingerprint.of(Target(kind=kind, model=str(model), **options), geometry, background).key


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "teacher"
    place.mkdir()
    (place / "model.safetensors").write_bytes(b"weights")
    (place / "config.json").write_text("{}")
    return place


def test_weights_configuration_options_and_geometry_change_the_key(folder):
    keys = {key_of(folder), key_of(folder, size=3), key_of(folder, "crop"), key_of(folder, "pad")}
    keys.add(key_of(folder, "pad", (0, 0, 0)))
    (folder / "config.json").write_text('{"a": 1}')
    keys.add(key_of(folder))
    (folder / "model.safetensors").write_bytes(b"weightz")
    keys.add(key_of(folder))
    assert len(keys) == 7


def test_a_teacher_of_a_script_or_notebook_is_refused(folder):
    with pytest.raises(ConfigError, match="move the class from the script or notebook to a module"):
        key_of(folder, kind="__main__:Mine")


def test_place_notes_drawing_and_a_color_that_is_not_used_do_not(folder, tmp_path):
    before = key_of(folder)
    (folder / "README.md").write_text("notes")
    (folder / "generation_config.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state").write_text("x")
    folder.rename(tmp_path / "moved")
    assert key_of(tmp_path / "moved") == before == key_of(tmp_path / "moved", background=(0, 0, 0))
    place = tmp_path / "moved"
    assert key_of(place, kind="onnx", threads=2, draw="classes") == key_of(place, kind="onnx")


@pytest.mark.parametrize("location", ["net.onnx.data", "w", "weights.bin", "d/" + 150 * "w"])
def test_a_file_counts_with_the_weights_that_onnx_keeps_beside_it(tmp_path, location):
    onnx = pytest.importorskip("onnx")
    weights = onnx.numpy_helper.from_array(np.ones(300, np.float32), "w")
    graph = onnx.helper.make_graph([], "net", [], [], [weights])
    model, data = tmp_path / "net.onnx", tmp_path / location
    data.parent.mkdir(exist_ok=True)
    onnx.save(onnx.helper.make_model(graph), model, save_as_external_data=True, location=location, size_threshold=0)
    assert data.stat().st_size == 300 * 4
    (tmp_path / "other.onnx").write_bytes(b"another teacher")
    before = revision_of(str(model))
    (tmp_path / "other.onnx").write_bytes(b"changed")
    (tmp_path / "notes.bin").write_bytes(b"not named by the model")
    assert revision_of(str(model)) == before
    data.write_bytes(bytes(300 * 4))
    changed = revision_of(str(model))
    assert changed != before
    data.unlink()
    assert revision_of(str(model)) not in (before, changed)


def test_a_data_file_outside_the_models_folder_is_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(b"1")
    model = tmp_path / "teacher" / "net.onnx"
    model.parent.mkdir()
    for name in (b"../secret", str(tmp_path / "secret").encode()):
        model.write_bytes(b"\n\x08location\x12" + bytes([len(name)]) + name)
        before = revision_of(str(model))
        (tmp_path / "secret").write_bytes(os.urandom(8))
        assert revision_of(str(model)) == before


def test_a_hub_id_is_its_commit_or_unknown(monkeypatch):
    class Hub:
        def model_info(self, model, revision, timeout):
            if model == "there/model":
                return type("Info", (), {"sha": "a" * 40})
            raise ConnectionError

    monkeypatch.setattr(revisions, "HfApi", Hub)
    monkeypatch.setattr(revisions, "try_to_load_from_cache", lambda *args, **kwargs: None)
    assert revision_of("there/model") == "there/model@" + "a" * 40
    assert revision_of("away/model") is None
    assert revision_of("away/model", "b" * 40) == "away/model@" + "b" * 40
    place = "/cache/models--away--model/snapshots/" + "c" * 40 + "/config.json"
    monkeypatch.setattr(revisions, "try_to_load_from_cache", lambda *args, **kwargs: place)
    assert revision_of("away/model") == "away/model@" + "c" * 40


def test_a_teacher_of_ones_own_is_its_code_too():
    assert Fingerprint.of(Target(kind="tests.tiny:PooledColors", model="a"), "squash", GRAY).code
    assert Fingerprint.of(Target(kind="features", model="a"), "squash", GRAY).code is None


def test_our_preprocessing_gives_the_pixels_of_computation_5(tmp_path):
    """Where this fails for an intended change, raise ``fingerprint.COMPUTATION`` and write the new values."""
    rows, columns = np.mgrid[:40, :60]
    picture = np.stack((rows * 6, columns * 4, (rows * columns) % 256), -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "probe.png")
    image = open_image(tmp_path / "probe.png")
    look = SquashedImage((8, 12), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    arranged = {geometry: arrange(image, geometry, GRAY) for geometry in ("squash", "pad", "crop")}
    found = {geometry: look.normalize(look(rgb_bytes(seen))[None])[0] for geometry, seen in arranged.items()}
    sums = {name: [round(float(v), 2) for v in pixels.mean((1, 2))] for name, pixels in found.items()}
    assert fingerprint.COMPUTATION == 5
    assert {name: pytest.approx(values, abs=0.011) for name, values in PROBE.items()} == sums
    assert all(pixels.shape == (3, 8, 12) and pixels.dtype == torch.float32 for pixels in found.values())


PROBE = {"squash": [0.29, -0.15, -0.51], "pad": [0.18, -0.19, -0.49], "crop": [0.29, -0.15, -0.42]}
