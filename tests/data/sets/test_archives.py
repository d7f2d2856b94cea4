"""No archive writes outside its folder, whatever its members' names; a refusal gives the reason."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.data.sets.published import tarred, zipped
from tests.data.sets.test_prepare import own_set
from visper.common.errors import DataError
from visper.data.sets.archives import Member, list_members, relative_path, target_paths
from visper.data.sets.prepare import prepare

OUTSIDE = [
    "../a",
    "a/../../b",
    "/etc/a",
    "C:/a",
    "C:\\a",
    "..\\a",
    "a\\..\\..\\b",
    "a/..",
    "./C:",
    "a\x00b",
    "a\nb",
    "x" * 300,
    "//host/a",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside_are_refused(name):
    with pytest.raises(DataError, match="unsafe name"):
        relative_path(name)


@pytest.mark.parametrize(
    ("name", "plain"), [("./a/b", "a/b"), ("a//b", "a/b"), ("a/./b", "a/b"), (".", ""), ("ä/..b", "ä/..b")]
)
def test_other_names_take_their_shortest_form(name, plain):
    assert relative_path(name) == plain


def unpack(folder: Path, content: bytes, **how) -> Path:
    (folder / "x.archive").write_bytes(content)
    download = {"file": "x", "sources": [{"path": "x.archive"}], "unpack": [{"to": "in/it", **how}]}
    root = folder / "deep" / "root"
    prepare(str(own_set(folder, {"downloads": [download]})), root, console=Console(quiet=True))
    return root


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", ["../../../up.txt", "/tmp/visper-up.txt", "ok/../../up.txt"])
def test_an_archive_that_leads_outside_is_refused_whole(tmp_path, pack, name):
    with pytest.raises(DataError, match="unsafe name"):
        unpack(tmp_path, pack({"fine.txt": b"x", name: b"x"}))
    assert not list(tmp_path.rglob("*up.txt")) and not list(tmp_path.rglob("fine.txt"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("a")
        entry.type, entry.linkname = kind, "/etc"
        archive.addfile(entry)
    with pytest.raises(DataError, match="'a' is a link or a device"):
        unpack(tmp_path, buffer.getvalue())


def test_a_link_in_a_zip_is_refused(tmp_path):
    entry = zipfile.ZipInfo("a")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(entry, "/etc")
    with pytest.raises(DataError, match="is a link"):
        unpack(tmp_path, buffer.getvalue())


def test_an_encrypted_zip_is_named(tmp_path):
    content = bytearray(zipped({"a": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(DataError, match="encrypted"):
        unpack(tmp_path, bytes(content))


@pytest.mark.parametrize("names", [["a/x.jpg", "b/x.jpg"], ["x.jpg", "x.jpg"]])
def test_two_members_for_one_place_are_refused(names):
    with pytest.raises(DataError, match="would both become"):
        target_paths([Member(name, 1) for name in names], "to", flat=True)


def test_a_member_that_already_has_the_extension_wins():
    found = target_paths(
        [Member("a.gif", 1), Member("a.jpg", 2), Member("a.png", 3)], "to", flat=True, extension=".jpg"
    )
    assert found == {"to/a.jpg": Member("a.jpg", 2)}


def test_a_name_that_is_file_and_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="a file and a folder"):
        unpack(tmp_path, zipped({"a": b"x", "a/b": b"y"}))


def test_a_missing_inner_archive_lists_those_there_are(tmp_path):
    with pytest.raises(DataError, match=r"does not contain 'x/val\.zip'; archives inside it: \['x/train\.zip'\]"):
        unpack(tmp_path, zipped({"x/train.zip": zipped({"a": b""})}), inner="x/val.zip")


def test_a_cut_archive_is_named(tmp_path):
    for content in (zipped({"a": b"x" * 999})[:-30], tarred({"a": b"x" * 9999}, "w:gz")[:60]):
        with pytest.raises(DataError, match=r"not a zip or tar|broken archive"):
            unpack(tmp_path, content)
    assert not list(tmp_path.rglob("in/it/*"))


PARTS = st.sampled_from(
    ["..", ".", "", "a", "b.jpg", "ä", "C:", "~", "a b", "*", "-", "…", "con", "\\", "A" * 260, " ", "..a"]
)
NAMES = st.one_of(
    st.lists(PARTS, min_size=1, max_size=4).map("/".join),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12),
)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True), flat=st.booleans(), tar=st.booleans())
def test_no_name_whatsoever_writes_outside(tmp_path_factory, names, flat, tar):
    folder = tmp_path_factory.mktemp("any")
    files = {name: name.encode(errors="replace") for name in names}
    try:
        content = tarred(files) if tar else zipped(files)
    except (UnicodeError, ValueError, IndexError):
        return  # not even an archive can be made of these
    before = set(folder.rglob("*")) | {folder / "x.archive", folder / "mine.yaml", folder / "deep"}
    try:
        root = unpack(folder, content, flat=flat)
    except DataError:
        root = folder / "deep" / "root"
    target = root / "in" / "it"
    made = {file for file in folder.rglob("*") if file.is_file() and file not in before and ".visper" not in file.parts}
    assert all(target in file.parents or file.name == "visper-data.lock.json" for file in made)
    assert all(not file.is_symlink() for file in folder.rglob("*"))


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=30) | st.lists(PARTS, max_size=5).map("/".join))
def test_a_relative_path_stays_inside_and_is_its_own_relative_path(name):
    try:
        plain = relative_path(name)
    except DataError:
        return
    assert relative_path(plain) == plain and ".." not in Path(plain).parts and not Path(plain).is_absolute()


def test_members_of_an_inner_archive_are_listed_with_it(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped({"a": b"1", "i.zip": zipped({"b": b"22"})}))
    assert Member("b", 2, "i.zip") in list_members(tmp_path / "x.zip", ["i.zip"])
