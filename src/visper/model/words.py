"""Words that a recipe adds to the LLM's vocabulary, and their embeddings while the LLM is frozen.

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
from visper.model.task_tokens import embed_scale


def add_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Gives each word a token of its own, and returns the ids of those that had none.

    The tokens are ordinary ones, found where a word of the text begins and ends: "cat" is not found in "catalog".

    Raises:
        ConfigError: the tokenizer would not read an added word as its token, or not write it as it was read.
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
        read = ids_of(text)
        written = tokenizer.decode(read, clean_up_tokenization_spaces=False)
        if read.count(token) != 2 or written not in (text, normalizer and normalizer.normalize_str(text)):
            raise ConfigError(
                f"student.add_words: the tokenizer reads '{text}' as {tokenizer.convert_ids_to_tokens(read)} "
                f"and writes '{written}', so the word cannot be added to it: remove it from the list"
            )
    return added


SPREAD = 0.3
"""Of the rows of added words about the mean, as a share of the old rows' own."""


@torch.no_grad()
def set_to_mean(layers: Sequence[nn.Module], rows: list[int], old_size: int) -> None:
    """Sets new rows of embedding and head to the mean of the first ``old_size`` rows. Tied tables are set once."""
    for table in {id(table): table for table in map(_weight, layers)}.values():
        table[rows] = table[:old_size].float().mean(dim=0).to(table.dtype)


@torch.no_grad()
def move_apart(layers: Sequence[nn.Module], rows: Sequence[int], old_size: int) -> None:
    """Adds noise to the rows of words, ``SPREAD`` times as wide as the first ``old_size`` rows, whatever the seed.

    Words whose rows are equal in the output layer get no gradient that tells them apart: it reaches the hidden state as
    a sum over words of (probability - label) * row, which is then the same whichever of them is right. A model asked
    for one of three such words guessed, and never looked at the image (docs/log.md, 2026-11-26).
    """
    generator = torch.Generator().manual_seed(0)
    for table in {id(table): table for table in map(_weight, layers)}.values():
        deviations_D = table[:old_size].float().std(dim=0)
        noise_WD = torch.randn(len(rows), len(deviations_D), generator=generator).to(table.device) * deviations_D
        table[list(rows)] += (SPREAD * noise_WD).to(table.dtype)


class AddedWords(nn.Module):
    """Trainable embeddings of added words, used in place of the frozen LLM's rows by forward hooks.

    Args:
        ids: the words' tokens.
        embedding: the LLM's input embedding.
        head: its output layer; where the two are tied, so are the words' embeddings.
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], embedding: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        # float32 whatever the LLM's precision: their updates are small.
        self.rows = nn.Parameter(_weight(embedding).detach()[self.ids].float())
        tied = _weight(head) is _weight(embedding)
        self.head_rows = None if tied else nn.Parameter(_weight(head).detach()[self.ids].float())

    def attach(self, embedding: nn.Module, head: nn.Module) -> list[RemovableHandle]:
        """Makes ``embedding`` look up, and ``head`` score, the words by the rows of this module; returns the hooks."""

        def look_up(module: nn.Module, args: tuple[Any, ...], looked_up_BLD: Tensor) -> Tensor:
            matches_BLW = args[0][..., None] == self.ids
            rows_WD = (self.rows * embed_scale(module)).to(looked_up_BLD.dtype)
            own_BLD = rows_WD[matches_BLW.int().argmax(-1)]
            return torch.where(matches_BLW.any(-1)[..., None], own_BLD, looked_up_BLD)

        def score(module: nn.Module, args: tuple[Any, ...], logits_V: Tensor) -> Tensor:
            bias = getattr(module, "bias", None)
            rows_WD = (self.rows if self.head_rows is None else self.head_rows).to(args[0].dtype)
            own_W = F.linear(args[0], rows_WD, None if bias is None else bias[self.ids])
            return logits_V.index_copy(-1, self.ids, own_W.to(logits_V.dtype))

        return [embedding.register_forward_hook(look_up), head.register_forward_hook(score)]

    @torch.no_grad()
    def write_back(self, embedding: nn.Module, head: nn.Module) -> None:
        """Writes the rows into the LLM, so that the student needs no hook any more."""
        for table, rows in ((_weight(embedding), self.rows), (_weight(head), self.head_rows)):
            if rows is not None:
                table[self.ids.to(table.device)] = rows.to(table)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight
