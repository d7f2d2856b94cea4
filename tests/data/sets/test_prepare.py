"""From published archives to the layout that rows expect, with every mistake of the published instructions."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from tests.data.sets import published, server
from tests.data.sets.published import COCO, HUB, image, rows, tarred, zipped
from visper.common.errors import ConfigError, DataError
from visper.data.sets.catalog import missing, read_set, set_names
from visper.data.sets.fetch import RetryPolicy, obtain
from visper.data.sets.prepare import prepare

QUICK = RetryPolicy(attempts=2, timeout=2, pause=0.01, longest_pause=0.02)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    with server.serving() as shelf:
        published.use_server(shelf, tmp_path / "catalogue", monkeypatch)
        yield shelf


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def bring(name, root, **options):
    return prepare(str(name), root, console=Console(quiet=True), patience=QUICK, **options)


def tree(root: Path) -> set[str]:
    """The files under a root that are neither archives nor state."""
    files = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
    return {f.as_posix() for f in files if f.parts[0] not in (".visper", "archives", "visper-data.lock.json")}


def own_set(folder: Path, content: dict) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "mine", "title": "t", "use": "u", "license": "l", **content}))
    return file


HERE = set(published.MIX) - {None, "ocr_vqa/images/15.jpg"} | {"llava_v1_5_mix665k.json"}


@pytest.mark.parametrize("mirror", published.OCR)
def test_llava_665k_comes_as_its_rows_name_it_from_any_mirror(shelf, root, mirror):
    published.put_llava_665k(shelf, mirror)
    outcome = bring("llava-665k", root)
    assert tree(root) == HERE
    assert outcome.absent == ["ocr_vqa/images/15.jpg"] and outcome.unreadable == ["ocr_vqa/images/14.jpg: not an image"]
    assert outcome.repaired == {"GIF under .jpg": 2, "PNG under .jpg": 1}
    assert all(Image.open(root / f"ocr_vqa/images/{n}.jpg").format == "JPEG" for n in (10, 11, 12, 13))
    assert (root / "ocr_vqa/images/10.jpg").read_bytes() == image(10)  # sound: untouched
    assert (root / "gqa/images/1.jpg").read_bytes() == image(21)  # not Visual Genome's images.zip
    assert (root / "vg/VG_100K/1.jpg").read_bytes() == image(41)
    assert (root / "archives/gqa/images.zip").read_bytes() != (root / "archives/vg/images.zip").read_bytes()


def test_the_second_time_there_is_nothing_to_do_and_nobody_is_asked(shelf, root):
    published.put_llava_665k(shelf)
    bring("llava-665k", root)
    before, shelf.requests = digest(root), []
    shelf.files.clear()
    assert bring("llava-665k", root).nothing_done
    assert digest(root) == before and not shelf.requests


def test_all_unpacks_the_rest_without_the_network(shelf, root):
    published.put_llava_665k(shelf)
    bring("llava-665k", root)
    shelf.files.clear()
    outcome = bring("llava-665k", root, everything=True)
    assert not outcome.fetched and {"coco/train2017/000000000003.jpg", "vg/VG_100K_2/3.jpg"} <= tree(root)


def test_dropped_archives_are_not_missed(shelf, root):
    published.put_llava_665k(shelf)
    bring("llava-665k", root, drop_archives=True)
    assert not [file for file in (root / "archives").rglob("*") if file.is_file()]
    shelf.files.clear()
    assert bring("llava-665k", root).nothing_done


def test_only_what_was_deleted_comes_again(shelf, root):
    published.put_llava_665k(shelf)
    bring("llava-665k", root, drop_archives=True)
    (root / "gqa/images/1.jpg").unlink()
    outcome = bring("llava-665k", root)
    assert outcome.fetched == ["gqa/images.zip"] and outcome.unpacked == 1 and tree(root) == HERE


def test_a_tree_put_together_by_hand_needs_no_archive(shelf, root):
    published.put_llava_665k(shelf)
    bring("llava-665k", root)
    for name in ("archives", ".visper"):
        subprocess.run(["rm", "-r", root / name], check=True)
    (root / "visper-data.lock.json").unlink()
    (root / "ocr_vqa/images/15.jpg").write_bytes(image(15))
    shelf.files.clear()
    assert bring("llava-665k", root).nothing_done


def test_an_archive_put_there_by_hand_is_used(shelf, root):
    published.put_others(shelf)
    archive = root / "archives/LLaVA-Pretrain/images.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(shelf.files[HUB.format("liuhaotian/LLaVA-Pretrain") + "images.zip"])
    outcome = bring("llava-pretrain", root)
    assert outcome.fetched == ["LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"] and outcome.unpacked == 2


LAYOUTS = {
    "llava-pretrain": {"LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images/00453/004539375.jpg",
                       "LLaVA-Pretrain/images/00659/1.jpg"},
    "allava-caption": {"allava/allava_laion/ALLaVA-Caption-LAION-4V.json", "allava/allava_laion/images/1.jpeg",
                       "allava/allava_laion/images/2.jpeg", "allava/allava_vflan/ALLaVA-Caption-VFLAN-4V.json",
                       "allava/allava_vflan/images/images_191task_1k/a+b.jpg",
                       "allava/allava_vflan/images/images_191task_1k/c d.jpg"},
    "cv-bench": {"eval/cv-bench/test_2d.parquet", "eval/cv-bench/test_3d.parquet"},
    "mmstar": {"eval/mmstar/mmstar.parquet"},
    "realworldqa": {"eval/realworldqa/test-0.parquet"},
    "ok-vqa": {"eval/ok-vqa/OpenEnded_mscoco_val2014_questions.json", "eval/ok-vqa/mscoco_val2014_annotations.json",
               "coco/val2014/COCO_val2014_000000000001.jpg"},
    "da-2k": {"eval/DA-2K/annotations.json", "eval/DA-2K/images/a.jpg"},
    "coco-panoptic-val2017": {"coco/val2017/000000000139.jpg", "coco/annotations/captions_val2017.json",
                              "coco/annotations/panoptic_val2017.json", "coco/panoptic_val2017/000000000139.png"},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_other_set_comes_to_its_place(shelf, root, name):
    published.put_others(shelf)
    assert bring(name, root).absent == []
    assert tree(root) == LAYOUTS[name]
    shelf.files.clear()
    assert bring(name, root, drop_archives=True).nothing_done
    assert missing(read_set(name)[0], root) == []


def test_allava_comes_from_the_one_archive_where_there_are_no_chunks(shelf, root):
    published.put_others(shelf, chunks=False)
    bring("allava-laion", root)
    assert tree(root) == {name for name in LAYOUTS["allava-caption"] if "laion" in name}


def test_every_entry_of_the_catalog_is_tested():
    parts = {need for name in (*LAYOUTS, "llava-665k") for need in read_set(name)[0].needs}
    assert set(set_names()) == {*LAYOUTS, "llava-665k"} | parts


def test_a_mirror_serves_where_the_first_server_does_not(shelf, root):
    published.put_others(shelf)
    del shelf.files[COCO + "/zips/val2017.zip"]
    shelf.put("/s3.amazonaws.com" + COCO + "/zips/val2017.zip", zipped({"val2017/000000000139.jpg": image(72)}))
    bring("coco-val2017", root)
    assert "coco/val2017/000000000139.jpg" in tree(root)


def test_what_fails_is_named_with_every_source_and_the_rest_comes(shelf, root):
    published.put_llava_665k(shelf)
    del shelf.files[COCO + "/zips/train2017.zip"], shelf.files[published.VG + "/images2.zip"]
    with pytest.raises(DataError, match=r"coco/train2017\.zip: no source gave it") as error:
        bring("llava-665k", root)
    assert str(error.value).count("HTTP 404") == 3 and "archives/coco/train2017.zip' yourself" in str(error.value)
    assert {"gqa/images/1.jpg", "vg/VG_100K/1.jpg", "ocr_vqa/images/10.jpg"} <= tree(root)
    assert "the end of an interrupted preparation" in missing(read_set("gqa")[0], root)
    published.put_llava_665k(shelf)
    assert sorted(bring("llava-665k", root).fetched) == ["coco/train2017.zip", "vg/images2.zip"]
    assert tree(root) == HERE


@pytest.mark.parametrize("damage", ["middle", "directory"])
def test_an_archive_damaged_on_its_way_is_fetched_again(shelf, root, damage):
    published.put_others(shelf)
    path = COCO + "/zips/val2017.zip"
    whole = shelf.files[path]
    where = len(whole) // 3 if damage == "middle" else whole.index(b"PK\x01\x02") + 20
    broken = whole[:where] + bytes([whole[where] ^ 255]) + whole[where + 1 :]
    shelf.faults[path] += [server.instead(broken)]
    bring("coco-val2017", root)
    assert (root / "coco/val2017/000000000139.jpg").read_bytes() == image(72)


def test_an_archive_damaged_for_good_is_named_and_leaves_nothing_half(shelf, root):
    whole = zipped({"val2017/a.jpg": image(1), "val2017/b.jpg": image(2)})
    where = whole.index(b"val2017/b.jpg") + 60
    published.put_others(shelf)
    shelf.put(COCO + "/zips/val2017.zip", whole[:where] + bytes([whole[where] ^ 255]) + whole[where + 1 :])
    with pytest.raises(DataError, match="broken archive"):
        bring("coco-val2017", root)
    assert tree(root) <= {"coco/val2017/a.jpg", "coco/annotations/captions_val2017.json"}


def test_an_archive_laid_out_otherwise_is_named(shelf, root):
    published.put_others(shelf)
    shelf.put(COCO + "/zips/val2017.zip", zipped({"val/000000000139.jpg": image(1)}))
    with pytest.raises(DataError, match=r"no 'val2017/' inside; found \['val'\]"):
        bring("coco-val2017", root)
    pretrain = HUB.format("liuhaotian/LLaVA-Pretrain") + "images.zip"
    shelf.put(pretrain, zipped({"images/00453/004539375.jpg": image(1)}))
    with pytest.raises(DataError, match="contains none of the files that rows name under 'LLaVA-Pretrain/images/'"):
        bring("llava-pretrain", root)


def test_a_pointer_in_place_of_rows_is_named(shelf, root):
    published.put_llava_665k(shelf)
    root.mkdir()
    (root / "llava_v1_5_mix665k.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"git-LFS pointer.*git lfs pull.*Move it away"):
        bring("llava-665k", root)


def test_a_full_disk_is_said_first(shelf, root, monkeypatch):
    published.put_llava_665k(shelf)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(DataError, match="disk full"):
        bring("llava-665k", root)
    assert not tree(root)


IMAGES = {
    "GIF under .jpg": image(1, "GIF", "P"),
    "PNG under .jpg": image(1, "PNG"),
    "WEBP under .jpg": image(1, "WEBP"),
    "CMYK colors": image(1, "JPEG", "CMYK"),
    "turned by a tag": image(1, exif=(lambda exif: exif.__setitem__(0x0112, 6) or exif)(Image.Exif())),
    "16-bit": image(1, "PNG", "I;16"),
}


@pytest.mark.parametrize("fault", IMAGES)
def test_images_become_what_their_name_says(tmp_path, root, fault):
    (tmp_path / "rows.json").write_bytes(rows("a.jpg", "b.png"))
    (tmp_path / "images.zip").write_bytes(zipped({"a.jpg": IMAGES[fault], "b.png": image(1, "PNG", "I;16")}))
    local = {
        "rows": [{"json": "rows.json", "images": "."}],
        "downloads": [
            {"file": "rows.json", "sources": [{"path": "rows.json"}]},
            {"file": "images.zip", "sources": [{"path": "images.zip"}], "unpack": [{"to": "."}]},
        ],
    }
    outcome = bring(own_set(tmp_path, local), root)
    assert list(outcome.repaired) == [fault if fault != "16-bit" else "PNG under .jpg"]
    with Image.open(root / "a.jpg") as made:
        assert (made.format, made.mode, made.getexif().get(0x0112)) == ("JPEG", "RGB", None)
        assert made.size == ((4, 6) if fault == "turned by a tag" else (6, 4))
    assert (root / "b.png").read_bytes() == image(1, "PNG", "I;16")
    assert bring(tmp_path / "mine.yaml", root).nothing_done


@pytest.mark.parametrize("pack", ["folder", "zip", "tar", "tar.gz"])
def test_a_set_of_ones_own_comes_from_this_disk(tmp_path, root, pack):
    files = {"in/a.jpg": image(1), "in/deep/b.jpg": image(2), "in/c.jpg": image(3)}
    (tmp_path / "mine.jsonl").write_text(
        "\n".join(json.dumps(row) for row in json.loads(rows("a.jpg", None, "deep/b.jpg")))
    )
    if pack == "folder":
        for name, content in files.items():
            (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pack" / name).write_bytes(content)
    else:
        content = zipped(files) if pack == "zip" else tarred(files, "w:gz" if pack == "tar.gz" else "w")
        (tmp_path / "pack").write_bytes(content)
    description = {
        "rows": [{"json": "mine/rows.jsonl", "images": "mine/images"}],
        "downloads": [
            {"file": "mine/rows.jsonl", "sources": [{"path": "mine.jsonl"}]},
            {"file": "pack", "sources": [{"path": "pack"}], "unpack": [{"inside": "in", "to": "mine/images"}]},
        ],
    }
    file = own_set(tmp_path, description)
    bring(file, root)
    assert tree(root) == {"mine/rows.jsonl", "mine/images/a.jpg", "mine/images/deep/b.jpg"}
    assert bring(file, root).nothing_done
    (tmp_path / "mine.jsonl").write_bytes(json.dumps(json.loads(rows("c.jpg"))[0]).encode())
    assert bring(file, root).fetched == ["mine/rows.jsonl"] and "mine/images/c.jpg" in tree(root)


def two_images(folder: Path, source: dict) -> Path:
    unpack = [{"to": "mine"}]
    downloads = [
        {"file": "rows.json", "sources": [{"path": "rows.json"}]},
        {"file": "pack", "sources": [source], "unpack": unpack},
    ]
    return own_set(folder, {"rows": [{"json": "rows.json", "images": "mine"}], "downloads": downloads})


@pytest.mark.parametrize("pack", ["folder", "zip"])
def test_images_of_an_archive_of_ones_own_that_was_made_again_are_replaced(tmp_path, root, pack):
    def make(first: int, *names: str) -> None:
        (tmp_path / "rows.json").write_bytes(rows(*names))
        files = {name: image(first + number) for number, name in enumerate(names)}
        if pack == "zip":
            (tmp_path / "pack").write_bytes(zipped(files))
            return
        (tmp_path / "pack").mkdir(exist_ok=True)
        for name, content in files.items():
            (tmp_path / "pack" / name).write_bytes(content)

    make(1, "a.jpg", "b.jpg")
    file = two_images(tmp_path, {"path": "pack"})
    bring(file, root)
    make(101, "a.jpg", "b.jpg")
    assert bring(file, root).unpacked == 2 and (root / "mine/a.jpg").read_bytes() == image(101)
    make(201, "a.jpg", "b.jpg", "c.jpg")
    assert bring(file, root).unpacked == 3 and (root / "mine/b.jpg").read_bytes() == image(202)
    assert bring(file, root).nothing_done


def test_a_changed_archive_removes_no_download(tmp_path, root):
    (tmp_path / "rows.json").write_bytes(rows("a.jpg"))
    (tmp_path / "pack").write_bytes(zipped({"mine/a.jpg": image(1)}))
    file = two_images(tmp_path, {"path": "pack"})
    file.write_text(file.read_text().replace("to: mine", "to: ''"))
    bring(file, root)
    (root / "archives").mkdir()
    (root / "archives/other.zip").write_bytes(b"another set's")
    (tmp_path / "pack").write_bytes(zipped({"mine/a.jpg": image(2), "archives/other.zip": b""}))
    with pytest.raises(DataError, match=r"'archives/other\.zip' is reserved for downloads"):
        bring(file, root)
    assert (root / "archives/other.zip").read_bytes() == b"another set's" and (root / "mine/a.jpg").is_file()


def test_what_came_from_a_source_that_a_set_no_longer_names_is_not_taken_for_its_file(shelf, tmp_path, root):
    (tmp_path / "rows.json").write_bytes(rows("a.jpg"))
    first, second = (shelf.put(f"/{number}.zip", zipped({"a.jpg": image(number)})) for number in (1, 2))
    bring(two_images(tmp_path, {"url": first}), root)
    with pytest.raises(DataError, match=r"pack: prepared from http://.*/1.zip, but .* now names http://.*/2.zip"):
        bring(two_images(tmp_path, {"url": second}), root)
    file = two_images(tmp_path, {"url": second})
    file.write_text(file.read_text().replace("- url: ", f"- url: {first}\n  - url: ", 1))
    assert bring(file, root).nothing_done, "a mirror"


def test_another_revision_is_another_source(shelf, tmp_path, root):
    (tmp_path / "rows.json").write_bytes(rows("a.jpg"))
    shelf.put(HUB.format("me/mine") + "pack", zipped({"a.jpg": image(1)}))
    source = {"hub": "me/mine", "path": "pack"}
    bring(two_images(tmp_path, source), root)
    with pytest.raises(DataError, match=r"prepared from hub:me/mine/pack, but .* now names hub:me/mine@v2/pack"):
        bring(two_images(tmp_path, {**source, "revision": "v2"}), root)


def test_images_of_ones_own_that_are_in_their_place_are_kept_when_one_is_added(tmp_path):
    (tmp_path / "rows.json").write_bytes(rows("a.jpg", "b.jpg"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jpg").write_bytes(image(1))
    file = two_images(tmp_path, {"path": "mine"})
    assert bring(file, tmp_path).absent == ["mine/b.jpg"]
    (tmp_path / "mine/b.jpg").write_bytes(image(2))
    assert bring(file, tmp_path).nothing_done
    assert [(tmp_path / f"mine/{name}.jpg").read_bytes() for name in "ab"] == [image(1), image(2)]


def test_images_of_a_changed_archive_that_is_trusted_are_all_of_its_new_state(shelf, tmp_path, root):
    file = two_images(tmp_path, {"url": shelf.put("/pack", zipped({"a.jpg": image(1), "b.jpg": image(2)}))})
    (tmp_path / "rows.json").write_bytes(rows("a.jpg", "b.jpg"))
    bring(file, root, drop_archives=True)
    shelf.put("/pack", zipped({"a.jpg": image(101), "b.jpg": image(102)}))
    (root / "mine/a.jpg").unlink()
    with pytest.raises(DataError, match=r"has changed\. To trust the new one, remove its entry"):
        bring(file, root)
    lock = root / "visper-data.lock.json"
    content = json.loads(lock.read_text())
    del content["files"]["pack"]
    lock.write_text(json.dumps(content))
    assert bring(file, root).unpacked == 2
    assert [(root / f"mine/{name}.jpg").read_bytes() for name in "ab"] == [image(101), image(102)]


def test_rows_may_lie_in_the_archive_of_the_images(tmp_path, root):
    (tmp_path / "all.zip").write_bytes(
        zipped({"rows.json": rows("images/a.jpg"), "images/a.jpg": image(1), "images/b.jpg": b""})
    )
    unpack = [{"to": "m", "only": ["rows.json"]}, {"to": "m/images", "inside": "images"}]
    description = {
        "rows": [{"json": "m/rows.json", "images": "m"}],
        "downloads": [{"file": "all.zip", "sources": [{"path": "all.zip"}], "unpack": unpack}],
    }
    bring(own_set(tmp_path, description), root)
    assert tree(root) == {"m/rows.json", "m/images/a.jpg"}


def test_two_runs_at_once_take_turns(shelf, tmp_path, root):
    url = shelf.put("/images.zip", zipped({f"{n}.jpg": image(n) for n in range(20)}), server.slow(0.2, 10))
    file = own_set(tmp_path, {"downloads": [{"file": "p.zip", "sources": [{"url": url}], "unpack": [{"to": "p"}]}]})
    command = [sys.executable, "-m", "visper", "data", "prepare", str(file), "--root", str(root)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [" ".join(run.communicate(timeout=60)[0].split()) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("waiting for it to end" in text for text in said) == sum("nothing to do" in text for text in said) == 1
    assert len(tree(root)) == 20 and shelf.asked("/images.zip") == [None]


def test_what_others_write_under_the_root_is_left_alone(tmp_path, root):
    """A run keeps its tables in the same hidden folder, and shards may be written beside."""
    (root / f".shards.partial-{socket.gethostname()}-{8 * '1f'}").mkdir(parents=True)
    (root / ".visper").mkdir()
    ending = f"partial-{socket.gethostname()}-{8 * '1f'}"
    table = root / ".visper" / f".rows.json-0123.arrow.{ending}"
    table.write_bytes(b"half")
    own = [root / f".visper-data.lock.json.{ending}", root / f".visper/members/.a.zip.json.{ending}",
           root / f".visper/parts/b/.a.zip.state.json.{ending}"]  # fmt: skip
    for leftover in own:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_bytes(b"half")
    (tmp_path / "a").write_bytes(b"1")
    bring(own_set(tmp_path, {"downloads": [{"file": "a", "sources": [{"path": "a"}]}]}), root)
    assert table.is_file() and any(root.glob(".shards.*")) and not any(leftover.exists() for leftover in own)


def test_files_that_are_asked_for_again_are_replaced_once_whole(shelf, root):
    published.put_llava_665k(shelf)
    bring("llava-665k", root)
    broken = {"gqa/images/1.jpg", "ocr_vqa/images/15.jpg"}  # the second is in no archive
    (root / "gqa/images/1.jpg").write_bytes(b"broken")
    outcome = bring("llava-665k", root, again=broken)
    assert outcome.unpacked == 1 and not outcome.fetched
    assert (root / "gqa/images/1.jpg").read_bytes() == image(21)


def test_a_file_of_no_archive_can_be_asked_for_again(shelf, root, tmp_path):
    url = shelf.put("/one.jpg", image(5))
    file = own_set(tmp_path, {"downloads": [{"file": "p/one.jpg", "sources": [{"url": url}]}]})
    bring(file, root)
    (root / "p/one.jpg").write_bytes(b"x" * len(image(5)))
    assert bring(file, root).nothing_done
    assert bring(file, root, again={"p/one.jpg"}).fetched == ["p/one.jpg"]
    assert (root / "p/one.jpg").read_bytes() == image(5)


def test_the_photographs_are_a_set_of_ones_own(beside_project, tmp_path, root):
    photos = beside_project("photos", variable="VISPER_PHOTOS")
    description = {
        "rows": [{"json": "photos/instruct.json", "images": "photos"}],
        "downloads": [
            {"file": "photos/instruct.json", "sources": [{"path": str(photos / "instruct.json")}]},
            {"file": "coco", "sources": [{"path": str(photos / "coco")}], "unpack": [{"to": "photos/coco"}]},
        ],
    }
    outcome = bring(own_set(tmp_path, description), root)
    assert outcome.unpacked == 79 and not outcome.absent and not outcome.unreadable and not outcome.repaired
    assert bring(tmp_path / "mine.yaml", root).nothing_done


@pytest.mark.parametrize("body", [b"[1, 2]]", b'[{"id": "\\ud8]', b"[{]]", b'{"detail": "gone"}'])
def test_rows_that_cannot_be_read_are_fetched_afresh_by_the_next_call(shelf, root, tmp_path, body):
    url = shelf.put("/rows.json", rows(None), server.instead(body))
    described = {"rows": [{"json": "rows.json"}], "downloads": [{"file": "rows.json", "sources": [{"url": url}]}]}
    with pytest.raises(DataError):
        bring(own_set(tmp_path, described), root)
    bring(tmp_path / "mine.yaml", root)
    assert (root / "rows.json").read_bytes() == rows(None)


def test_any_error_of_one_file_leaves_the_others(shelf, root, tmp_path, monkeypatch):
    files = [{"file": name, "sources": [{"url": shelf.put(f"/{name}", b"[1]")}]} for name in ("a.json", "b.json")]

    def fails(remote, *_):
        if remote.name == "a.json":
            raise OverflowError("odd")
        return obtain(remote, *_)

    monkeypatch.setattr("visper.data.sets.prepare.obtain", fails)
    with pytest.raises(DataError, match=r"a\.json: OverflowError: odd"):
        bring(own_set(tmp_path, {"downloads": files}), root)
    assert tree(root) == {"b.json"}


def test_an_unknown_set_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'llava-665k'"):
        prepare("llava-656k", Path("nowhere"))


def digest(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
