"""From conversations and images to batches: records -> chat, images -> dataset -> collator, in the sampler's order."""
