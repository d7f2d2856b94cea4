"""Estimates of a run's memory, time and disk, made before it starts."""
