"""Rows of conversation files: parsed, kept as tables, joined into sources."""
