"""The catalog's own entries, pointed at a server of this machine: small archives in every published layout."""

import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

from visper.data.sets import catalog as sets

HUB = "/datasets/{}/resolve/main/"


def image(number: int, form: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """A small image of its own color."""
    buffer = io.BytesIO()
    color = {"RGB": (number % 256, 90, 10), "L": number % 256, "P": number % 256, "CMYK": (9, 9, 9, 9), "I;16": 999}[
        mode
    ]
    Image.new(mode, (6, 4), color).save(buffer, form, **options)
    return buffer.getvalue()


def zipped(files: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def rows(*images: str | None) -> bytes:
    """Conversations as published: text rows have a 'model' key, ids are strings and ints and repeat."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    texts = {"id": "wgByO4Y_0", "model": "", "conversations": talk}
    with_images = [
        {"id": n % 2 or "1", "image": image, "conversations": talk} if image else texts
        for n, image in enumerate(images)
    ]
    return json.dumps(with_images).encode()


def use_server(shelf, folder: Path, monkeypatch) -> None:
    """The shipped catalog with its servers replaced; hashes and sizes of the real files taken out."""
    folder.mkdir()
    for file in sets._shipped().glob("*.yaml"):
        text = re.sub(r"https?://([^\"'\s}]+)", lambda found: f"{shelf.address}/{found[1]}", file.read_text())
        text = "".join(line for line in text.splitlines(True) if not re.match(r"\s+(md5|sha256|size): ", line))
        (folder / file.name).write_text(text)
    monkeypatch.setattr(sets, "_shipped", lambda: folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", shelf.address)
    template = shelf.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


COCO = "/images.cocodataset.org"
VG = "/cs.stanford.edu/people/rak248/VG_100K_2"
OCR = {
    "zip with a folder": (HUB.format("weizhiwang/llava_v15_instruction_images") + "ocr_vqa_images_llava_v15.zip",
                          "images/", zipped),
    "zip without": (HUB.format("qnguyen3/ocr_vqa") + "ocr_vqa.zip", "", zipped),
    "tar with two": (HUB.format("ej2/llava-ocr-vqa") + "ocr_vqa.tar", "ocr_vqa/images/", tarred),
}  # fmt: skip
OCR_FILES = {
    "10.jpg": image(10),
    "11.jpg": image(11, "GIF", "P"),  # GIF bytes under .jpg, as one mirror has them
    "12.gif": image(12, "GIF", "P"),  # the loader's own extension, as another has them
    "13.png": image(13, "PNG"),
    "14.jpg": b"\x00 corrupt \x00",
    "99.jpg": image(99),
}
MIX = (
    "coco/train2017/000000000001.jpg",
    None,
    "coco/train2017/000000000002.jpg",
    "gqa/images/1.jpg",
    "ocr_vqa/images/10.jpg",
    "ocr_vqa/images/11.jpg",
    "ocr_vqa/images/12.jpg",
    "ocr_vqa/images/13.jpg",
    "ocr_vqa/images/14.jpg",
    "ocr_vqa/images/15.jpg",  # in no archive, as 355 of the real ones
    "textvqa/train_images/0a.jpg",
    "vg/VG_100K/1.jpg",
    "vg/VG_100K_2/2.jpg",
    "coco/train2017/000000000001.jpg",
)


def put_llava_665k(shelf, ocr: str = "zip with a folder") -> None:
    """LLaVA-665K's rows and the archives of its five image sets, each with files that no row names."""
    shelf.put(HUB.format("liuhaotian/LLaVA-Instruct-150K") + "llava_v1_5_mix665k.json", rows(*MIX))
    coco = {f"train2017/{n:012}.jpg": image(n) for n in (1, 2, 3)}
    shelf.put(COCO + "/zips/train2017.zip", zipped({"train2017/": b"", **coco}))
    shelf.put(
        "/downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        zipped({f"images/{n}.jpg": image(20 + n) for n in (1, 2)}),
    )
    text = {"train_images/0a.jpg": image(31), "train_images/0b.jpg": image(32)}
    shelf.put("/dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", zipped(text))
    shelf.put(VG + "/images.zip", zipped({"VG_100K/1.jpg": image(41), "VG_100K/9.jpg": image(42)}))
    shelf.put(VG + "/images2.zip", zipped({"VG_100K_2/2.jpg": image(43), "VG_100K_2/3.jpg": b""}))  # empty, as 170 are
    path, folder, pack = OCR[ocr]
    shelf.put(path, pack({folder + name: content for name, content in OCR_FILES.items()}))


def put_others(shelf, chunks: bool = True) -> None:
    """Every other entry of the catalog."""
    pretrain = HUB.format("liuhaotian/LLaVA-Pretrain")
    shelf.put(pretrain + "blip_laion_cc_sbu_558k.json", rows("00453/004539375.jpg", "00659/1.jpg"))
    shelf.put(
        pretrain + "images.zip",
        zipped({"00453/004539375.jpg": image(1), "00659/1.jpg": image(2), "00000/0.jpg": image(3)}),
    )
    allava = HUB.format("FreedomIntelligence/ALLaVA-4V")
    names = [f"allava_laion/images/{n}.jpeg" for n in (1, 2)]
    shelf.put(allava + "allava_laion/ALLaVA-Caption-LAION-4V.json", rows(*names))
    vflan = [f"allava_vflan/images/images_191task_1k/{n}.jpg" for n in ("a+b", "c d")]
    shelf.put(allava + "allava_vflan/ALLaVA-Caption-VFLAN-4V.json", rows(*vflan, vflan[0]))
    if chunks:
        for n in (1, 2, 3):
            shelf.put(
                allava + f"allava_laion/image_chunks/images_{n}.zip",
                zipped({f"chunk_{n}/deep/{n}.jpeg": image(50 + n)}),
            )
    else:
        shelf.put(allava + "allava_laion/images.zip", zipped({f"images/{n}.jpeg": image(50 + n) for n in (1, 2, 3)}))
    images = {
        "images_191task_1k/a+b.jpg": image(61),
        "images_191task_1k/c d.jpg": image(62),
        "__MACOSX/x.jpg": b"x",
    }
    shelf.put(HUB.format("Vision-Flan/vision-flan_191-task_1k") + "image_191-task_1k.zip", zipped(images))
    for repository, file in (
        ("nyu-visionx/CV-Bench", "test_2d"),
        ("nyu-visionx/CV-Bench", "test_3d"),
        ("Lin-Chen/MMStar", "mmstar"),
        ("xai-org/RealworldQA", "data/test-0"),
    ):
        shelf.put(HUB.format(repository) + f"{file}.parquet", b"PAR1" + file.encode() + b"PAR1")
    shelf.put(HUB.format("nyu-visionx/CV-Bench") + "README.md", b"not asked for")
    okvqa = "/okvqa.allenai.org/static/data/"
    for name in ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"):
        shelf.put(f"{okvqa}{name}.zip", zipped({name: b"{}"}))
    shelf.put(COCO + "/zips/val2014.zip", zipped({"val2014/COCO_val2014_000000000001.jpg": image(71)}))
    shelf.put(COCO + "/zips/val2017.zip", zipped({"val2017/000000000139.jpg": image(72)}))
    notes = {
        f"annotations/{kind}_{part}2017.json": b"{}" for kind in ("captions", "instances") for part in ("train", "val")
    }
    shelf.put(COCO + "/annotations/annotations_trainval2017.zip", zipped(notes))
    maps = zipped(
        {"panoptic_val2017/": b"", "panoptic_val2017/000000000139.png": image(73, "PNG"), "__MACOSX/._a": b"x"}
    )
    panoptic = {"annotations/panoptic_val2017.json": b"{}", "annotations/panoptic_train2017.json": b"{}",
                "annotations/panoptic_val2017.zip": maps, "annotations/panoptic_train2017.zip": b""}  # fmt: skip
    shelf.put(COCO + "/annotations/panoptic_annotations_trainval2017.zip", zipped(panoptic))
    shelf.put(
        HUB.format("depth-anything/DA-2K") + "DA-2K.zip",
        zipped({"DA-2K/annotations.json": b"{}", "DA-2K/images/a.jpg": image(81)}),
    )
