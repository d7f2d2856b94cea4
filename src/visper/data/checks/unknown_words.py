"""Unknown words in the supervised text, which would teach the model to answer ``<unk>``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from visper.common.errors import DataError
from visper.data.rows.table import Records

if TYPE_CHECKING:
    from visper.data.chat import ConversationEncoder
    from visper.data.rows.lengths import Lengths

WARN_PAST = 0.01
"""Share of unknown tokens above which a run warns."""
EXAMPLES = 8
ROWS_FOR_EXAMPLES = 200
REMEDY = (
    "add them to 'student.add_words' in the recipe of the first stage, or choose an LLM whose tokenizer knows the "
    "language of the data"
)


@dataclass(frozen=True)
class UnknownWords:
    """The number of tokens in the supervised text, the unknown ones among them, and unknown words by frequency."""

    num_text: int = 0
    num_unknown: int = 0
    words: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of unknown tokens in the supervised text."""
        return self.num_unknown / max(1, self.num_text)

    def __str__(self) -> str:
        shown = ", ".join(repr(word) for word in self.words[:EXAMPLES])
        return (
            f"{self.share:.1%} of the supervised text ({self.num_unknown:,} of {self.num_text:,} tokens) is unknown to "
            f"the tokenizer, such as {shown}"
        )

    def check(self, limit: float) -> str | None:
        """A warning, or None.

        Raises:
            DataError: the share is above ``limit``.
        """
        if self.share > limit:
            raise DataError(
                "unknown words", f"{self}; data.unknown_limit allows {limit:.1%}: {REMEDY}, or raise the limit"
            )
        return f"{self}: {REMEDY}" if self.share > WARN_PAST else None


def unknown_words(
    records: Records, found: Lengths, encoder: ConversationEncoder, look_up: int | None = ROWS_FOR_EXAMPLES
) -> UnknownWords:
    """Adds up the token counts of ``records``, and finds their unknown words.

    Args:
        look_up: number of rows with unknown tokens to read again for their words; None: all of them.
    """
    rows = np.flatnonzero(found.num_unknown)[:look_up].tolist()
    words = Counter(word for row in rows for word in encoder.unknown_words(records[row]))
    num_text, num_unknown = int(found.num_text.sum()), int(found.num_unknown.sum())
    return UnknownWords(num_text, num_unknown, tuple(word for word, _ in words.most_common()))


def total_of(parts: Sequence[UnknownWords]) -> UnknownWords:
    """The sum over several files; words are merged by rank."""
    ranks = zip_longest(*(part.words for part in parts))
    words = dict.fromkeys(word for same_rank in ranks for word in same_rank if word is not None)
    return UnknownWords(sum(p.num_text for p in parts), sum(p.num_unknown for p in parts), tuple(words))
