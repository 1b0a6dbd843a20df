"""Uncertainty of means over questions that come in groups: bootstrap intervals and a randomisation test.

Questions about one document are alike, so resampling single questions would promise more than was measured. What is
resampled here, and what changes sides in the test, is a whole group of questions that share documents (Davison and
Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). A metric is a ratio of two sums over questions,
which covers means over all questions (denominator 1 each) and rates per search or per turn alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from tasks.splits import connected

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
POWER = 0.80
SEED = 0
_CHUNK_CELLS = 8_000_000
_NO_SPREAD = 1e-12


def document_groups(questions: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.intp]:
    """Number of each question's group: questions whose answer locations share a document, directly or over others.

    A question without a location is a group of its own.
    """
    documents = [
        [f"d:{place['document']}" for place in question["answer_locations"]] or [f"q:{index}"]
        for index, question in enumerate(questions)
    ]
    return np.unique(connected(documents), return_inverse=True)[1]


def group_sums(values: Floats, groups: npt.NDArray[np.intp]) -> Floats:
    """Sums of (questions × columns) values within each group: (groups × columns)."""
    sums = np.zeros((int(groups.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums


def resampled_totals(sums: Floats, resamples: int) -> Floats:
    """Column totals of `resamples` draws of as many groups as there are, with replacement: (resamples × columns)."""
    groups = len(sums)
    rng = np.random.default_rng(SEED)
    chunk = max(1, _CHUNK_CELLS // max(groups, 1))
    totals = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(groups, size=(rows, groups)) + np.arange(rows)[:, None] * groups
        times = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
        totals.append(times.astype(np.float64) @ sums)
    return np.concatenate(totals)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element by element; NaN where there was nothing to divide by."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def interval(estimates: Floats, groups: int, limits: tuple[float, float] | None = None) -> tuple[float, float] | None:
    """95 % percentile interval of resampled estimates; None when fewer than two groups leave nothing to say.

    The percentiles are widened for few groups as a t interval is wider than a normal one (Hesterberg, What Teachers Should
    Know About the Bootstrap, 2015, section 5.3, "expanded percentile interval"); with many it is the plain one.

    Args:
        limits: the least and greatest possible value of a share, or of a difference of shares. Where all groups agree,
            resampling shows no spread; the interval is then as wide as what could have gone unseen (`never_seen`).
    """
    estimates = estimates[~np.isnan(estimates)]
    if groups < 2 or not len(estimates):
        return None
    tail = stats.norm.cdf(-np.sqrt(groups / (groups - 1)) * stats.t.ppf((1 + LEVEL) / 2, groups - 1))
    low, high = np.quantile(estimates, [tail, 1 - tail])
    if limits and np.ptp(estimates) < _NO_SPREAD:
        low, high = max(limits[0], low - never_seen(groups)), min(limits[1], high + never_seen(groups))
    return float(low), float(high)


def never_seen(groups: int) -> float:
    """The largest rate at which something may happen and yet be seen in none of `groups` groups, with 95 % confidence.

    The exact form of the rule of three (Hanley and Lippman-Hand, If Nothing Goes Wrong, Is Everything All Right?, 1983).
    """
    return 1 - (1 - LEVEL) ** (1 / groups)


def smallest_visible(differences: Floats, groups: int) -> float | None:
    """The true difference that so many groups would have shown with 80 % power at the 5 % level, from resampled ones.

    (t₀.₉₇₅ + t₀.₈₀) × standard error (Bloom, Minimum Detectable Effects, 1995). None when there are fewer than two groups.
    """
    differences = differences[~np.isnan(differences)]
    if groups < 2 or not len(differences):
        return None
    if np.ptp(differences) < _NO_SPREAD:
        return never_seen(groups)
    multiple = stats.t.ppf((1 + LEVEL) / 2, groups - 1) + stats.t.ppf(POWER, groups - 1)
    return float(multiple * np.std(differences, ddof=1))


def swap_p_values(run: tuple[Floats, Floats], baseline: tuple[Floats, Floats], resamples: int) -> Floats:
    """Two-sided paired randomisation test: how often does swapping the two runs' labels, group by group, part them as far?

    The test that Smucker, Allan and Carterette (A Comparison of Statistical Significance Tests for Information Retrieval
    Evaluation, 2007) recommend, with groups as the units that are swapped. All 2^groups swaps when they are no more than
    `resamples`; else a random `resamples` of them, and the observed one counts too, so that p is never 0 (Phipson and
    Smyth, Permutation P-values Should Never Be Zero, 2010).

    Args:
        run: numerators and denominators, each (groups × metrics).
        baseline: the same of the other run.

    Returns:
        One p-value a metric; NaN where a metric has no value.
    """
    groups = len(run[0])
    exact = 2**groups <= resamples if groups < 63 else False
    total = tuple(a.sum(axis=0) + b.sum(axis=0) for a, b in zip(run, baseline, strict=True))
    step = tuple(a - b for a, b in zip(run, baseline, strict=True))
    base = tuple(b.sum(axis=0) for b in baseline)

    def differences(signs: Floats) -> Floats:
        ours = [b + signs @ s for b, s in zip(base, step, strict=True)]
        theirs = [t - o for t, o in zip(total, ours, strict=True)]
        return np.abs(ratio(ours[0], ours[1]) - ratio(theirs[0], theirs[1]))

    observed = differences(np.ones((1, groups)))[0]
    rng = np.random.default_rng(SEED)
    rounds = 2**groups if exact else resamples
    chunk = max(1, _CHUNK_CELLS // max(groups, 1))
    extreme = np.zeros(len(observed))
    for start in range(0, rounds, chunk):
        rows = min(chunk, rounds - start)
        if exact:
            signs = (np.arange(start, start + rows)[:, None] >> np.arange(groups)) & 1
        else:
            signs = rng.integers(2, size=(rows, groups))
        extreme += (differences(signs.astype(np.float64)) >= observed - 1e-12).sum(axis=0)
    p = extreme / rounds if exact else (extreme + 1) / (rounds + 1)
    return np.where(np.isnan(observed), np.nan, p)
