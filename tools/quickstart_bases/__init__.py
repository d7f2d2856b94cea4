"""Builds the small base models that the quickstart ships with; not part of the wheel."""
