"""Images and conversations become batches: records -> chat, images -> dataset -> collator, in the sampler's order."""
