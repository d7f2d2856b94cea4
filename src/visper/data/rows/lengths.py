"""Token counts of all rows, computed on all cores and cached per tokenizer, template and ``max_tokens``.

The counts are exact: they come from the encoder that training uses, including truncation and image tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers
import transformers

from visper.common.cache import cache_file, code_key, key
from visper.common.errors import DataError
from visper.common.parallel import in_order
from visper.data import chat, chat_template, vlm
from visper.data.chat import ConversationEncoder
from visper.data.rows.records import Record
from visper.data.rows.table import Part, Records

SCHEMA = pa.schema(
    [
        ("length", pa.int32()),
        ("truncated", pa.bool_()),
        ("num_text", pa.int32()),
        ("num_unknown", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
Measured = tuple[int, bool, int, int, str | None, str | None]


@dataclass(frozen=True)
class Lengths:
    """The result of encoding, one entry per row; the counts are those of ``chat.Encoded``."""

    lengths: npt.NDArray[np.int32]  # in tokens; 0: the row cannot be encoded
    truncated: npt.NDArray[np.bool_]
    num_text: npt.NDArray[np.int32]
    num_unknown: npt.NDArray[np.int32]
    problems: dict[int, tuple[str, str]]  # index -> reason, detail

    def select(self, kept: npt.NDArray[np.bool_]) -> Lengths:
        """The entries of the rows in ``kept``, which have no problems."""
        text, unknown = self.num_text[kept], self.num_unknown[kept]
        return Lengths(self.lengths[kept], self.truncated[kept], text, unknown, {})

    @classmethod
    def of(cls, table: pa.Table) -> Lengths:
        """Converts a table of ``SCHEMA``."""
        bad = np.flatnonzero(np.asarray(table.column("reason").is_valid().to_numpy(), dtype=np.bool_)).tolist()
        return cls(
            table.column("length").to_numpy(),
            np.asarray(table.column("truncated").to_numpy(), dtype=np.bool_),
            table.column("num_text").to_numpy(),
            table.column("num_unknown").to_numpy(),
            {row: (table.column("reason")[row].as_py(), table.column("detail")[row].as_py()) for row in bad},
        )


def measure(records: Records, encoder: ConversationEncoder, quiet: bool = False) -> Lengths:
    """Encodes every row. Results are cached for later runs."""
    whole = pa.concat_tables([_kept(part, encoder, quiet) for part in records.parts])
    return Lengths.of(whole.take(pa.array(records.rows)))


def encoder_key(encoder: ConversationEncoder) -> str:
    """A key of everything that a row's tokens depend on."""
    tokenizer = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    # The tokenizer keeps the padding and truncation of its last call; the encoder uses neither.
    tokenizer.pop("padding", None), tokenizer.pop("truncation", None)
    return key(
        json.dumps(tokenizer, sort_keys=True),
        str(encoder.processor.chat_template),
        json.dumps({name: str(token) for name, token in sorted(encoder.tokenizer.special_tokens_map.items())}),
        encoder.max_tokens,
        encoder.num_image_tokens,
        encoder.image_text,
        tokenizers.__version__,
        transformers.__version__,
        code_key(chat, chat_template, vlm),
    )


def _kept(part: Part, encoder: ConversationEncoder, quiet: bool) -> pa.Table:
    """The measurements of all rows of a source; null for bad rows."""
    rows: Path = part.table.path
    place = rows.with_name(f"{rows.stem}.{encoder_key(encoder)}.lengths")
    if not place.is_file():
        good = Records([part])
        measured = _measured(good, encoder, quiet)
        at = np.full(len(part.table), -1)
        at[good.rows] = np.arange(len(good))
        whole = measured.take(pa.array(at, mask=at < 0))  # null for bad rows
        with (
            cache_file(place) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            writer.write_table(whole)
    with pa.memory_map(str(place)) as source:
        return pa.ipc.open_file(source).read_all()


def _measured(records: Sequence[Record], encoder: ConversationEncoder, quiet: bool) -> pa.Table:
    results = list(in_order(_Encode(encoder), records, "counting tokens", quiet))
    columns: list[Any] = list(zip(*results, strict=True)) if results else [() for _ in SCHEMA]
    return pa.table([pa.array(values, kind.type) for values, kind in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


@dataclass(frozen=True)
class _Encode:
    encoder: ConversationEncoder

    def __call__(self, record: Record) -> Measured:
        try:
            encoded = self.encoder.encode(record)
        except DataError as error:
            return 0, False, 0, 0, error.reason, error.detail
        counts = encoded.num_text, encoded.num_unknown
        length = min(len(encoded.input_ids), self.encoder.max_tokens)
        return length, encoded.truncated, *counts, None, None
