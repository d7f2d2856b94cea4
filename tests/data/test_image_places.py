from types import SimpleNamespace

from PIL import Image

from tests.vlms import PROCESSORS
from visper.data.image_places import Shown, places_of


def test_of_several_images_a_llava_onevision_shows_each_in_the_coordinates_of_the_image_not_of_its_padding():
    images = SimpleNamespace(image_grid_pinpoints=[[8, 8]])
    onevision = SimpleNamespace(num_image_tokens=16, image_processor=images, vision_aspect_ratio="anyres_max_9")
    places = places_of(onevision, Shown((40, 20), 17, alone=False))
    seen = ~places.isnan().any(-1)
    assert seen.nonzero().flatten().tolist() == list(range(4, 12))
    assert places[seen][:, 1].tolist() == [0.25] * 4 + [0.75] * 4
    assert places[seen][:4, 0].tolist() == [0.125, 0.375, 0.625, 0.875]


def test_ovis2_which_shows_the_view_first_is_not_taken_for_internvl():
    images = SimpleNamespace(max_patches=4, min_patches=1, size={"height": 8, "width": 8})
    ovis = SimpleNamespace(image_processor=images, image_seq_length=4, image_token="<image>", image_token_id=3)
    assert places_of(ovis, Shown((16, 8), 12, alone=True)) is None


def test_an_image_of_three_lines_is_not_taken_for_one_of_three_channels() -> None:
    processor = PROCESSORS["mistral3"]()
    image = processor.tokenizer.convert_tokens_to_ids("[IMG]")
    made = processor(images=[Image.new("RGB", (64, 3))], text="[IMG]")["input_ids"]
    places = places_of(processor, Shown((64, 3), int((made == image).sum())))
    assert places.tolist() == [[0.125, 0.5], [0.375, 0.5], [0.625, 0.5], [0.875, 0.5]]
