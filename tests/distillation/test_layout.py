import pytest
import torch

from visper.distillation import TokenLayout

IMAGE, DEPTH, SEG = 9, [20, 21], [30]
#        system  image          depth   seg text
FULL = [1, 2, IMAGE, IMAGE, IMAGE, 20, 21, 30, 5, 6]


def layout(rows, mask=None):
    ids = torch.tensor(rows)
    return TokenLayout.from_ids(ids, mask if mask is None else torch.tensor(mask), IMAGE, {"depth": DEPTH, "seg": SEG})


def read(places, row=0):
    mask = torch.ones_like(places.index, dtype=torch.bool) if places.mask is None else places.mask
    return places.index[row][mask[row]].tolist()


def test_maps_come_from_the_ids():
    found = layout([FULL])
    assert found.image.nonzero()[:, 1].tolist() == [2, 3, 4]
    assert found.tasks["depth"].nonzero()[:, 1].tolist() == [5, 6]
    assert found.tasks["seg"].nonzero()[:, 1].tolist() == [7]


def test_keys_leave_out_other_tasks_tokens():
    found = layout([FULL])
    assert read(found.keys("depth")) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert read(found.keys("seg")) == [0, 1, 2, 3, 4, 7, 8, 9]


def test_a_sequence_is_all_of_a_row_but_its_padding():
    short = [1, IMAGE, 20, 21, 30, 5, 0, 0, 0, 0]
    found = layout([FULL, short], [[1] * 10, [1] * 6 + [0] * 4])
    assert read(found.sequence(), 0) == list(range(10))
    assert read(found.sequence(), 1) == list(range(6))


def test_keys_without_text_end_with_the_task_tokens():
    found = layout([FULL])
    assert read(found.keys("depth", text=False)) == [0, 1, 2, 3, 4, 5, 6]


def test_text_before_the_image_is_read_even_without_text():
    found = layout([[1, 5, 6, IMAGE, 20, 21, 30, 7]])
    assert read(found.keys("depth", text=False)) == [0, 1, 2, 3, 4, 5]


def test_keys_leave_out_padding_and_take_image_spans_of_any_length():
    """FAULT of the published code: positions are constants, and padding is read."""
    short = [1, IMAGE, 20, 21, 30, 5, 0, 0, 0, 0]
    found = layout([FULL, short], [[1] * 10, [1] * 6 + [0] * 4])
    places = found.keys("depth")
    assert read(places, 0) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert read(places, 1) == [0, 1, 2, 3, 5]


def test_left_padding_is_left_out_too():
    found = layout([[0, 0, 1, IMAGE, 20, 21, 30, 5]], [[0, 0, 1, 1, 1, 1, 1, 1]])
    assert read(found.keys("seg")) == [2, 3, 6, 7]


def test_rows_of_one_length_need_no_mask():
    assert layout([FULL, FULL]).keys("depth").mask is None


def test_only_the_asked_rows_are_read():
    text_only = [1, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    assert layout([text_only, FULL]).keys("seg").index.shape == (1, 8)


def test_a_row_without_its_task_tokens_is_named():
    truncated = [1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE]
    with pytest.raises(ValueError, match=r"rows \[1\] have an image but none of the task tokens of 'depth'"):
        layout([FULL, truncated]).own_tokens("depth")
    with pytest.raises(ValueError, match="task 'normals' has no task tokens, only"):
        layout([FULL]).own_tokens("normals")


#          image 1         d   d   seg text image 2       d   d   seg text
SEVERAL = [IMAGE, IMAGE, 20, 21, 30, 5, IMAGE, IMAGE, 20, 21, 30, 6]


def of_images(rows, image_rows, **more):
    ids = torch.tensor(rows)
    return TokenLayout.from_ids(ids, None, IMAGE, {"depth": DEPTH, "seg": SEG}, torch.tensor(image_rows), **more)


def test_each_image_of_a_row_has_its_own_tokens_and_the_rows_text():
    found = of_images([SEVERAL], [0, 0])
    places = found.keys("depth")
    assert read(places, 0) == [0, 1, 2, 3, 5, 11] and read(places, 1) == [5, 6, 7, 8, 9, 11]
    assert found.own_tokens("seg").nonzero().tolist() == [[0, 4], [1, 10]]
    assert read(found.image_positions(), 1) == [6, 7]


def test_keys_without_text_end_with_each_images_own_block():
    places = of_images([SEVERAL], [0, 0]).keys("depth", text=False)
    assert read(places, 0) == [0, 1, 2, 3] and read(places, 1) == [5, 6, 7, 8, 9]


def test_images_side_by_side_need_their_counts():
    row = [1, IMAGE, IMAGE, IMAGE, 5]
    with pytest.raises(ValueError, match="2 images but 1 contiguous runs of image tokens: give 'image_tokens'"):
        of_images([row], [0, 0])
    found = of_images([row], [0, 0], image_tokens=torch.tensor([1, 2]))
    assert [read(found.image_positions(), i) for i in (0, 1)] == [[1], [2, 3]]


def test_counts_that_do_not_match_the_ids_are_refused():
    with pytest.raises(ValueError, match=r"are \[2, 1\], but these rows have \[4, 4\] image tokens"):
        of_images([SEVERAL], [0, 0], image_tokens=torch.tensor([2, 1]))


def test_samples_of_a_packed_row_do_not_read_each_other():
    row = [1, IMAGE, 20, 21, 30, 5, 1, 6, 6, 1, IMAGE, 20, 21, 30, 7]
    samples = torch.tensor([[0] * 6 + [1] * 3 + [2] * 6])
    found = of_images([row], [0, 0], samples=samples)
    places = found.keys("depth")
    assert read(places, 0) == [0, 1, 2, 3, 5] and read(places, 1) == [9, 10, 11, 12, 14]


def test_rows_left_out_are_not_read():
    found = of_images([FULL, FULL], [1])
    assert found.keys("depth").rows.tolist() == [1] and found.own_tokens("depth").shape == (1, 10)
