"""Target store: teachers' targets, computed once and read by training."""
