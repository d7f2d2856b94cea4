"""Rows that would be trained as text because the key of their image has a name that nothing reads."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from visper.common.errors import counted
from visper.data.rows.table import Records


def unread_images(records: Records) -> list[str]:
    """A warning for each source and key, see ``formats.unread_image``; reads no rows if there are none."""
    warnings = []
    for number, part in enumerate(records.parts):
        column = part.table.column("unread_image")
        if column.null_count == len(column):
            continue
        rows = records.rows[records.part_numbers == number] - records.starts[number]
        keys = np.asarray(column.take(pa.array(rows)).to_pylist(), dtype=object)
        for key in sorted({key for key in keys if key is not None}):
            own = rows[keys == key]
            first = part.table.record(int(own[0]), part.name, None).id
            warnings.append(
                f"{counted(len(own), 'row')} of '{part.name}' without 'image', whose '{key}' looks like one and is not "
                f"read, will be trained as text (first: {first}). Rename it, or map it in data.sources with columns: "
                f"{{image: {key}}}"
            )
    return warnings
