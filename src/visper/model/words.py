"""Words that a recipe adds to the LLM's vocabulary, and their trainable embeddings while the LLM is frozen.

Shape suffixes: W = added words, B = samples, L = sequence, D = LLM width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from visper.common.errors import ConfigError
from visper.model.task_tokens import embed_scale, replace_rows, weight_of


def add_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Adds a token for each word that is not a single token yet, and returns the ids of the new tokens.

    They are ordinary tokens that match whole words only: "cat" does not match in "catalog".

    Raises:
        ConfigError: the tokenizer does not encode an added word as its token, or does not decode it to the same text.
    """

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    new = [word for word in words if len(ids_of(word)) != 1 or tokenizer.unk_token_id in ids_of(word)]
    # Normalized like the text around them: a tokenizer that lowercases texts must find "Zebra".
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in new])
    added = [int(token) for token in tokenizer.convert_tokens_to_ids(new)]
    normalizer = tokenizer.backend_tokenizer.normalizer
    for word, token in zip(new, added, strict=True):
        text = f"{word} {word}"
        encoded = ids_of(text)
        decoded = tokenizer.decode(encoded, clean_up_tokenization_spaces=False)
        if encoded.count(token) != 2 or decoded not in (text, normalizer and normalizer.normalize_str(text)):
            raise ConfigError(
                f"student.add_words: the tokenizer encodes '{text}' as {tokenizer.convert_ids_to_tokens(encoded)} and "
                f"decodes it to '{decoded}', so the word cannot be added: remove it from the list"
            )
    return added


SPREAD = 0.3
"""Standard deviation of the noise on the rows of added words, relative to that of the existing rows."""


@torch.no_grad()
def set_to_mean(layers: Sequence[nn.Module], rows: list[int], old_size: int) -> None:
    """Sets new rows of embedding and head to the mean of the first ``old_size`` rows. Tied tables are set only once."""
    for table in {id(table): table for table in map(weight_of, layers)}.values():
        table[rows] = table[:old_size].float().mean(dim=0).to(table.dtype)


@torch.no_grad()
def move_apart(layers: Sequence[nn.Module], rows: Sequence[int], old_size: int) -> None:
    """Adds noise to the rows of added words, with ``SPREAD`` times the deviation of the first ``old_size`` rows.

    If their rows in the output layer were equal, no gradient could tell the words apart: the gradient of the hidden
    state is a sum over words of (probability - label) * row, which would be the same whichever word is right. A model
    that had to choose among three such words guessed and never used the image (docs/log.md, 2026-11-26). The noise does
    not depend on the run's seed.
    """
    generator = torch.Generator().manual_seed(0)
    for table in {id(table): table for table in map(weight_of, layers)}.values():
        deviations_D = table[:old_size].float().std(dim=0)
        noise_WD = torch.randn(len(rows), len(deviations_D), generator=generator).to(table.device) * deviations_D
        table[list(rows)] += (SPREAD * noise_WD).to(table.dtype)


class AddedWords(nn.Module):
    """Trainable embeddings of added words; forward hooks use them instead of the frozen LLM's rows.

    Args:
        head: the LLM's output layer; if it is tied to the embedding, so are the words' embeddings.
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], embedding: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        # float32 whatever the LLM's precision: their updates are small.
        self.rows = nn.Parameter(weight_of(embedding).detach()[self.ids].float())
        tied = weight_of(head) is weight_of(embedding)
        self.head_rows = None if tied else nn.Parameter(weight_of(head).detach()[self.ids].float())

    def attach(self, embedding: nn.Module, head: nn.Module) -> list[RemovableHandle]:
        """Makes ``embedding`` and ``head`` use this module's rows for the words; returns the hooks."""

        def score(module: nn.Module, args: tuple[Any, ...], logits_V: Tensor) -> Tensor:
            bias = getattr(module, "bias", None)
            rows_WD = (self.rows if self.head_rows is None else self.head_rows).to(args[0].dtype)
            own_W = F.linear(args[0], rows_WD, None if bias is None else bias[self.ids])
            return logits_V.index_copy(-1, self.ids, own_W.to(logits_V.dtype))

        looked_up = replace_rows(embedding, lambda: (self.ids, self.rows * embed_scale(embedding)))
        return [looked_up, head.register_forward_hook(score)]

    @torch.no_grad()
    def write_back(self, embedding: nn.Module, head: nn.Module) -> None:
        """Writes the rows into the LLM, so that the student no longer needs the hooks."""
        for table, rows in ((weight_of(embedding), self.rows), (weight_of(head), self.head_rows)):
            if rows is not None:
                table[self.ids.to(table.device)] = rows.to(table)
