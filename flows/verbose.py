"""What an agent did with a question, turn by turn, on the terminal: `drag evaluate --verbose`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.show import mark, show_turn
from tasks.agent.observation import PageText
from tasks.agent.trajectory import SearchRecord, Turn
from tasks.fate import MEANINGS, Fate
from tasks.reward import Page, pages_wanted

Row = Mapping[str, Any]


def show_questions(run: str, results: Sequence[Row], rollouts: Sequence[Row], page_text: PageText) -> None:
    """Each question of a run with its turns, one after the other, in the order of their ids.

    Args:
        results: rows of results/4.
        rollouts: rows of the trajectories that these are of; none for the raw question, which takes no turns.
    """
    console = Console(stderr=True)
    made = {row["question_id"]: row for row in rollouts}
    for result in sorted(results, key=lambda row: str(row["question_id"])):
        console.rule(f"[bold]{escape(run)}[/] · {escape(result['question_id'])}", align="left")
        console.print(f"[bold]{escape(result['question'])}[/]")
        answers = " or ".join("; ".join(answer) for answer in result["answers"] or [])
        console.print(f"[dim]answer: {escape(answers or 'not given')}[/]")
        console.print(f"[dim]on: {escape('; '.join(_named(place) for place in sorted(set(pages_wanted(result)))))}[/]")
        rollout = made.get(result["question_id"])
        if rollout is None:
            console.print(f"[bold cyan]search[/] {escape(result['first_query'] or '')}")
        else:
            _show_turns(result, rollout, page_text, console)
        likeness = "" if result["anls"] is None else f", ANLS* {result['anls']:.2f}"
        console.print(f"[bold]{_end(result['fate'])}[/]: {_first(result)}{likeness}")


def show_ends(runs: Mapping[str, Sequence[Row]]) -> None:
    """A table: how each question ended in each run, and what it cost. `runs` are rows of results/4 by run."""
    table = Table(title="Questions", title_justify="left")
    for name in ("question", "run", "first search", "searches", "ended", "ANLS*", "tokens", "seconds"):
        table.add_column(name, justify="left" if name in ("question", "run", "ended") else "right")
    for run, rows in runs.items():
        for row in sorted(rows, key=lambda row: str(row["question_id"])):
            spent = row["prompt_tokens"], row["completion_tokens"]
            tokens = None if None in spent else sum(spent)
            table.add_row(
                escape(row["question_id"]),
                escape(run),
                _rank(row),
                str(row["searches"]),
                _end(row["fate"]),
                *("–" if value is None else f"{value:{form}}" for value, form in ((row["anls"], ".2f"), (tokens, ","))),
                "–" if row["elapsed_s"] is None else f"{row['elapsed_s']:.1f}",
            )
    Console(stderr=True).print(table)


def _show_turns(result: Row, rollout: Row, page_text: PageText, console: Console) -> None:
    wanted = pages_wanted(result)
    for row in rollout["turns"] or []:
        show_turn(_turn(row), page_text, console, wanted)
    if not rollout["answer"]:
        console.print(f"[yellow]no answer[/]: {rollout['outcome']} {escape(rollout['failure_detail'] or '')}")
        return
    console.print(f"[bold green]answer[/] {escape('; '.join(rollout['answer']))}")
    for cited in rollout["citations"] or []:
        place = cited["file"], cited["page"]
        made_up = " [red]which no search had shown[/]" if cited["seen"] is False else ""
        console.print(f"  cites {escape(_named(place))}{mark(place, wanted)}{made_up}")


def _turn(row: Row) -> Turn:
    """A stored turn."""
    searches = [
        SearchRecord(
            **{name: search[name] for name in SearchRecord.__slots__ if name != "results"},
            results=[(hit["rank"], hit["file"], hit["page_number"], hit["score"]) for hit in search["results"] or []],
        )
        for search in row["searches"] or []
    ]
    return Turn(**{**{name: row[name] for name in Turn.__slots__}, "searches": searches})


def _end(fate: Fate | None) -> str:
    return "–" if fate is None else MEANINGS[fate][0]


def _rank(result: Row) -> str:
    if not result["searches"]:
        return "no search"
    return "missed" if result["first_rank"] is None else f"rank {result['first_rank']}"


def _first(result: Row) -> str:
    return f"first search {_rank(result)}" if result["searches"] else _rank(result)


def _named(page: Page) -> str:
    return f"{page[0]}, page {page[1]}"
