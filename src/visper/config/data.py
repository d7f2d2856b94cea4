"""The rows of a stage: their sources, and how they are read and batched."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from visper.config.paths import PathText
from visper.config.section import Choice, Section

MAX_PIXELS, MOST_PIXELS = 89_478_485, 178_956_970
"""Default and largest value of ``data.max_pixels``: a decoded image then takes 268 or 537 MB. Above these numbers
Pillow warns of a decompression bomb or refuses it, whatever the run allows."""
RowField = Literal["id", "image", "images", "conversations", "messages", "texts", "system", "text"]
"""A key of a row that is read (``data.rows.formats``)."""


class Geometry(Choice):
    """How an image is made square for the student and the teachers."""

    SQUASH = "squash"
    PAD = "pad"
    CROP = "crop"


class Source(Section):
    """A source of rows: a set of the catalog, a JSON file, a hub data set, or Parquet files."""

    data_set: PathText | None = Field(
        None, alias="set", description="name in the catalog, or a YAML file like its entries"
    )
    json_file: PathText | None = Field(None, alias="json", description=".json or .jsonl, optionally .gz; with 'images'")
    hf: PathText | None = Field(None, description="data set on the hub, or a folder that contains one")
    parquet: PathText | None = Field(None, description="Parquet file, or a pattern for several")
    images: PathText | None = Field(None, description="folder that image paths are relative to")
    columns: dict[RowField, str] = Field(
        default_factory=dict, description="field -> its name in the rows, where that differs"
    )
    split: str | None = Field(None, description="for 'hf'; default: train")
    subset: str | None = Field(None, description="for 'hf', if the data set has several")
    revision: str | None = Field(None, description="for 'hf': commit, tag or branch")
    weight: PositiveFloat = Field(1.0, allow_inf_nan=False, description="expected uses of each row per epoch")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _one_way(self) -> Source:
        ways = {"set": self.data_set, "json": self.json_file, "hf": self.hf, "parquet": self.parquet}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1 or (given == ["json"] and self.images is None):
            raise ValueError("give one of 'set', 'json' (with 'images'), 'hf' and 'parquet'")
        for name in ("images", "columns", "split", "subset", "revision"):
            kinds = ("json", "hf", "parquet") if name in ("images", "columns") else ("hf",)
            if getattr(self, name) and given[0] not in kinds:
                raise ValueError(f"'{name}' belongs to {', '.join(kinds)}, this is '{given[0]}': remove it")
        return self

    @property
    def kind(self) -> Literal["json", "hf", "parquet"]:
        """The kind of source; a set of the catalog consists of JSON files."""
        kinds: tuple[Literal["hf", "parquet"], ...] = ("hf", "parquet")
        return next((name for name in kinds if getattr(self, name) is not None), "json")

    @property
    def place(self) -> str:
        """The file, folder, pattern or hub id; for a set, its name."""
        return str(self.data_set or self.json_file or self.hf or self.parquet)


class Data(Section):
    """The rows of a stage and how they are batched."""

    sources: tuple[Source, ...] = Field(min_length=1)
    root: PathText = Field("data", description="folder of the data sets given by 'set'")
    geometry: Geometry = Field(Geometry.SQUASH, description="shared by the student and the teachers")
    max_tokens: PositiveInt = 4096
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, le=MOST_PIXELS, description="per image; rows with a larger image are left out"
    )
    drop_limit: float = Field(0.01, ge=0, le=1, description="largest accepted share of bad rows")
    unknown_limit: float = Field(
        0.2, ge=0, le=1, description="largest accepted share of unknown tokens in the supervised text"
    )
    drop_list: tuple[PathText, ...] = Field(
        (), description="rows to leave out: files written by `visper data check --drop`"
    )
    group_by_length: bool = Field(False, description="batches of similar length and one modality")
    join_conversations: bool = Field(
        False, description="share an image between its conversations in a micro-batch: same losses from fewer tokens"
    )
    workers: int = Field(2, ge=0, description="loader processes")
