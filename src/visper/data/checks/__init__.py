"""What a data set holds, before a run pays for it."""
