"""Weights become scores."""
