"""Scenes are deterministic, and image, depth, segmentation and objects tell one story."""

import numpy as np
import pytest

from tools.quickstart_bases.patches import patch_labels
from visper.quickstart.scenes import CLASSES, FAR, GRID, MIN_VISIBLE_PIXELS, NEAR, SHAPES, SIZE, Scene, draw_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(7, index) for index in range(30)]


def test_the_same_seed_draws_the_same_bits() -> None:
    one, two, other = draw_scene(3, 5), draw_scene(3, 5), draw_scene(4, 5)
    assert np.array_equal(one.image, two.image) and np.array_equal(one.depth, two.depth) and one.objects == two.objects
    assert not np.array_equal(one.image, other.image)


def test_maps_have_the_images_size_and_legal_values(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.depth.min() >= NEAR and scene.depth.max() <= FAR
        assert scene.classes.max() < len(CLASSES) and scene.instances.max() == len(scene.objects)


def test_the_sky_is_far_and_above_all_ground(scenes: list[Scene]) -> None:
    for scene in scenes:
        sky = scene.classes == CLASSES.index("sky")
        assert (scene.depth[sky] == FAR).all()


def test_each_objects_pixels_are_of_its_class_and_near_its_depth(scenes: list[Scene]) -> None:
    for scene in scenes:
        for index, thing in enumerate(scene.objects):
            mask = scene.instances == index + 1
            assert mask.sum() == thing.pixels >= MIN_VISIBLE_PIXELS
            assert (scene.classes[mask] == CLASSES.index(thing.shape)).all()
            seen = scene.depth[mask]
            # One sees the front half: the surface is nearer than the center, by at most the object's size.
            assert 0.6 * thing.depth < seen.mean() < 1.02 * thing.depth
            rows, columns = np.nonzero(mask)
            assert (columns.mean(), rows.mean()) == pytest.approx((thing.column, thing.row))


def test_every_object_has_its_own_color_and_its_own_patch(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 2 <= len(scene.objects) <= 6
        assert len({o.color for o in scene.objects}) == len({o.place for o in scene.objects}) == len(scene.objects)
        assert {o.shape for o in scene.objects} <= set(SHAPES)


def test_patch_labels_mark_each_objects_center(scenes: list[Scene]) -> None:
    for scene in scenes:
        labels = patch_labels(scene)
        marked = {(int(p) % GRID, int(p) // GRID) for p in np.nonzero(labels.center)[0]}
        assert marked == {o.place for o in scene.objects}


def test_brightness_does_not_tell_the_depth(scenes: list[Scene]) -> None:
    things = [o for scene in scenes for o in scene.objects]
    correlation = np.corrcoef([o.brightness for o in things], [o.depth for o in things])[0, 1]
    # 130 objects: the standard error of no correlation is 0.09.
    assert abs(correlation) < 0.3
