"""Conversations about one image, joined behind it: the same losses from fewer tokens.

Such rows begin alike: system prompt, image, task tokens. The joined sample holds this prefix once, followed by the rest
of each conversation, a branch. A branch attends to the prefix and to itself (``training.attention``), and its positions
continue where the prefix ends: every token sees what it sees in its own row.

Joining rearranges one micro-batch, as packing does. A row of the data, of the global batch and of an epoch remains one
conversation. ``data.image_order`` puts those about one image side by side.
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
    """Conversations that share their first ``prefix`` tokens; one alone is all prefix."""

    members: tuple[Sample, ...]
    prefix: int

    @property
    def branches(self) -> list[int]:
        """Tokens of each branch."""
        return [len(member.input_ids) - self.prefix for member in self.members] if len(self.members) > 1 else []

    def sample(self) -> Sample:
        """The prefix and all branches as one sample, with the image of the first."""
        first = self.members[0]
        ids, labels = first.input_ids[: self.prefix], first.labels[: self.prefix]
        if len(self.members) > 1:
            for member in self.members:
                ids, labels = ids + member.input_ids[self.prefix :], labels + member.labels[self.prefix :]
        return replace(first, input_ids=ids, labels=labels)


def join(samples: Iterable[Sample], image_token_id: int, max_tokens: int) -> list[JoinedSample]:
    """Joins neighbors that show the same pixels and begin alike up to and including their image tokens.

    Args:
        samples: of one micro-batch.
        image_token_id: of which a prefix must hold all that its members have.
        max_tokens: a joined sample that would be longer is split.
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
    """Tokens at the start that are the same in both, and before those that predict a supervised one.

    The last token of the prefix predicts the first one of every branch: these are left unsupervised, like the prefix.
    """
    most = min(_before_predictions(one), _before_predictions(other))
    pairs = zip(one.input_ids[:most], other.input_ids[:most], strict=True)
    return next((at for at, (token, another) in enumerate(pairs) if token != another), most)


def _before_predictions(sample: Sample) -> int:
    supervised = (at for at, label in enumerate(sample.labels) if at and label != IGNORED)
    return next(supervised, len(sample.labels)) - 1


@dataclass
class JoiningCollator:
    """A ``Collator`` whose batches are packed, with conversations about one image joined; picklable like it.

    Args:
        collator: makes the tensors.
        image_token_id, max_tokens: see ``join``.
    """

    collator: Collator
    image_token_id: int
    max_tokens: int

    def __call__(self, items: Sequence[Sample | Drop]) -> Batch:
        """One row ``[1, T]``, T = tokens of all joined samples.

        Beside what ``PackingCollator`` gives: ``branches``, and ``position_ids`` that go on from the prefix in every
        branch. ``sample_ids`` names all members.
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
