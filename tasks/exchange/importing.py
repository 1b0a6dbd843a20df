"""Files of others, or of our own export, as the artifacts that the next stages take.

trajectories    → trajectories                       process takes them
mined           → mined                              process --source mined takes them
processed       → processed, pairs (and statistics)  format takes them
a format's name → the training set                   finetune takes it

What cannot be used is set aside with its row and the reason, as in ingest.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tasks import artifact, pairs, process, storage
from tasks.agent import prompts
from tasks.agent.message import Image
from tasks.artifact import Artifact
from tasks.beside import run_beside
from tasks.config import Agent, Process
from tasks.errors import ConfigError, InputError
from tasks.exchange import exported, images, rows, training_sets, trajectories
from tasks.images import images_of_all
from tasks.pages import PageStore
from tasks.records import parse
from tasks.reward import Page
from tasks.set_aside import Refused, SetAside, first_reasons, printable, write_set_aside

Row = dict[str, Any]
Progress = Callable[[int, int], None]
SCORING = Process(include_failed=True)
"""How rollouts are scored and paired that come as processed: those that failed stay, as somebody has chosen already."""

_TOLD_ALIKE = ("protocol", "observation")


class _Import:
    """One import: what was set aside, and what else is noted."""

    def __init__(
        self,
        sources: Sequence[str],
        agent: Agent,
        pages: Artifact | None,
        questions: Artifact | None,
        root: str,
        on_progress: Progress,
    ) -> None:
        self.taken = images.Taken(sources[0], root)
        self.sources, self.agent, self.aside = sources, agent, list[SetAside]()
        self.pages, self.questions, self._store = pages, questions, None if pages is None else PageStore(pages)
        self._root, self._on_progress, self._images = root, on_progress, dict[Page, Image | None]()
        self.known = exported.read(sources[0])

    def page_text(self, file: str, page: int) -> str:
        """The text of a page that a rollout saw; none where it saw only names."""
        if self.agent.observation == "none":
            return ""
        return self._knowing(file, page).text(file, page)

    def page_image(self, file: str, page: int) -> Image | None:
        """The image of a page that a rollout saw; none before `find_images`, which finds all that were asked for."""
        self._knowing(file, page)
        return self._images.setdefault((file, page), None)

    def find_images(self) -> None:
        """Render the pages whose images were asked for, unless they are rendered already."""
        if self._store is not None and self._images:
            wanted = images_of_all(self._root, self._store, self.agent, self._images, self._on_progress)
            self._images = run_beside(wanted)

    @cached_property
    def has_pdfs(self) -> bool:
        """Whether any page that is ingested can have an image."""
        return self._store is not None and any(map(self._store.source, self._store.files()))

    def _knowing(self, file: str, page: int) -> PageStore:
        if self._store is None or (file, page) not in self._store:
            raise Refused(
                "unknown_page", f"page {page} of {printable(file)}: ingest it, or import with observation none"
            )
        return self._store

    @cached_property
    def _splits(self) -> dict[str, str]:
        """The split of each ingested question, by its id, and by its text as the model is asked it."""
        if self.questions is None:
            return {}
        asked = artifact.read_rows(self.questions, ["question_id", "question", "split"])
        asked.sort(key=lambda row: row["split"] != "train")  # of questions alike, one that is measured on counts
        return {name: row["split"] for row in asked for name in (row["question_id"], _as_asked(row["question"]))}

    def split_of(self, *names: str) -> str | None:
        """The split of the ingested question with that id or that text as the model is asked it; None where it is none.

        One that is measured on by either is not trained on.
        """
        found = [split for name in names if (split := self._splits.get(name))]
        return next((split for split in found if split != "train"), next(iter(found), None))

    def native(self, record: Row, kind: str, unknown: Counter[str], derived: Iterable[str] = ()) -> Row:
        """A row of our own. Its question's split is the ingested one: what it was in elsewhere must not be trained on here."""
        row = self.with_images(rows.native(record, kind, unknown, derived), kind)
        split = self.split_of(row["question_id"], _as_asked(row["question"]))
        return row | {"split": split or rows.known_split(row["split"])}

    def with_images(self, row: Row, kind: str) -> Row:
        """The row, the page images that it shows stored here."""
        return images.with_images(row, images.columns_of(rows.schema_of(kind)), self.taken.take)

    def facts(self, name: str) -> Row:
        """Provenance of what is imported under a name: what it was exported with, where that is known."""
        was = (self.known.get(name) or exported.Table()).provenance
        agent = was.agent or was.settings.agent or self.agent.model_dump(mode="json")
        inputs = {"pages": self.pages} if self.pages else {}
        return artifact.provenance(
            inputs,
            settings={"agent": agent, **was.settings.model_dump(include={"search", "reward"}, exclude_none=True)},
            agent=agent,
            reward=was.reward,
            prompt_messages=was.prompt_messages or len(prompts.prompt_messages("", self.agent)),
            imported=[printable(source.rstrip("/").rsplit("/", 1)[-1]) for source in self.sources],
            exported=was.model_dump(mode="json", exclude_unset=True),
        )

    def read(self, source: str, name: str, read: Callable[[Row, Counter[str]], Row]) -> Iterator[Row]:
        """The rows of a source that can be used."""
        for file in rows.files_of(source, name):
            shown, found = rows.read(file)
            unknown: Counter[str] = Counter()
            usable = parse(found, lambda record, u=unknown: read(record, u), shown, self.aside)  # type: ignore[misc]
            yield from (
                rows.once(usable, shown, self.aside)
                if name in ("trajectories", "mined", "processed")
                else (row for _, row in usable)
            )
            rows.note_unknown(unknown, shown, self.aside)

    def write(self, kind: str, found: Iterable[Row], uri: str, facts: Mapping[str, Any]) -> Artifact:
        """Store rows as a table.

        Raises:
            InputError: there is none.
        """
        schema = rows.schema_of(kind)
        tables = (artifact.table_of(chunk, schema) for chunk in process.chunks(iter(found)))
        made = artifact.write_tables(tables, uri, schema, facts)
        if not made.rows:
            raise InputError(
                f"no row can be used; {first_reasons(self.aside) or 'the file is empty'}", file=self.sources[0]
            )
        return made


def import_rows(
    what: str,
    sources: Sequence[str],
    agent: Agent,
    pages: Artifact | None,
    questions: Artifact | None,
    uri: str,
    root: str,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Artifact]:
    """Read files as the artifacts named in the module's docstring, and "set_aside_import".

    Args:
        what: "trajectories", "mined", "processed", or the name of a format.
        sources: the file, or folder of a data set. Further: for processed its pairs; for a format the part "val".
        agent: as whose conversations rollouts and examples of others are told.
        pages: ingested pages, for the texts and images that a rollout saw.
        questions: ingested questions, for the splits of rollouts.
        uri: folder for what is written.
        root: storage root, below which page images go.
        on_progress: is called with (pages done, pages to show) after each whose image others' rollouts are told with.

    Raises:
        InputError: there is no such file, or no row of it can be used; or the PDF of a page that is to be shown is not where
            it was; or pairs come with another pipeline's rollouts.
        ConfigError: the agent sees images, and no page has a PDF to tell others' rollouts with.
    """
    work = _Import(sources, agent, pages, questions, root, on_progress)
    if what in ("trajectories", "mined"):
        made = {what: _trajectories(work, sources[0], what, uri)}
    elif what == "processed":
        made = _processed(work, uri)
    else:
        made = {what: _training_set(work, what, uri)}
    return made | {"set_aside_import": write_set_aside(work.aside, storage.join(uri, "set_aside.parquet"), {})}


def _trajectories(work: _Import, source: str, name: str, uri: str) -> Artifact:
    if work.agent.sees_images:
        _ask_for_images(work, source, name)
        work.find_images()
    facts = work.facts(name)
    numbers = itertools.count(1)
    differing: list[str] = []

    def read(record: Row, unknown: Counter[str]) -> Row:
        if "turns" not in record:
            return _told(work, record, next(numbers), trajectories.Notes(unknown, differing))
        row = work.native(record, "trajectories", unknown, derived=["searches"])
        for field in _TOLD_ALIKE:
            told = facts["settings"]["agent"].get(field)
            if isinstance(told, str) and row[field] != told:
                raise Refused(
                    "bad_conversation", f"it was told with {field} {row[field]}, not {told}: say so by --{field}"
                )
        return row

    made = work.write("trajectories", work.read(source, name, read), storage.join(uri, "trajectories.parquet"), facts)
    work.aside += [SetAside(printable(source.rsplit("/", 1)[-1]), None, "rank_differs", text) for text in differing]
    return made


def _told(work: _Import, record: Row, number: int, notes: trajectories.Notes) -> Row:
    return trajectories.read(record, number, work.agent, work.page_text, work.page_image, work.split_of, notes)


def _ask_for_images(work: _Import, source: str, name: str) -> None:
    """Tell others' rollouts once in vain, to know all pages that they show: these are rendered together, not one by one."""

    def tell(record: Row) -> None:
        if "turns" not in record:
            if not work.has_pdfs:
                raise ConfigError(
                    f"observation {work.agent.observation}: no page that is ingested has a PDF, so there are no images to show: "
                    "run ingest with the folder of PDFs (--documents), or import with --observation text or none"
                )
            _told(work, record, 0, trajectories.Notes(Counter(), []))

    for file in rows.files_of(source, name):
        shown, found = rows.read(file)
        for _ in parse(found, tell, shown, []):
            pass


def _processed(work: _Import, uri: str) -> dict[str, Artifact]:
    """Our own rows as they are; another pipeline's are scored anew, and all kept, as they were filtered before."""
    if not _is_ours(work.sources[0]):
        if len(work.sources) > 1:
            raise InputError(
                "rollouts of another pipeline are paired anew, so that no file of pairs is read: leave it out",
                file=work.sources[1],
            )
        told = _trajectories(work, work.sources[0], "processed", uri)
        names = ("processed", "pairs", "statistics")
        made = process.process({"imported": told}, SCORING, uri)
        return dict(zip(names, made, strict=True))
    facts = work.facts("processed")
    kept = work.write(
        "processed",
        work.read(work.sources[0], "processed", lambda record, unknown: work.native(record, "processed", unknown)),
        storage.join(uri, "processed.parquet"),
        facts,
    )
    schema, paired = rows.schema_of("pairs"), storage.join(uri, "pairs.parquet")
    if len(work.sources) > 1 or not storage.is_file(work.sources[0]):
        found = work.read(work.sources[-1], "pairs", lambda record, unknown: work.native(record, "pairs", unknown))
    else:
        found = _paired(kept)
    tables = (artifact.table_of(chunk, schema) for chunk in process.chunks(found))
    return {"processed": kept, "pairs": artifact.write_tables(tables, paired, schema, facts)}


def _is_ours(source: str) -> bool:
    """Whether the first row that can be read is one of our own scored rollouts."""
    _, found = rows.read(rows.files_of(source, "processed")[0])
    return "reasonings" in next((record for _, record in found if isinstance(record, dict)), {})


def _paired(processed: Artifact) -> Iterator[Row]:
    """Pairs of the rollouts that were kept. Those that were not are not here, so that some pairs are missing."""
    candidates: dict[tuple[str, str], dict[str, pairs.Candidate]] = {}
    states: dict[tuple[str, str], tuple[Row, list[Any]]] = {}
    for table in artifact.read_batches(processed):
        for row in table.to_pylist():
            state, start = (row["question_id"], row["state"] or ""), row["prompt_messages"] or 0
            earlier = row["messages"][start : start + (row["state_messages"] or 0)]
            states.setdefault(state, ({"question": row["question"], "split": row["split"]}, earlier))
            pairs.add(candidates.setdefault(state, {}), process.candidates_of(row, row))
    for state in sorted(candidates):
        for pair in pairs.make(candidates[state], SCORING.max_pairs):
            yield process.pair_row(state, *states[state], pair)


def _training_set(work: _Import, what: str, uri: str) -> Artifact:
    table = training_sets.table_of(what)

    def learned(row: Row) -> Row:
        asked = [m["content"] for m in row["prompt"]]
        if table == "reward":
            asked = [_as_asked(text) for text in asked]
        if work.split_of(row["question_id"], *asked) not in (None, "train"):
            raise Refused(
                "held_out", f"question {printable(row['question_id'])} is measured on here, so it is not learned from"
            )
        return row

    def reading(part: str) -> Callable[[Row, Counter[str]], Row]:
        def read(record: Row, unknown: Counter[str]) -> Row:
            if isinstance(record.get("prompt"), list):
                row = rows.native(record, table, unknown)
                if table != "reward":
                    training_sets.refuse_unasked(row["prompt"])
                return work.with_images(learned(row), table)
            return work.with_images(learned(training_sets.read(record, what, part, work.agent, unknown)), table)

        return read

    found = itertools.chain.from_iterable(
        work.read(source, what, reading(part)) for source, part in zip(work.sources, ("train", "val"), strict=False)
    )
    return work.write(table, found, storage.join(uri, f"{what}.parquet"), work.facts(what))


def _as_asked(question: str) -> str:
    return str(prompts.question_message(question)["content"])
