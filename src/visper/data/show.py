"""Shows one sample as decoded text with the supervised tokens in color, to check before a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from visper.data.chat import IGNORED

SUPERVISED_STYLE = "bold green"


def show_sample(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int], image_token_id: int
) -> Text:
    """The sample as text for a rich console: supervised tokens in bold green, image tokens as ``<image> x 576``."""
    text = Text()
    tokens = list(zip(input_ids, labels, strict=True))
    for (is_image, supervised), group in groupby(tokens, key=lambda t: (t[0] == image_token_id, t[1] != IGNORED)):
        ids = [int(token) for token, _ in group]
        shown = f"<image> x {len(ids)} " if is_image else str(tokenizer.decode(ids, skip_special_tokens=False))
        text.append(shown, style=SUPERVISED_STYLE if supervised else "dim")
    return text
