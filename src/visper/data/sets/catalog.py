"""Descriptions of data sets: where files come from, what they contain, where each belongs under the root.

The catalog is a folder of YAML files (``catalogue/``); a user's own set is another such file. This module does not
use the network: ``prepare`` downloads what the files describe, and ``row_files`` tells a run where its rows are.
"""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PositiveInt, ValidationError, model_validator

from visper.common.cache import identity
from visper.common.errors import ConfigError, DataError
from visper.config import Data, Source, explain
from visper.config.load import read_mapping
from visper.config.section import Section
from visper.data.rows.json_rows import is_json_name
from visper.data.sets.archives import relative_path
from visper.data.sets.lockfile import LOCKFILE, Lockfile

ARCHIVES = "archives"
"""Folder under the root for archives until they are deleted; an archive that a user puts there is used."""


def _relative(path: str) -> str:
    try:
        return relative_path(path)
    except DataError as error:
        raise ValueError(f"expected a path inside the root: {error.detail}") from error


def _file_or_folder(path: str) -> str:
    return _relative(path) + ("/" if path.endswith("/") else "")


def _with_unit(size: Any) -> Any:
    if not isinstance(size, str) or not size.strip().endswith(("B", "b")):
        raise ValueError("expected a size such as '18 GB'")
    return size


Inside = Annotated[str, AfterValidator(_relative)]


class Origin(Section):
    """One source of a file: ``url``, ``hub`` + ``path``, or a local ``path`` (relative to the YAML file).

    On the hub, ``path`` may be a pattern: if the download's ``file`` is a folder, all matching files are taken.
    ``sha256`` applies to this origin only.
    """

    url: str | None = Field(None, pattern="^https?://")
    hub: str | None = Field(None, description="dataset on the Hugging Face hub, owner/name")
    path: str | None = None
    revision: str = "main"
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one_way(self) -> Origin:
        given = (self.url is not None, self.hub is not None, self.path is not None)
        if given not in ((True, False, False), (False, True, True), (False, False, True)):
            raise ValueError("give 'url', or 'hub' and 'path', or a local 'path'")
        return self

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return self.url is None and self.hub is None

    @property
    def repository(self) -> str:
        """The hub's repository, with its revision unless that is the newest."""
        return str(self.hub) + ("" if self.revision == "main" else f"@{self.revision}")


class Unpack(Section):
    """A rule for unpacking: which members of an archive go where."""

    to: Inside = Field(description="target folder under the root")
    inside: Inside = Field("", description="folder of the archive whose content goes to 'to'")
    flat: bool = Field(False, description="drop the members' folders")
    only: tuple[str, ...] = Field((), description="patterns; members to unpack even if no row names them")
    extension: str | None = Field(None, pattern=r"^\.\w+$", description="extension given to every member")
    inner: str | None = Field(None, description="an archive inside the archive, whose members are unpacked")

    @property
    def targets(self) -> list[str]:
        """The files that it creates if their names are known, else the folder."""
        if self.only and not any(sign in pattern for pattern in self.only for sign in "*?["):
            return [f"{self.to}/{name}" if self.to else name for name in self.only]
        return [self.to]


class Download(Section):
    """One file, or several in a folder (``file`` ends with '/'), put under the root, or in ``archives/`` to unpack."""

    file: Annotated[str, AfterValidator(_file_or_folder)]
    sources: tuple[Origin, ...] = Field(min_length=1, description="tried in order")
    size: Annotated[ByteSize, BeforeValidator(_with_unit)] | None = Field(
        None, description="approximate, for lists and checks"
    )
    exact_bytes: PositiveInt | None = Field(None, alias="bytes", description="published size")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    md5: str | None = Field(None, pattern="^[0-9a-f]{32}$")
    unpack: tuple[Unpack, ...] = ()

    def name_of(self, address: str) -> str:
        """The name of one of its files: ``file``, or if that is a folder, a name from the last part of the address.

        Raises:
            DataError: that part is not the name of a file.
        """
        if not self.file.endswith("/"):
            return self.file
        last = relative_path(posixpath.basename(address.partition("?")[0]))
        if not last:
            raise DataError("unsafe name", f"{address[:200]!r} does not end with the name of a file")
        return self.file + last

    @property
    def labels(self) -> list[str]:
        """The sources as shown to users."""
        return [
            origin.url or (f"hub:{origin.repository}/{origin.path}" if origin.hub else str(origin.path))
            for origin in self.sources
        ]

    @property
    def estimate(self) -> int | None:
        """The size in bytes, exact or approximate; None if unknown."""
        return self.exact_bytes or self.size

    def place(self, root: Path, name: str) -> Path:
        """The path of one of its files."""
        return root / ARCHIVES / name if self.unpack else root / name


class Rows(Section):
    """A conversation file and its images folder, both under the root."""

    json_file: Inside = Field(alias="json")
    images: Inside = "."


class DataSet(Section):
    """One entry of the catalog."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    use: str = Field(description="stage, evaluation or probing")
    license: str
    notes: str | None = None
    needs: tuple[str, ...] = Field((), description="sets whose files this one shares")
    rows: tuple[Rows, ...] = ()
    needed_by: dict[str, int] = Field(default_factory=dict, description="set -> number of its rows that use this one")
    downloads: tuple[Download, ...] = ()


def set_names() -> list[str]:
    """The names of the catalog's sets."""
    return sorted(file.stem for file in _shipped().glob("*.yaml"))


def read_set(name: str) -> tuple[DataSet, Path]:
    """A set of the catalog or of a YAML file, and the folder that its local paths are relative to.

    Raises:
        ConfigError: the set does not exist, or its description is wrong; lists every fault with file and key.
    """
    shipped = _shipped() / f"{name}.yaml"
    file = shipped if shipped.is_file() else Path(name)
    if file.is_dir():
        rows = sorted(path.name for path in file.iterdir() if is_json_name(path.name))
        hint = f"; to check rows, name their file, such as '{file / rows[0]}'" if rows else ""
        raise ConfigError(f"'{name}' is a folder: expected the name of a data set, or its YAML file{hint}")
    if not file.is_file():
        near = difflib.get_close_matches(name, set_names(), n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"no data set '{name}': neither in the catalog nor a YAML file{hint} "
                          "`visper data list` shows them")  # fmt: skip
    content = read_mapping(file)
    try:
        return DataSet.model_validate(content), file.parent
    except ValidationError as error:
        raise ConfigError(explain(error, str(file), DataSet, content)) from error


def with_needs(name: str) -> list[tuple[DataSet, Path]]:
    """A set and all sets that it needs, each once, the set itself first."""
    found: dict[str, tuple[DataSet, Path]] = {}
    open_names = [name]
    while open_names:
        data_set, folder = read_set(open_names.pop(0))
        if data_set.name not in found:
            found[data_set.name] = (data_set, folder)
            open_names += data_set.needs
    return list(found.values())


def places_of(data_set: DataSet) -> list[str]:
    """The files and folders under the root of a set's own downloads and rows, each once."""
    names = [rows.json_file for rows in data_set.rows]
    for download in data_set.downloads:
        names += [target for unpack in download.unpack for target in unpack.targets] or [download.file]
    return list(dict.fromkeys(names))


def _is_there(place: Path) -> bool:
    return place.is_file() or (place.is_dir() and any(place.iterdir()))


def missing(data_set: DataSet, root: Path) -> list[str]:
    """The names of a set's own files and folders that are absent from the root, and an entry if it is half prepared.

    Only their existence is checked, so a folder assembled by hand is as good as one made by ``prepare``.
    """
    absent = [name for name in places_of(data_set) if not _is_there(root / name)]
    if not absent and data_set.name in Lockfile(root / LOCKFILE).unfinished():
        absent.append("the end of an interrupted preparation")
    return absent


@dataclass(frozen=True)
class Listed:
    """A line of ``visper data list``, as texts."""

    name: str
    use: str
    size: str
    disk: str
    state: str
    license: str
    title: str


def listing(names: Sequence[str], root: Path) -> list[Listed]:
    """The lines of ``visper data list``. Download size and largest disk use include the sets that a set needs ('+':
    some sizes are not published); the state tells what is under the root."""
    lines = []
    for name in names:
        sets = [data_set for data_set, _ in with_needs(name)]
        downloads = [download for data_set in sets for download in data_set.downloads]
        known = sum(download.estimate or 0 for download in downloads)
        # Images are not compressed further in an archive: unpacked files take its size once more.
        both = sum((download.estimate or 0) * (2 if download.unpack else 1) for download in downloads)
        more = " +" if any(download.estimate is None for download in downloads) else ""
        size, disk = (f"{total / 1e9:.1f} GB{more}" if total else "?" for total in (known, both))
        absent = [place for data_set in sets for place in missing(data_set, root)]
        places = sum(len(places_of(data_set)) for data_set in sets)
        state = "ready" if not absent else "-" if len(absent) >= places else f"no {_some(absent, 2)}"
        lines.append(Listed(name, sets[0].use, size, disk, state, sets[0].license, sets[0].title))
    return lines


def row_files(data: Data, whole: bool = True) -> list[Source]:
    """``data.sources`` in order, with each set replaced by its files.

    Args:
        whole: require a set's images, not only its rows.

    Raises:
        ConfigError: a set is unknown, has no rows to train on, or is not under ``data.root``.
        DataError: a JSON file does not exist.
    """
    found: list[Source] = []
    for source in data.sources:
        files = [] if source.data_set is None else _rows_of(source.data_set, Path(data.root), whole)
        changes = [{"data_set": None, "json_file": str(file), "images": str(images)} for file, images in files]
        found += [source.model_copy(update=change) for change in changes] or [source]
    for source in found:
        if source.kind == "json":
            identity(Path(source.place))  # it costs little and names a missing file
    return found


def _rows_of(name: str, root: Path, whole: bool = True) -> list[tuple[Path, Path]]:
    sets = [data_set for data_set, _ in with_needs(name)]
    rows = [part for data_set in sets for part in data_set.rows]
    if not rows:
        shown = "".join(f"; rows of '{other}' name its images" for other in sets[0].needed_by)
        raise ConfigError(f"data set '{name}' has no rows to train on: it is for {sets[0].use}{shown}")
    if whole:
        absent = [place for data_set in sets for place in missing(data_set, root)]
    else:
        absent = [part.json_file for part in rows if not (root / part.json_file).is_file()]
    if absent:
        raise ConfigError(
            f"data set '{name}' is not complete under '{root}': missing {_some(absent)}. "
            f"Run `visper data prepare {name} --root {root}`, or set 'data.root' to its folder"
        )
    return [(root / part.json_file, root / part.images) for part in rows]


def sources_of(name: str, images: Path | None, root: Path, whole: bool = True) -> list[tuple[Path, Path]]:
    """The conversation files of a name given on the command line, each with its images folder.

    Args:
        name: a conversation file (.json or .jsonl), a set of the catalog, or a YAML file like its entries.
        images: images folder of a conversation file; must be None for a set.
        root: folder of the sets.
        whole: require a set's images, not only its rows.

    Raises:
        ConfigError: a file is given without ``images``, or a set with it; the set is unknown or not under the root.
    """
    if is_json_name(name):
        if images is None:
            raise ConfigError(f"'{name}' is a conversation file: give the folder of its images with --images")
        return [(Path(name), images)]
    if images is not None:
        read_set(name)  # raises if it is none
        raise ConfigError(f"'{name}' is a data set with its own images: omit --images, or give a .json file")
    return _rows_of(name, root, whole)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shipped() -> Path:
    return Path(str(resources.files("visper.data.sets"))) / "catalogue"
