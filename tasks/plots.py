"""Figures of a report, as SVG to be put into a page: text stays text, and colours are the page's own, light or dark.

matplotlib draws with stand-in colours, which are then exchanged for CSS variables (--ink, --muted, --line, --run-0 …
--run-5, --good, --bad) with a fallback, so that a figure also stands alone. The same data gives the same bytes.
"""

import html
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tasks.metrics import BY_NAME
from tasks.statistics import DISTRIBUTIONS, tenths

Ranks = Mapping[str, Sequence[int | None]]
_INK, _MUTED, _LINE, _GOOD, _BAD = "#010101", "#010102", "#010103", "#010104", "#010105"
_RUNS = tuple(f"#0102{number:02x}" for number in range(6))
_CSS = {
    _INK: "var(--ink, #1c2127)",
    _MUTED: "var(--muted, #57616c)",
    _LINE: "var(--line, #dfe3e8)",
    _GOOD: "var(--good, #12703f)",
    _BAD: "var(--bad, #b3261e)",
} | {
    colour: f"var(--run-{number}, {fallback})"
    for number, (colour, fallback) in enumerate(
        zip(_RUNS, ("#6b7684", "#b8620b", "#1565b8", "#0b7a6f", "#7a4fb5", "#b03a6e"), strict=True)
    )
}
_DEPTH = 10  # ranks that are shown one by one
_WIDTH = 4.9  # inches: small, so that text is as large as the page's on a phone


@contextmanager
def _figure(height: float, title: str, svg: list[str], panels: tuple[int, int] = (1, 1)) -> Iterator[Any]:
    """Yields the axes, or an array of those of all panels; on leaving, appends the finished SVG, which a screen reader
    calls by `title`."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "grid.color": _LINE,
        "grid.linewidth": 0.7,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(*panels)
        yield axes
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)  # it would style the whole page
    drawn = re.sub(r"font-family: [^;\"]*;? ?", "", drawn)
    drawn = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", drawn, count=2)
    for colour, variable in _CSS.items():
        drawn = drawn.replace(colour, variable)
    label = html.escape(title, quote=True)
    svg.append(drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def _colour(run: int) -> str:
    return _RUNS[run % len(_RUNS)]


def _bar(run: int) -> dict[str, Any]:
    """How a run's bars look: of runs that share a colour, the later ones' are hatched."""
    if run < len(_RUNS):
        return {"color": _colour(run)}
    return {"facecolor": "none", "edgecolor": _colour(run), "hatch": "////" if run < 2 * len(_RUNS) else "xxxx"}


def _legend_above(axes: Any) -> None:
    """Above the axes, where no bar is."""
    axes.legend(
        frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=0.9, handleheight=0.9
    )


def _apart(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, at least `least` apart and, if they fit, within low … high."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    last = low - least
    for i in order:
        last = placed[i] = max(wanted[i], last + least)
    limit = high
    for i in reversed(order):
        limit = placed[i] = min(placed[i], limit)
        limit -= least
    return placed


def hit_curves(ranks: Ranks) -> str:
    """Share of all questions whose first search has the page among the first k, for k = 1 … 10, one line a run."""
    svg: list[str] = []
    steps = range(1, _DEPTH + 1)
    curves = [
        [100 * sum(rank is not None and rank <= k for rank in found) / len(found) for k in steps]
        for found in ranks.values()
    ]
    ends = ", ".join(f"{run} {curve[0]:.1f} to {curve[-1]:.1f} %" for run, curve in zip(ranks, curves, strict=True))
    with _figure(3.0, f"Hit@1 to Hit@{_DEPTH}: {ends}", svg) as axes:
        top = min(100.0, 1.1 * max(max(curve) for curve in curves) + 2)
        places = _apart([curve[-1] for curve in curves], top / 15, 0, top)
        for number, (run, curve, place) in enumerate(zip(ranks, curves, places, strict=True)):
            line = ("-", "--", ":")[min(number // len(_RUNS), 2)]
            axes.plot(steps, curve, line, color=_colour(number), linewidth=2, marker="o", markersize=3.5, clip_on=False)
            axes.annotate(
                run, (_DEPTH + 0.25, place), color=_colour(number), va="center", annotation_clip=False, weight="bold"
            )
        axes.set(
            xlim=(0.7, _DEPTH),
            ylim=(0, top),
            xlabel="k: pages looked at",
            ylabel="among the first k, % of all questions",
        )
        axes.set_xticks(list(steps))
        axes.grid(axis="y")
    return svg[0]


def rank_bars(ranks: Ranks) -> str:
    """Share of all questions by the page's rank in the first search, and of misses, bars of all runs side by side."""
    svg: list[str] = []
    missed = ", ".join(f"{run} {sum(rank is None for rank in found)} of {len(found)}" for run, found in ranks.items())
    with _figure(3.0, f"Rank of the page in the first search; missed: {missed}", svg) as axes:
        width = 0.8 / len(ranks)
        for number, (run, found) in enumerate(ranks.items()):
            shares = [100 * sum(rank == k for rank in found) / len(found) for k in range(1, _DEPTH + 1)]
            beyond = 100 * sum(rank is None or rank > _DEPTH for rank in found) / len(found)
            x = [k + (number + 0.5) * width - 0.4 for k in [*range(1, _DEPTH + 1), _DEPTH + 1.6]]
            axes.bar(x, [*shares, beyond], width * 0.92, label=run, **_bar(number))
        axes.set_xticks([*range(1, _DEPTH + 1), _DEPTH + 1.6], [*map(str, range(1, _DEPTH + 1)), "missed"])
        axes.tick_params(axis="x", length=0)
        axes.set(xlabel="rank of the page, first search", ylabel="% of all questions")
        axes.grid(axis="y")
        _legend_above(axes)
    return svg[0]


def call_bars(calls: Mapping[str, Sequence[int | None] | None]) -> str:
    """Share of all questions by the number of the model call whose search first found the page, bars of all runs side by side.

    Args:
        calls: by run, for each question the number of that call from 1, or None where no search found the page; None for a
            run that makes no calls, which keeps its colour and is not drawn.
    """
    drawn = {run: (number, found) for number, (run, found) in enumerate(calls.items()) if found is not None}
    svg: list[str] = []
    last = max((number for _, found in drawn.values() for number in found if number is not None), default=1)
    never = ", ".join(f"{run} {sum(n is None for n in found)} of {len(found)}" for run, (_, found) in drawn.items())
    with _figure(3.0, f"Model calls until the page was found; never found: {never}", svg) as axes:
        width = 0.8 / len(drawn)
        for place, (run, (number, found)) in enumerate(drawn.items()):
            shares = [100 * sum(n == step for n in found) / len(found) for step in [*range(1, last + 1), None]]
            x = [k + (place + 0.5) * width - 0.4 for k in [*range(1, last + 1), last + 1.4]]
            axes.bar(x, shares, width * 0.92, label=run, **_bar(number))
        axes.set_xticks([*range(1, last + 1), last + 1.4], [*map(str, range(1, last + 1)), "never found"])
        axes.tick_params(axis="x", length=0)
        axes.set(xlabel="model call whose search first found the page", ylabel="% of all questions")
        axes.grid(axis="y")
        _legend_above(axes)
    return svg[0]


def forest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Differences of one pair of runs, a row a metric, with 95 % intervals: right of 0 is better.

    Args:
        rows: of a comparison (schema comparison/1), with one run and one baseline.
    """
    svg: list[str] = []
    title = f"{rows[0]['run']} minus {rows[0]['baseline']}, percentage points with 95 % intervals"
    with _figure(0.85 + 0.27 * len(rows), title, svg) as axes:
        for place, row in enumerate(reversed(rows)):
            colour = {"improved": _GOOD, "worse": _BAD}.get(row["verdict"], _MUTED)
            if row["low"] is not None:
                axes.plot(
                    [100 * row["low"], 100 * row["high"]],
                    [place, place],
                    color=colour,
                    linewidth=2.2,
                    solid_capstyle="round",
                )
            axes.plot(100 * row["difference"], place, "o", color=colour, markersize=6)
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.set_yticks(range(len(rows)), [BY_NAME[row["metric"]].label for row in reversed(rows)])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel="← worse\u2003 difference, percentage points \u2003better →")
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    return svg[0]


def loss_curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """Training loss by optimizer step, and the loss on held-out examples where it was measured (schema loss_curve/2)."""
    svg: list[str] = []
    lines = {"training": "loss", "held out": "eval_loss"}
    points = {
        name: [(row["step"], row[column]) for row in rows if row[column] is not None] for name, column in lines.items()
    }
    ends = ", ".join(f"{name} {found[0][1]:.2f} to {found[-1][1]:.2f}" for name, found in points.items() if found)
    with _figure(2.6, f"Loss: {ends}", svg) as axes:
        for number, (name, found) in enumerate(points.items()):
            if found:
                steps, losses = zip(*found, strict=True)
                style = "-" if name == "training" else "--o"
                axes.plot(steps, losses, style, color=_colour(2 - number), linewidth=1.8, markersize=3.5, label=name)
        axes.set(xlabel="optimizer step", ylabel="loss")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(frameon=False)
    return svg[0]


def distributions(statistics: Mapping[str, Any]) -> str:
    """Collected rollouts by rank, rank score, first success and effort, a panel each (tasks/statistics.py)."""
    svg: list[str] = []
    # there may be as many rank scores as rollouts: one by one they would not be to scale
    scores = tenths(map(float, Counter(statistics["rank_score"]).elements()))
    counts = [scores if name == "rank_score" else statistics[name] for name in DISTRIBUTIONS]
    most = (
        f"{title}: mostly {max(c, key=c.__getitem__)}"
        for title, c in zip(DISTRIBUTIONS.values(), counts, strict=True)
        if c
    )
    with _figure(3.6, f"{statistics['rollouts']['finished']} rollouts. " + "; ".join(most), svg, (2, 2)) as panels:
        for axes, title, shown in zip(panels.flat, DISTRIBUTIONS.values(), counts, strict=True):
            axes.bar(list(shown), list(shown.values()), 0.7, color=_colour(2))
            axes.set_title(title, fontsize=9, color=_INK)
            axes.tick_params(axis="x", length=0, labelsize=8)
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y")
    return svg[0]
