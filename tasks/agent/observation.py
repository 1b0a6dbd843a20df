"""What the model sees of a search's results: the pages' text, or only their names. Page images have their place here."""

from collections.abc import Callable

from tasks.agent.trajectory import SearchRecord
from tasks.config import Agent

PageText = Callable[[str, int], str]
"""(file, page number from 1) → the page's text."""


def observe(search: SearchRecord, settings: Agent, page_text: PageText) -> str:
    """A search's results as the model reads them, best first, each page's text cut to `max_page_chars`."""
    pages = [
        f"[{rank}] {file} page {page}" + _text(page_text(file, page), settings)
        for rank, file, page, _ in search.results
    ]
    return "\n".join(["<results>", *_note(search), *pages, "</results>"])


def _text(text: str, settings: Agent) -> str:
    if settings.observation == "none":
        return ""
    return "\n" + text[: settings.max_page_chars].strip()


def _note(search: SearchRecord) -> list[str]:
    if not search.results:
        return ["No page was found. Use other words, or fewer."]
    if search.read_as == "words":
        return ["The query could not be read as one and was searched as plain words."]
    return []
