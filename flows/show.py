"""A rollout as people read it on a terminal: each turn's reasoning, queries and results; the answer and where it is from."""

import re
from collections.abc import Collection

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from tasks.agent.observation import PageText
from tasks.agent.trajectory import SearchRecord, Trajectory, Turn
from tasks.reward import Page

_AROUND = 70  # characters of a page before and after the first word of the query


def show_turn(turn: Turn, page_text: PageText, console: Console, answer_locations: Collection[Page] = ()) -> None:
    """One model call and what it led to; results that are answer locations, where these are known, are marked."""
    lines = []
    if turn.reasoning:
        lines.append(f"[italic dim]{escape(turn.reasoning.strip())}[/]")
    for search in turn.searches:
        lines += _search(search, page_text, answer_locations)
    if turn.failure:
        lines.append(f"[red]{turn.failure}[/] {escape(turn.failure_detail or '')}")
    if turn.action != "search":
        lines.append(f"[dim]{escape(turn.raw_text.strip())}[/]")
    console.print(Panel("\n".join(lines), title=f"turn {turn.turn}", title_align="left"))


def _search(search: SearchRecord, page_text: PageText, answer_locations: Collection[Page]) -> list[str]:
    lines = [f"[bold cyan]search[/] {escape(search.query)}"]
    if search.read_as == "words":
        lines.append("  [yellow]not a valid query: searched as plain words[/]")
    for rank, file, page, _ in search.results:
        lines.append(f"  {rank}. {escape(file)}, page {page}{mark((file, page), answer_locations)}")
        lines.append(f"     [dim]{escape(snippet(page_text(file, page), search.searched))}[/]")
    return lines if search.results else [*lines, "  nothing found"]


def mark(page: Page, answer_locations: Collection[Page]) -> str:
    """What stands behind a page with the answer."""
    return " [bold green]← the page[/]" if page in answer_locations else ""


def snippet(text: str, query: str) -> str:
    """Where a page has the query's first word that it has at all, with what is around it, on one line.

    >>> snippet("The mass of the pump is 3 kg.", "heavy pump")
    'The mass of the pump is 3 kg.'
    """
    line = " ".join(text.split())
    found = (re.search(rf"\b{re.escape(word)}", line, re.IGNORECASE) for word in re.findall(r"\w{3,}", query))
    at = next((match.start() for match in found if match), 0)
    start, end = max(0, at - _AROUND), at + _AROUND
    return ("… " if start else "") + line[start:end].strip() + (" …" if end < len(line) else "")


def show_answer(trajectory: Trajectory, console: Console) -> None:
    """The answer with its citations, or why there is none."""
    if trajectory.answer:
        console.print(f"[bold green]answer[/] {escape('; '.join(trajectory.answer))}")
        for file, page in trajectory.citations:
            console.print(f"  from {escape(file)}, page {page}")
    else:
        console.print(f"[yellow]no answer[/]: {trajectory.outcome} {escape(trajectory.failure_detail or '')}")
