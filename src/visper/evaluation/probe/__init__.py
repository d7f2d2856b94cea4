"""Probes: what each layer of a frozen model holds, read by one trained resampler a layer."""
