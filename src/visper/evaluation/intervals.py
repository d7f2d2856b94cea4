"""How sure a share is: Wilson's interval."""

from __future__ import annotations

import math


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share of ``correct`` in ``total``, both ends in 0..1 (Wilson 1927).

    Unlike the normal interval it stays inside 0..1 and keeps its coverage near the ends and for few samples.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is no share: expected 0 <= correct <= total and at least one sample")
    share = correct / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
