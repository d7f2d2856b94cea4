"""Published head parameters under visper's names: the inverse of what a conversion reads them by."""

import re

from visper.published.names import HEAD_NAMES

UNUSED_HEAD_PARTS = ("linear_2.", "linear_3.")
"""More MLPs of the published depth head: computed there, read by no loss, never trained."""


def published_name(name):
    """Visper's name of a published head's parameter, None where visper has no such parameter."""
    if name.startswith(UNUSED_HEAD_PARTS):
        return None
    for ours, theirs in HEAD_NAMES:
        name = re.sub(r"(?<![^.])" + re.escape(theirs).replace(r"\#", r"(\d+)"), ours.replace("#", r"\1"), name)
    return name


def from_published(state):
    """A published resampler's or head's parameters under visper's names."""
    return {ours: value for name, value in state.items() if (ours := published_name(name)) is not None}
