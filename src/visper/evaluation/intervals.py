"""How sure a share is: Wilson's interval."""

from __future__ import annotations


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``correct`` in ``total``, both ends in 0..1 (Wilson 1927).

    Unlike the normal interval it stays inside 0..1 and keeps its coverage near the ends and for few samples.

    Raises:
        ValueError: the two numbers make no share.
    """
    from scipy.stats import binomtest  # a second to import: only those who score pay for it

    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is no share: expected 0 <= correct <= total and at least one sample")
    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
