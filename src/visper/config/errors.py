"""The error of a run that cannot be: it names the file, the key and the remedy."""


class ConfigError(ValueError):
    """A recipe or an override is wrong. The message lists every fault found, one a line."""
