"""Images and conversations become batches."""
