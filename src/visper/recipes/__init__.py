"""Named runs as YAML, one file per stage and base."""
