"""The errors that people are shown: each says what was found, what was expected and what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """A recipe or an override is wrong. The message lists every fault found, one a line."""


class DataError(ValueError):
    """Data that cannot be used. ``reason`` is the short name it is counted under, ``detail`` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)
