"""Results of file checks are kept until the file changes."""

import pytest

from visper.data.checks.kept import of_files


def test_a_file_is_looked_at_once_and_again_when_it_has_changed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    seen = []

    def look(paths):
        for path in paths:
            seen.append(path[-1])
            yield [len(seen)]

    places, kept = [(tmp_path, name) for name in ("a", "b", "gone")], tmp_path / "kept.jsonl"
    assert list(of_files(places, kept, look)[0].values()) == [[1], [2], [3]]
    (tmp_path / "b").write_text("changed")
    found, outside = of_files(places, kept, look)
    assert seen == ["a", "b", "e", "b", "e"], "of a file that is not there nothing is kept"
    assert found[str(tmp_path / "a")] == [1] and not outside


def test_an_interrupted_look_goes_on_where_it_stopped(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)

    def stops(paths):
        yield ["first"]
        raise KeyboardInterrupt

    places, kept = [(tmp_path, name) for name in ("a", "b")], tmp_path / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        of_files(places, kept, stops)
    with kept.open("a") as lines:
        lines.write('["half a li')
    found, _ = of_files(places, kept, lambda paths: (["second"] for _ in paths))
    assert list(found.values()) == [["first"], ["second"]]


def test_a_file_outside_its_folder_is_not_looked_at(tmp_path):
    (tmp_path / "secret").write_text("")
    place = (tmp_path / "images", "../secret")
    found, outside = of_files([place], tmp_path / "kept.jsonl", lambda paths: pytest.fail("looked at"))
    assert not found and list(outside) == [str(tmp_path / "images" / "../secret")]
