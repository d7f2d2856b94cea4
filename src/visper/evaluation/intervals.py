"""95 % intervals of a share, a weighted sum of shares, a mean or share over groups, and a difference over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Z = 1.959963984540054
"""Number of standard deviations around the mean that contain 95 % of a normal distribution."""


def wilson(correct: float, total: float, z: float = Z) -> tuple[float, float]:
    """The 95 % interval of a share of ``correct`` in ``total``, both ends in 0..1 (Wilson 1927).

    Unlike the normal interval it stays inside 0..1 and keeps its coverage near the ends and for few samples. If answers
    score fractions of a point (``correct`` is their sum), it is wider than necessary, because zeros and ones have the
    largest variance of all values in 0..1 with the same mean.

    Args:
        z: another quantile than the normal one.

    Raises:
        ValueError: not 0 <= correct <= total, or no samples.
    """
    if total <= 0 or not -1e-9 <= correct <= total + 1e-9:
        raise ValueError(f"{correct} of {total} is not a share: expected 0 <= correct <= total and at least one sample")
    share, spread = correct / total, z * z / total
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(max(0.0, share * (1 - share)) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def wilson_grouped(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Wilson's interval of the share of values in 0..1, for groups as in ``grouped``.

    The number of values is replaced by that of independent values with the same variance of the mean, if it is smaller
    (Franco et al. 2019). Where the correlation inside groups cannot be estimated, because there is one group or all
    values are equal, each group counts as one value. Without groups of several values it is ``wilson``.

    Raises:
        ValueError: not a share, or no values.
    """
    total, right = sum(map(len, groups)), sum(map(sum, groups))
    if all(len(group) < 2 for group in groups):
        return wilson(right, total)
    share = right / total
    if len(groups) < 2 or not 0 < share < 1:
        return wilson(share * len(groups), len(groups))
    variance = _variance([sum(group) for group in groups], [len(group) for group in groups], share)
    alike = min(total, share * (1 - share) / variance) if variance else total
    return wilson(share * alike, alike, t_quantile(len(groups) - 1))


def grouped(groups: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float] | None]:
    """The mean of all values and its 95 % t-interval, which is None for a single group.

    Groups are independent of each other, but the values of a group are not, such as the scores of an image's questions.
    Few groups say little about how much groups vary: two need 6.5 times the normal interval.

    Raises:
        ValueError: there are no values.
    """
    return of_sums([sum(group) for group in groups], [len(group) for group in groups])


def of_sums(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, tuple[float, float] | None]:
    """Like ``grouped``, from the sum and the number of values of each group, such as an image's pixels."""
    if sum(counts) == 0:
        raise ValueError("a mean needs at least one value")
    mean = sum(sums) / sum(counts)
    if len(sums) < 2:
        return mean, None
    half = t_quantile(len(sums) - 1) * math.sqrt(_variance(sums, counts, mean))
    return mean, (mean - half, mean + half)


def _variance(sums: Sequence[float], counts: Sequence[int], mean: float) -> float:
    """The variance of the mean of all values, from the groups' sums and numbers of values."""
    spread = sum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return spread * len(sums) / (len(sums) - 1) / sum(counts) ** 2


def by_images(values: Iterable[float], images: Iterable[tuple[str, ...]]) -> list[list[float]]:
    """Groups of the values of questions about the same images; each question without images is a group of its own."""
    groups: dict[object, list[float]] = {}
    for number, (value, names) in enumerate(zip(values, images, strict=True)):
        groups.setdefault(frozenset(names) or number, []).append(value)
    return list(groups.values())


def weighted(parts: Iterable[tuple[float, float, tuple[float, float]]]) -> tuple[float, tuple[float, float]]:
    """A weighted sum of independent shares and its 95 % interval, from the shares' own (Newcombe 1998, method 10).

    Args:
        parts: weight, share and interval of each.
    """
    value = below = above = 0.0
    for weight, share, (low, high) in parts:
        value += weight * share
        below += (weight * (share - low)) ** 2
        above += (weight * (high - share)) ** 2
    return value, (value - math.sqrt(below), value + math.sqrt(above))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean difference of values of the same seeds, and its 95 % t-interval (Student 1908).

    Raises:
        ValueError: fewer than two seeds, or different numbers of values.
    """
    points = [own - other for own, other in zip(ours, theirs, strict=True)]
    if len(points) < 2:
        raise ValueError(f"{len(points)} seeds give no interval: expected at least 2, and 5 for a claim")
    mean, interval = grouped([[point] for point in points])
    assert interval is not None
    return mean, interval


def t_quantile(freedom: int) -> float:
    """Student's t at 97.5 %, which bounds a two-sided 95 % interval, for ``freedom`` degrees of freedom."""
    from scipy.stats import t  # takes a second to import, and most commands do not need it

    return float(t.ppf(0.975, freedom))
