"""What a recipe names as "module:name" is imported, or the error says what to change."""

from collections import OrderedDict
from pathlib import Path

import pytest

from visper.common.errors import ConfigError
from visper.common.importing import import_named
from visper.config import Head
from visper.distillation.heads import build_head
from visper.distillation.losses import loss_named
from visper.distillation.teachers import TargetSpec, build_teacher

ABSENT = r"no module 'nowhere': it must be importable, so install it, .* on PYTHONPATH"


def test_a_class_is_imported_by_its_place() -> None:
    assert import_named("collections:OrderedDict") is OrderedDict


@pytest.mark.parametrize("place", ["nowhere:Mine", "nowhere.at.all:Mine", "collections.nowhere:Mine"])
def test_a_module_that_is_not_there_is_said_to_need_the_path(place: str) -> None:
    with pytest.raises(ConfigError, match=rf"no module '{place.split(':')[0]}': .*PYTHONPATH"):
        import_named(place)


def test_a_misspelled_name_is_corrected() -> None:
    with pytest.raises(ConfigError, match=r"module 'collections' has no 'OrderdDict': did you mean 'OrderedDict'\?"):
        import_named("collections:OrderdDict")


def test_what_a_module_itself_lacks_is_not_taken_for_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_needing.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        import_named("mine_needing:Head")
    with pytest.raises(
        ConfigError, match="head 'mine_needing:Head' cannot be loaded: No module named 'nowhere_at_all'"
    ):
        build_head(Head(kind="mine_needing:Head"), 4, TargetSpec(1, 4))


def test_teachers_heads_and_losses_of_ones_own_say_so() -> None:
    with pytest.raises(ConfigError, match=ABSENT):
        build_teacher("nowhere:Teacher", "model")
    with pytest.raises(ConfigError, match=f"head 'nowhere:Head' cannot be loaded: {ABSENT}"):
        build_head(Head(kind="nowhere:Head"), 4, TargetSpec(1, 4))
    with pytest.raises(ConfigError, match=f"loss 'nowhere:loss' cannot be loaded: {ABSENT}"):
        loss_named("nowhere:loss")
    with pytest.raises(ConfigError, match="loss 'math:pi' is no function"):
        loss_named("math:pi")
