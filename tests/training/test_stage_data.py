"""A teacher that sees what the student sees is given the same tensor; the bytes are those of its own resize."""

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.data.test_chat import CHATML, make_processor
from visper.data.chat import ConversationEncoder
from visper.data.collator import Collator
from visper.data.dataset import ConversationDataset
from visper.data.images import with_geometry
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.distillation.teachers import SquashedImage
from visper.training.stage_data import seen_by_student

TEACHERS = {"same": SquashedImage((8, 8)), "larger": SquashedImage((12, 12)), "flat": SquashedImage((8, 12))}


class Flipped(SquashedImage):
    """A teacher's own preprocessing of the student's size."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return super().__call__(image).flip(2)


@pytest.mark.parametrize("geometry", ["squash", "pad", "crop"])
def test_a_teacher_of_the_students_size_gets_the_bytes_of_its_own_resize(tmp_path, geometry):
    rows = tiny.write_rows(tmp_path, images=3, text_rows=1)
    for number, size in enumerate(((40, 23), (17, 31), (8, 8))):
        Image.effect_noise(size, 90).convert("RGB").save(rows / "images" / f"{number}.png")
    processor = make_processor(CHATML)
    processor.image_processor = with_geometry(processor.image_processor, geometry)
    records = open_records([(rows / "rows.json", rows / "images")], DropList())
    samples = list(map(ConversationDataset(records, ConversationEncoder(processor, 500)).__getitem__, range(4)))
    shared = seen_by_student(processor.image_processor, TEACHERS)
    assert shared == (frozenset() if geometry == "crop" else {"same"})
    own, batch = (Collator(0, TEACHERS, as_student=tasks)(samples) for tasks in (frozenset(), shared))
    for task, images in own["teacher_images"].items():
        assert len(images) == 3 and torch.equal(batch["teacher_images"][task], images)
        assert batch["teacher_images"][task].stride() == images.stride()
    assert (batch["teacher_images"]["same"] is batch["pixel_values"]) == (geometry != "crop")


def test_a_teacher_with_preprocessing_of_its_own_keeps_it():
    assert not seen_by_student(make_processor(CHATML).image_processor, {"flipped": Flipped((8, 8))})
