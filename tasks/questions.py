"""Questions with known pages → questions/1 with splits, and set_aside/1 for what could not be used.

A row is {id, question, answers, answer_locations: [{document, page}], category}. Other spellings that the reference
pipeline's and MADQA's data sets have are read too: `question_id` for id; `answer` or `answer_variants` for answers;
`evidence` for answer_locations; `file` for document, `page_number` for page, and "file:page" for a whole location;
`document_category` for category. Answers are a list of accepted answers, each a list of its parts; a flat list of texts
is read as that many accepted answers of one part, and a single text as the one accepted answer. Pages count from 1.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from tasks import artifact, hub, records, storage
from tasks.artifact import Artifact
from tasks.config import Ingest
from tasks.errors import ConfigError, InputError
from tasks.pages import PageStore
from tasks.set_aside import Refused, SetAside, first_reasons, printable, write_set_aside
from tasks.splits import assign_splits

Location = tuple[str, int]


class _Question(NamedTuple):
    question_id: str
    question: str
    answers: list[list[str]]
    answer_locations: list[Location]
    category: str | None
    dropped: list[str]  # what is wrong with the locations that are left out


def read_questions(
    settings: Ingest, pages: Artifact, uri: str, set_aside_uri: str, *, sources: Mapping[str, str] | None = None
) -> tuple[Artifact, Artifact]:
    """Read, check and split `settings.questions` into questions/1 at `uri`, in the order of their ids.

    Splits are assigned before the include and exclude lists apply, so that these move no question between splits.

    Args:
        sources: what is read → hash of its content, for the provenance.

    Raises:
        InputError: there is no such file or data set, no question of it can be used, or a name in an include or exclude
            list matches nothing.
        ConfigError: `settings.questions` is empty or of no known kind.
    """
    if settings.questions is None:
        raise ConfigError(f"no questions are given: set questions to a .jsonl or .parquet file, or {hub.FORM}")
    store = PageStore(pages)
    set_aside: list[SetAside] = []
    named: set[str] = set(store.files())  # what include and exclude lists may name
    kept: dict[str, tuple[str, int, _Question]] = {}
    for source, rows in _sources(settings.questions):
        for row, question in records.parse(rows, lambda record: _read(record, store, named), source, set_aside):
            if question.question_id in kept:
                first = "row {1} of {0}".format(*kept[question.question_id])
                detail = f"{printable(question.question_id)}, first in {first}"
                set_aside.append(SetAside(source, row, "duplicate_id", detail))
                continue
            kept[question.question_id] = (source, row, question)
            set_aside += [SetAside(source, row, "location_dropped", detail) for detail in question.dropped]
    if not kept:
        raise InputError(
            f"no usable question; {first_reasons(set_aside) or 'the file is empty'}", file=settings.questions
        )
    questions = [kept[question_id] for question_id in sorted(kept)]
    documents = [[document for document, _ in q.answer_locations] for _, _, q in questions]
    original = _originals(store, {document for named_by in documents for document in named_by})
    splits = assign_splits(
        [[original[document] for document in named_by] for named_by in documents],
        settings.train_ratio,
        settings.dev_ratio,
        settings.split_salt,
    )
    include, exclude = _names(settings.include_json, named), _names(settings.exclude_json, named)
    table = []
    for (source, row, question), (group, split) in zip(questions, splits, strict=True):
        names = {question.question_id, *(document for document, _ in question.answer_locations)}
        if (include is not None and not names & include) or (exclude is not None and names & exclude):
            set_aside.append(SetAside(source, row, "excluded", printable(question.question_id)))
        else:
            table.append(_row(question, group, split))
    if not table:
        raise InputError("the include and exclude lists leave no question", file=settings.questions)
    facts = artifact.provenance(
        {"pages": pages},
        stage="ingest questions",
        sources=sources or {},
        settings=settings.model_dump(include={"train_ratio", "dev_ratio", "split_salt"}),
    )
    written = artifact.write_table(artifact.table_of(table, "questions/1"), uri, "questions/1", facts)
    return written, write_set_aside(set_aside, set_aside_uri, facts)


def _originals(store: PageStore, documents: Collection[str]) -> dict[str, str]:
    """Each document → the first by name of those with the very same text, so that no copy of what is trained on is tested on."""
    first: dict[str, str] = {}
    return {
        document: document if (text := store.text_hash(document)) is None else first.setdefault(text, document)
        for document in sorted(documents)
    }


def _row(question: _Question, group: str, split: str) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "question": question.question,
        "answers": question.answers,
        "answer_locations": [{"document": document, "page": page} for document, page in question.answer_locations],
        "category": question.category,
        "split": split,
        "group": group,
    }


def _sources(questions: str) -> Iterator[tuple[str, Iterator[records.Record]]]:
    """(name for messages, rows) of the file, or of each split of the data set."""
    if questions.startswith(hub.PREFIX):
        yield from hub.read_dataset(questions)
        return
    source = printable(questions.rsplit("/", 1)[-1])
    if questions.endswith(".jsonl"):
        yield source, records.read_jsonl(questions)
    elif questions.endswith(".parquet"):
        yield source, records.read_parquet(questions)
    else:
        raise ConfigError(f"{questions}: questions are a .jsonl or .parquet file, or {hub.FORM}")


def _read(record: dict[str, Any], store: PageStore, named: set[str]) -> _Question:
    """One checked question; what it is called and where it lies is added to `named` even if it is refused.

    Raises:
        Refused: why it cannot be used.
    """
    question_id = records.identifier(records.field(record, "id", "question_id"), "id").strip()
    if not question_id:
        raise Refused("missing_field", "id is blank")
    named.add(question_id)
    question = records.text(records.field(record, "question"), "question").strip()
    if not question:
        raise Refused("empty_question", printable(question_id))
    answers = answers_of(records.field(record, "answers", "answer_variants", "answer"))
    category = record.get("category") or record.get("document_category")
    if category is not None:
        category = records.text(category, "category")
    locations, wrong = _locations(records.field(record, "answer_locations", "evidence"), store, named)
    if not locations:
        raise wrong[0] if wrong else Refused("bad_location", "there is none")
    return _Question(question_id, question, answers, locations, category, [refused.detail for refused in wrong])


def answers_of(value: Any) -> list[list[str]]:
    """Accepted answers, each a list of parts; see the module's docstring.

    Raises:
        Refused: they are neither.
    """
    accepted = [value] if isinstance(value, str) else value
    if not isinstance(accepted, list) or not accepted:
        raise Refused("bad_answers", f"a {type(value).__name__}" if value else "there is none")
    if all(isinstance(answer, str) for answer in accepted):
        accepted = [[answer] for answer in accepted]
    if not all(isinstance(answer, list) and answer for answer in accepted):
        raise Refused("bad_answers", "neither a list of texts nor a list of lists of texts")
    parts = [[records.text(part, "an answer") for part in answer] for answer in accepted]
    if not all(part.strip() for answer in parts for part in answer):
        raise Refused("bad_answers", "an answer is blank")
    return parts


def _locations(value: Any, store: PageStore, named: set[str]) -> tuple[list[Location], list[Refused]]:
    """The locations that exist, each once, in their order; and what is wrong with the others."""
    if not isinstance(value, list):
        raise Refused("bad_location", f"answer locations are a {type(value).__name__}, not a list")
    good: dict[Location, None] = {}
    wrong: list[Refused] = []
    for item in value:
        try:
            document, page = location_of(item)
            named.add(document)
            if not store.has_file(document):
                raise Refused("unknown_document", printable(document))
            if (document, page) not in store:
                raise Refused("unknown_page", f"page {page} of {printable(document)}")
        except Refused as refused:
            wrong.append(refused)
        else:
            good[document, page] = None
    return list(good), wrong


def location_of(item: Any) -> Location:
    """(document, page number from 1); see the module's docstring.

    Raises:
        Refused: it is none.
    """
    if isinstance(item, dict):
        document = records.text(records.field(item, "document", "file"), "document")
        return document, records.whole(records.field(item, "page", "page_number"), "page")
    document, colon, page = records.text(item, "an answer location").rpartition(":")
    if not colon or not document or not (page.isascii() and page.isdigit()) or len(page) > 9:
        raise Refused("bad_location", f"{printable(str(item))}, not 'file:page'")
    return document, int(page)


def _names(uri: str | None, known: set[str]) -> set[str] | None:
    """The document names and question ids of an include or exclude list.

    Raises:
        InputError: it is no JSON list of texts, or a name in it matches nothing.
    """
    if uri is None:
        return None
    if not storage.is_file(uri):
        raise InputError("there is no such file; check the path", file=uri)
    try:
        names = json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({printable(str(error))})", file=uri) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("must be a JSON list of document names and question ids", file=uri)
    if unknown := sorted(set(names) - known):
        shown = ", ".join(printable(name) for name in unknown[:5])
        raise InputError(f"{len(unknown)} names match no document and no question id: {shown}", file=uri)
    return set(names)
