"""Builds the small base models of the quickstart; not part of the wheel."""
