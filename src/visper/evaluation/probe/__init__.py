"""Probes: one resampler per layer, trained to read a teacher's target from the states of a frozen model."""
