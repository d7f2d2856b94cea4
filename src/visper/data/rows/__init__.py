"""Rows of conversation files: parsing, Arrow tables, sources."""
