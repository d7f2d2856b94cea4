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
    found, rows = layout([FULL]), torch.tensor([0])
    assert read(found.keys("depth", rows)) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert read(found.keys("seg", rows)) == [0, 1, 2, 3, 4, 7, 8, 9]


def test_keys_without_text_end_with_the_task_tokens():
    found, rows = layout([FULL]), torch.tensor([0])
    assert read(found.keys("depth", rows, text=False)) == [0, 1, 2, 3, 4, 5, 6]


def test_text_before_the_image_is_read_even_without_text():
    found = layout([[1, 5, 6, IMAGE, 20, 21, 30, 7]])
    assert read(found.keys("depth", torch.tensor([0]), text=False)) == [0, 1, 2, 3, 4, 5]


def test_keys_leave_out_padding_and_take_image_spans_of_any_length():
    """FAULT of the published code: positions are constants, and padding is read."""
    short = [1, IMAGE, 20, 21, 30, 5, 0, 0, 0, 0]
    found = layout([FULL, short], [[1] * 10, [1] * 6 + [0] * 4])
    places = found.keys("depth", torch.tensor([0, 1]))
    assert read(places, 0) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert read(places, 1) == [0, 1, 2, 3, 5]


def test_left_padding_is_left_out_too():
    found = layout([[0, 0, 1, IMAGE, 20, 21, 30, 5]], [[0, 0, 1, 1, 1, 1, 1, 1]])
    assert read(found.keys("seg", torch.tensor([0]))) == [2, 3, 6, 7]


def test_rows_of_one_length_need_no_mask():
    assert layout([FULL, FULL]).keys("depth", torch.tensor([0, 1])).mask is None


def test_only_the_asked_rows_are_read():
    text_only = [1, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    assert layout([text_only, FULL]).keys("seg", torch.tensor([1])).index.shape == (1, 8)


def test_a_row_without_its_task_tokens_is_named():
    truncated = [1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE]
    with pytest.raises(ValueError, match=r"rows \[1\] have an image but none of the task tokens of 'depth'"):
        layout([FULL, truncated]).own_tokens("depth", torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="task 'normals' has no task tokens, only"):
        layout([FULL]).own_tokens("normals", torch.tensor([0]))
