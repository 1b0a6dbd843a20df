"""Rollouts, or the raw questions, scored on questions with known pages → results, one row a question.

Evaluation runs are ordinary rollouts, made greedily on the test split. Their searches are made again, to a greater depth
than the agent was shown, so that Hit@10 and MRR do not end at its top 3. A rollout that failed, or made no search, is a row
all the same, and a miss: nothing is scored over survivors.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from tasks import config
from tasks.artifact import Artifact, provenance, read_provenance, read_rows, table_of, write_table
from tasks.chosen import select
from tasks.errors import ArtifactError, InputError
from tasks.fate import fate, likeness
from tasks.reward import first_success, gt_rank, gt_ranks, in_order_seen, pages_found, pages_wanted, set_f1
from tasks.search.index import Searcher
from tasks.search.query import as_words

SCHEMA = "results/4"
Row = Mapping[str, Any]
_QUESTION = ("question_id", "question", "answers", "answer_locations", "category", "split")


def score(trajectories: Artifact, searcher: Searcher, settings: config.Evaluate, run: str, uri: str) -> Artifact:
    """Score one rollout a question, every search ranked again to `settings.depth`.

    Args:
        searcher: the index and the search settings that the rollouts were made with.
        run: the run's name in tables.

    Raises:
        InputError: there is no rollout, or a question has several.
        ArtifactError: a search made again ranks the page otherwise than the rollout recorded: another index or settings.
    """
    rows = _one_each(read_rows(trajectories), trajectories)
    kept = read_provenance(trajectories)
    asked = kept["settings"]["agent"]["answer"]  # else the agent was told to search and no more
    results = [_scored(row, searcher, settings.depth, run, asked=asked) for row in rows]
    facts = _facts({"trajectories": trajectories}, searcher, settings, run, rollouts=kept)
    return write_table(table_of(results, SCHEMA), uri, SCHEMA, facts)


def score_question_baseline(
    questions: Artifact, searcher: Searcher, settings: config.Evaluate, run: str, uri: str, *, top_k: int
) -> Artifact:
    """Score the raw question as the query: no model, one search, its words taken as plain words.

    Args:
        top_k: pages that the agent is shown, so that "found" means the same as in the runs beside it.

    Raises:
        InputError: the split holds no question.
    """
    chosen = set(select(questions, settings.split, settings.limit, settings.question_id))
    results = []
    for row in read_rows(questions):
        if row["question_id"] in chosen:
            ranks, found = _rank(searcher, as_words(row["question"]), settings.depth, row)
            shown = [rank for rank in ranks if rank <= top_k]
            results.append(
                {
                    **_unanswered(run, row, row["question"], ranks, found),
                    "fate": fate(failed=False, acted=True, found=bool(shown)),
                    "best_rank": _first(ranks),
                    "best_known": True,
                    "seen_ranks": shown,
                    "searches_to_success": 1 if shown else None,
                    "first_hit_rank": _first(shown),
                }
            )
    facts = _facts({"questions": questions}, searcher, settings, run, top_k=top_k)
    return write_table(table_of(results, SCHEMA), uri, SCHEMA, facts)


def rescore(results: Artifact, searcher: Searcher, settings: config.Evaluate, run: str, uri: str) -> Artifact:
    """Rank the first query of each row of a run again, with a searcher of other settings, at no model cost.

    What later searches would have been cannot be known, as they answer to other results: `best_known` is false.

    Args:
        run: name of the new run, such as "base, AND".
    """
    rescored = []
    for row in read_rows(results):
        query = row["first_query"]
        ranks: list[int] = []
        found = None
        if query is not None and row["rollout_id"] is None:  # the raw question, which adds nothing to itself
            ranks, found = _rank(searcher, as_words(query), settings.depth, row)
        elif query is not None:
            ranks, found = _rank(searcher, query, settings.depth, row, question=row["question"])
        rescored.append({**_unanswered(run, row, query, ranks, found), "rollout_id": row["rollout_id"]})
    facts = _facts({"results": results}, searcher, settings, run, results=read_provenance(results))
    return write_table(table_of(rescored, SCHEMA), uri, SCHEMA, facts)


def _facts(
    inputs: Mapping[str, Artifact], searcher: Searcher, settings: config.Evaluate, run: str, **facts: Any
) -> dict[str, Any]:
    inputs = {**inputs, "index": searcher.index}
    search = searcher.settings.model_dump()
    return provenance(inputs, run=run, settings=settings.model_dump(), search=search, **facts)


def _one_each(rows: list[dict[str, Any]], trajectories: Artifact) -> list[dict[str, Any]]:
    if not rows:
        raise InputError("holds no rollout to score", file=trajectories.uri)
    if len({row["question_id"] for row in rows}) < len(rows):
        raise InputError(
            "holds several rollouts of a question; evaluation takes one: one sampling configuration, one sample",
            file=trajectories.uri,
        )
    return rows


def _rank(searcher: Searcher, query: str, depth: int, row: Row, question: str | None = None) -> tuple[list[int], int]:
    """Ranks of the answer locations among the first `depth`, and how many pages came."""
    hits = searcher.search(query, depth, question).hits
    return gt_ranks([(hit.file, hit.page_number) for hit in hits], pages_wanted(row)), len(hits)


def _first(ranks: list[int]) -> int | None:
    return ranks[0] if ranks else None


def _scored(row: Row, searcher: Searcher, depth: int, run: str, *, asked: bool) -> dict[str, Any]:
    """A results row of a rollout; `asked` when its run asked for answers."""
    turns = row["turns"] or []
    valid = sum(turn["failure"] is None for turn in turns)
    counted = [] if row["status"] == "failed" else turns
    made = [(call, s) for call, turn in enumerate(counted, start=1) for s in turn["searches"] or []]
    retrieval = _retrieval(row, [search for _, search in made], searcher, depth)
    success = retrieval["searches_to_success"]
    anls = likeness(row["answer"], row["answers"]) if asked else None
    citations = _citations(row) if asked else {}
    ended = fate(
        failed=row["status"] == "failed",
        # a search where only an answer was allowed could be read
        acted=any(turn["failure"] in (None, "not_an_answer") for turn in turns),
        found=success is not None,
        asked=asked,
        answered=row["outcome"] == "answered",
        cited=bool(citations.get("page_recall")),
        anls=anls,
    )
    return {
        "run": run,
        "rollout_id": row["rollout_id"],
        **{name: row[name] for name in _QUESTION},
        "fate": ended,
        **retrieval,
        "calls_to_success": None if success is None else made[success - 1][0],
        "outcome": row["outcome"],
        "turns": len(turns),
        "valid_turns": valid,
        "anls": anls,
        **citations,
        **{name: row[name] for name in ("prompt_tokens", "completion_tokens", "elapsed_s")},
    }


def _retrieval(row: Row, made: list[Row], searcher: Searcher, depth: int) -> dict[str, Any]:
    """What the searches of a rollout found, each ranked again to `depth`."""
    found: list[list[int]] = []
    seen = [gt_rank(pages_found(search), pages_wanted(row)) for search in made]
    for search, before in zip(made, seen, strict=True):
        ranks, _ = _rank(searcher, search["query"], depth, row, question=row["question"])
        rank = _first(ranks)
        if (rank if rank is not None and rank <= row["top_k"] else None) != before:
            raise ArtifactError(
                f"question {row['question_id']}: the query {search['query']!r} ranked the page {before} in the rollout and "
                f"{rank} now: score with the index and the search settings of the rollouts, or collect again"
            )
        found.append(ranks)
    success = first_success(seen)
    return {
        "first_query": made[0]["query"] if made else None,
        "first_rank": _first(found[0]) if made else None,
        "first_ranks": found[0] if made else [],
        "best_rank": min((ranks[0] for ranks in found if ranks), default=None),
        "best_known": True,
        "seen_ranks": gt_ranks(in_order_seen(map(pages_found, made)), pages_wanted(row)),
        "searches": len(made),
        "searches_to_success": success,
        "first_hit_rank": None if success is None else seen[success - 1],
        "zero_results": sum(not search["results"] for search in made),
    }


def _citations(row: Row) -> dict[str, Any]:
    """Citations against the answer locations, and how many are of pages that a search had shown the model."""
    cited = {(place["file"], place["page"]): place["seen"] for place in row["citations"] or []}
    pages = set_f1(cited, pages_wanted(row))
    documents = set_f1((file for file, _ in cited), (file for file, _ in pages_wanted(row)))
    unknown = None in cited.values()
    seen = {"cited": len(cited), "cited_seen": None if unknown else sum(cited.values())}
    return {**seen, **_named("page", pages), **_named("document", documents)}


def _named(what: str, values: Iterable[float | None]) -> dict[str, Any]:
    return {f"{what}_{part}": value for part, value in zip(("precision", "recall", "f1"), values, strict=True)}


def _unanswered(run: str, row: Row, query: str | None, ranks: list[int], found: int | None) -> dict[str, Any]:
    """A results row of one search at most, that says nothing of turns, answers or cost."""
    return {
        "run": run,
        **{name: row[name] for name in _QUESTION},
        "first_query": query,
        "first_rank": _first(ranks),
        "first_ranks": ranks,
        "best_known": False,
        "searches": int(found is not None),
        "zero_results": int(found == 0),
    }
