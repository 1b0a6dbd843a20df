"""A family of sibling documents, and the questions that people ask of them, read from one YAML file.

Real collections are full of near-duplicates: last year's annual report and this year's, the manuals of two sizes of the
same machine. So a file holds the pages of a whole family once, with named slots, and under `facts` a column of values
for each slot, one value a document (a shorter column repeats). A page's `concepts` are what can be asked of it: the
answer, the terms with which the house speaks of it (`find`), and several ways in which people ask for it (`ask`), which
the documents of the family take in turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Facts = Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """One page: its heading and its text, in the small markup that `render` knows."""

    heading: str
    text: str


@dataclass(frozen=True)
class Question:
    """What somebody asks of a document, where the answer is, and the query of one who knows the house's terms."""

    text: str
    answer: str
    pages: tuple[int, ...]  # from 1
    expert_query: str


@dataclass(frozen=True)
class Document:
    """One PDF to be, with its questions."""

    file: str
    title: str
    header: str
    category: str
    pages: tuple[Page, ...]
    questions: tuple[Question, ...]


def read_family(path: Path) -> list[Document]:
    """The documents of a family file, in order."""
    family = yaml.safe_load(path.read_text(encoding="utf-8"))
    columns: dict[str, list[Any]] = family["facts"]
    count = max(map(len, columns.values()))
    for name, column in columns.items():
        if count % len(column):
            raise ValueError(f"{path.name}: the {len(column)} values of {name} do not fill {count} documents evenly")
    return [
        _document(family, index, {name: str(column[index % len(column)]) for name, column in columns.items()})
        for index in range(count)
    ]


def _document(family: Mapping[str, Any], index: int, facts: Facts) -> Document:
    return Document(
        file=family["file"].format_map(facts),
        title=family["title"].format_map(facts),
        header=family["header"].format_map(facts),
        category=family["category"],
        pages=tuple(
            Page(page["heading"].format_map(facts), page["text"].format_map(facts)) for page in family["pages"]
        ),
        questions=tuple(_questions(family, index, facts)),
    )


def _questions(family: Mapping[str, Any], index: int, facts: Facts) -> list[Question]:
    concepts = [(number, concept) for number, page in enumerate(family["pages"], 1) for concept in page["concepts"]]
    questions = []
    for turn, (number, concept) in enumerate(concepts, start=index):
        if turn % 6 == 5:  # nobody asks everything of every document
            continue
        text = _wording(concept["ask"], turn, index)
        if len(text.split()) < 11 and turn % 2:  # people rarely put it as bluntly as that
            text = f"{_wording(family['openers'], turn // 2, 3 * index)} {text}"
        also = (concept["also"],) if "also" in concept else ()
        questions.append(
            Question(
                text=text.format_map(facts),
                answer=concept["answer"].format_map(facts),
                pages=(*also, number),
                expert_query=concept["find"].format_map(facts),
            )
        )
    return questions


def _wording(wordings: list[str], turn: int, index: int) -> str:
    """The one whose turn it is: documents of a family, and the concepts of a document, follow one another."""
    return wordings[(turn + index // len(wordings)) % len(wordings)]
