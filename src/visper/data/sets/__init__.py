"""Data sets by name: the catalog, downloading and unpacking."""
