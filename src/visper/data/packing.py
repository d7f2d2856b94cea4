"""Packing: all samples of a micro-batch in one row without padding, which gives the same losses from fewer tokens.

Packing only rearranges a micro-batch. The samples of a step and the normalization of the loss do not change. The layout
is that of transformers' ``DataCollatorWithFlattening``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visper.data.collator import Batch, Collator, Sample, Sizes, supervised_places
from visper.data.rows.records import Drop


@dataclass
class PackingCollator:
    """A collator of packed batches; picklable."""

    collator: Collator

    def __call__(self, items: Sequence[Sample | Drop]) -> Batch:
        """One row ``[1, T]`` instead of ``[B, L]``, T = tokens of all samples, with the boundaries of the samples.

        Samples and images keep their order. The first token of a sample is unsupervised, since the token before it
        belongs to another sample.
        """
        from transformers import DataCollatorWithFlattening

        padded = self.collator(items)
        lengths = padded["sizes"].lengths
        rows = zip(padded["input_ids"], padded["labels"], lengths, strict=True)
        samples = [{"input_ids": ids[:length], "labels": labels[:length]} for ids, labels, length in rows]
        flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(samples, return_tensors="pt")
        batch: Batch = {
            **padded,
            **flat,
            "attention_mask": torch.ones_like(flat["input_ids"]),
            "supervised_at": supervised_places(flat["labels"]),
            "image_rows": torch.zeros_like(padded["image_rows"]),
            "lengths": lengths,
            "sizes": Sizes.of(lengths, flat["labels"], padded["image_tokens"]),
        }
        if self.collator.model_inputs is not None:
            batch["model_inputs"] = padded["model_inputs"] | self.collator.model_inputs.token_types(flat["input_ids"])
        return batch
