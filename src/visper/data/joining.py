"""Joining: conversations about one image share it in one sample, which gives the same losses from fewer tokens.

Such rows begin alike: system prompt, image, task tokens. A joined sample contains this prefix once, followed by the
rest of each conversation, a branch. A branch attends to the prefix and to itself (``training.attention``), and its
positions continue where the prefix ends, so every token sees what it would see in its own row.

Joining, like packing, only rearranges a micro-batch: a row of the data, of the global batch and of an epoch is still
one conversation. ``data.image_order`` puts conversations about one image side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from visper.data.chat import IGNORED
from visper.data.collator import Batch, Collator, Sample, sources_of
from visper.data.packing import PackingCollator
from visper.data.rows.records import Drop


@dataclass(frozen=True)
class JoinedSample:
    """Conversations that share their first ``prefix`` tokens; a single one consists of its prefix."""

    members: tuple[Sample, ...]
    prefix: int

    @property
    def branches(self) -> list[int]:
        """Tokens of each branch."""
        return [len(member.input_ids) - self.prefix for member in self.members] if len(self.members) > 1 else []

    def sample(self) -> Sample:
        """The prefix and all branches as one sample, with the image of the first conversation."""
        first = self.members[0]
        ids, labels = first.input_ids[: self.prefix], first.labels[: self.prefix]
        if len(self.members) > 1:
            for member in self.members:
                ids, labels = ids + member.input_ids[self.prefix :], labels + member.labels[self.prefix :]
        return replace(first, input_ids=ids, labels=labels)


def join(samples: Iterable[Sample], image_token_id: int, max_tokens: int) -> list[JoinedSample]:
    """Joins neighbors with equal pixels and equal tokens up to and including their image tokens.

    Args:
        samples: one micro-batch.
        image_token_id: all tokens with this id must lie in the prefix.
        max_tokens: longest joined sample; a longer one is split.
    """
    joined: list[JoinedSample] = []
    for sample in samples:
        larger = _with(joined[-1], sample, image_token_id, max_tokens) if joined else None
        if larger is None:
            joined.append(JoinedSample((sample,), len(sample.input_ids)))
        else:
            joined[-1] = larger
    return joined


def _with(joined: JoinedSample, sample: Sample, image_token_id: int, max_tokens: int) -> JoinedSample | None:
    first = joined.members[0]
    if first.pixel_values is None or sample.pixel_values is None:
        return None
    prefix = min(joined.prefix, _shared(first, sample))
    larger = JoinedSample((*joined.members, sample), prefix)
    shown = first.input_ids[:prefix].count(image_token_id)
    if any(member.input_ids.count(image_token_id) != shown for member in (first, sample)):
        return None
    if prefix + sum(larger.branches) > max_tokens or not torch.equal(first.pixel_values, sample.pixel_values):
        return None
    return larger


def _shared(one: Sample, other: Sample) -> int:
    """The number of equal tokens at the start of both, ending before the first that predicts a supervised token.

    The last token of the prefix predicts the first token of every branch, so that one is unsupervised, too.
    """
    most = min(_before_predictions(one), _before_predictions(other))
    pairs = zip(one.input_ids[:most], other.input_ids[:most], strict=True)
    return next((at for at, (token, another) in enumerate(pairs) if token != another), most)


def _before_predictions(sample: Sample) -> int:
    supervised = (at for at, label in enumerate(sample.labels) if at and label != IGNORED)
    return next(supervised, len(sample.labels)) - 1


@dataclass
class JoiningCollator:
    """A collator of packed batches in which conversations about one image are joined (see ``join``); picklable."""

    collator: Collator
    image_token_id: int
    max_tokens: int

    def __call__(self, items: Sequence[Sample | Drop]) -> Batch:
        """One row ``[1, T]``, T = tokens of all joined samples.

        Differs from a batch of ``PackingCollator`` by ``branches``, ``prefixes``, and ``position_ids`` that continue
        from the prefix in every branch. ``sample_ids`` names all conversations.
        """
        samples = [item for item in items if isinstance(item, Sample)]
        joined = join(samples, self.image_token_id, self.max_tokens)
        drops = [item for item in items if isinstance(item, Drop)]
        batch = PackingCollator(self.collator)([*(each.sample() for each in joined), *drops])
        branches, positions = torch.zeros_like(batch["input_ids"]), batch["position_ids"]
        for start, each in zip(batch["cu_seq_lens_q"].tolist(), joined, strict=False):
            at = start + each.prefix
            for number, length in enumerate(each.branches, 1):
                branches[0, at : at + length] = number
                positions[0, at : at + length] = torch.arange(each.prefix, each.prefix + length)
                at += length
        pairs = sum(each.prefix**2 + sum(own * (each.prefix + own) for own in each.branches) for each in joined)
        return {
            **batch,
            "sizes": replace(batch["sizes"], pairs=pairs),
            "branches": branches,
            "prefixes": tuple(each.prefix for each in joined) or batch["lengths"],
            "sources": sources_of(samples) if samples else batch["sources"],
            "sample_ids": [sample.id for sample in samples] or batch["sample_ids"],
            "num_truncated": sum(sample.truncated for sample in samples),
        }
