"""Data sets by name: the catalogue, downloading and unpacking."""
