"""Results taken apart: how questions ended, what became of them from one run to the next, by category, and what it cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.fate import FATES, MEANINGS, Fate
from tasks.markdown import markdown_table
from tasks.runs import Cell, metric_cells, runs_of

Row = Mapping[str, Any]
Tables = Mapping[str, Sequence[Row]]  # rows of results/4 by run

# Below six groups of questions no difference can have p < 0.05: all swaps of five give 2 / 2⁵ at the least
# (tasks/bootstrap.py), and an interval over so few says little more.
FEWEST_GROUPS = 6
MOST_CATEGORIES = 12
Change = Literal["better", "same", "worse"]
# what became of the search alone, the best first: found, never found, failed
_SEARCHED: dict[Fate, int] = dict.fromkeys(FATES, 0) | {"never_retrieved": 1, "unparsable": 2, "errored": 2}
_SPENT = {
    "Prompt tokens": "prompt_tokens",
    "Generated tokens": "completion_tokens",
    "Seconds": "elapsed_s",
    "Model calls": "turns",
    "Searches": "searches",
}


def ends(tables: Tables) -> dict[str, Counter[Fate]]:
    """How many questions of each run ended in which way; runs that were only ranked again have none."""
    counted = {run: Counter(row["fate"] for row in rows if row["fate"]) for run, rows in tables.items()}
    return {run: counts for run, counts in counted.items() if counts}


def passages(before: Sequence[Row], after: Sequence[Row]) -> Counter[tuple[Fate, Fate]]:
    """How many questions ended in one way in the run before and in the other way in the run after."""
    earlier = {row["question_id"]: row["fate"] for row in before}
    pairs = ((earlier[row["question_id"]], row["fate"]) for row in after)
    return Counter((old, new) for old, new in pairs if old and new)


def changes(before: Sequence[Row], after: Sequence[Row]) -> dict[tuple[Fate, Fate], Change]:
    """What each way of `passages` is called: whether a question that went it ended better or worse in the run after.

    Where one of the two runs was not asked for answers, only found, never found and failed can be told apart: a page that both
    found is not worse off for the answer that only the other was asked for.
    """
    alike = asked(before) == asked(after)
    order = {name: place if alike else _SEARCHED[name] for place, name in enumerate(FATES)}
    return {
        (old, new): "same" if order[old] == order[new] else "better" if order[new] < order[old] else "worse"
        for old in FATES
        for new in FATES
    }


def asked(rows: Sequence[Row]) -> bool:
    """Whether a run asked for answers."""
    return any(row["cited"] is not None for row in rows)


def broken(tables: Tables) -> list[str]:
    """A plain line for each run whose model hardly searches, or hardly acts at all, with what to look at."""
    lines = []
    for run, rows in tables.items():
        ran = [row for row in rows if row["turns"] is not None and row["fate"] != "errored"]
        silent = sum(not row["searches"] for row in ran)
        turns, valid = (sum(row[name] or 0 for row in ran) for name in ("turns", "valid_turns"))
        found = [f"made no search in {silent} of {len(ran)} questions"] if 2 * silent > len(ran) else []
        found += [f"had a valid action in {valid} of {turns} turns"] if 2 * valid < turns else []
        if found:
            lines.append(
                f"{run} {' and '.join(found)}: look at its turns' raw text under “Question by question” in the report; if "
                "training caused it, take fewer epochs or a lower learning rate"
            )
    return lines


@dataclass(frozen=True)
class Category:
    """The questions of one category: how many, in how many groups that share documents, and the metrics of each run."""

    name: str
    questions: int
    groups: int
    cells: Mapping[tuple[str, str], Cell]  # by metric and run; without intervals where there are too few groups


def categories(tables: Tables, resamples: int) -> list[Category]:
    """Metrics by question category, the largest first. What has no category, and all beyond the largest, are put together.

    Nothing when all questions are of one category. The last run says which a question is of: runs before it may have been
    measured on an earlier ingestion.
    """
    *_, last = tables.values()
    own = {row["question_id"]: row["category"] or "no category" for row in last}
    sizes = Counter(own.values())
    if len(sizes) < 2:
        return []
    ordered = sorted(sizes, key=lambda name: (-sizes[name], name))
    rest = f"{len(ordered) - MOST_CATEGORIES} other categories" if len(ordered) > MOST_CATEGORIES + 1 else None
    names = {name: name if rest is None or place < MOST_CATEGORIES else rest for place, name in enumerate(ordered)}
    shown = {question_id: names[category] for question_id, category in own.items()}
    return [_category(name, tables, shown, resamples) for name in dict.fromkeys(names.values())]


def _category(name: str, tables: Tables, shown: Mapping[str, str], resamples: int) -> Category:
    chosen = [
        sorted((row for row in rows if shown[row["question_id"]] == name), key=lambda row: row["question_id"])
        for rows in tables.values()
    ]
    runs = runs_of(chosen)
    cells = metric_cells(runs, resamples)
    if runs.groups < FEWEST_GROUPS:
        cells = [Cell(cell.metric, cell.run, cell.n, cell.mean, None, None) for cell in cells]
    return Category(name, runs.questions, runs.groups, {(cell.metric, cell.run): cell for cell in cells})


@dataclass(frozen=True)
class Cost:
    """What a run spent of one thing: a question, a question whose page was found, a right answer; None where there is none, or
    a server did not tell what it spent."""

    name: str
    a_question: float | None
    a_found: float | None
    a_right: float | None


def costs(rows: Sequence[Row]) -> list[Cost]:
    """What a run's model spent on all its questions, the failed ones too, shared out; nothing for a run without a model."""
    spent = [row for row in rows if row["turns"] is not None]
    found = sum(row["searches_to_success"] is not None for row in spent)
    right = sum(row["fate"] == "correct" for row in spent)
    told = {name: [row[column] for row in spent] for name, column in _SPENT.items()}
    totals = {name: None if None in amounts else sum(amounts) for name, amounts in told.items()}
    return [
        Cost(name, *(_shared(total, among) for among in (len(spent), found, right)))
        for name, total in totals.items()
        if spent
    ]


def _shared(total: float | None, among: int) -> float | None:
    return None if total is None or not among else total / among


def show_cost(value: float | None) -> str:
    """An amount as people read it, a dash where it is not known or there was nothing to share it out among."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(tables: Tables) -> str:
    """How questions ended and what they cost, as Markdown tables with a column a run."""
    counted = ends(tables)
    rows = []
    for name in FATES:
        if any(counts[name] for counts in counted.values()):
            shares = [f"{counts[name]} ({100 * counts[name] / counts.total():.1f} %)" for counts in counted.values()]
            rows.append((MEANINGS[name][0], *shares))
    shown = markdown_table(("questions that ended", *counted), rows, right=range(1, 1 + len(counted)))
    spent = {run: made for run, rows in tables.items() if (made := costs(rows))}
    if not spent:
        return shown
    header = ("a question / a found page / a right answer", *spent)
    amounts = (
        (row[0].name, *(" / ".join(map(show_cost, (c.a_question, c.a_found, c.a_right))) for c in row))
        for row in zip(*spent.values(), strict=True)
    )
    return f"{shown}\n\n{markdown_table(header, amounts, right=range(1, 1 + len(spent)))}"
