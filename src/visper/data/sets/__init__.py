"""Data sets by name: where they come from, and how they get to disk."""
