"""Rollouts, or the raw questions, scored on questions with known pages → results, one row a question.

Evaluation runs are ordinary rollouts, made greedily on the test split. Their searches are made again, to a greater depth
than the agent was shown, so that Hit@10 and MRR do not end at its top 3. A rollout that failed, or made no search, is a row
all the same, and a miss: nothing is scored over survivors.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from anls_star import anls_score

from tasks import config
from tasks.artifact import Artifact, provenance, read_provenance, read_rows, table_of, write_table
from tasks.collect import select
from tasks.errors import ArtifactError, InputError
from tasks.reward import best_search, first_success, gt_rank, set_f1
from tasks.search.index import Searcher
from tasks.search.query import as_words

SCHEMA = "results/1"
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
    # else the agent was told to search and no more
    asked = any(row["status"] == "finished" and row["outcome"] != "searched" for row in rows)
    results = [
        {
            "run": run,
            "rollout_id": row["rollout_id"],
            **{name: row[name] for name in _QUESTION},
            **_retrieval(row, searcher, settings.depth),
            "outcome": row["outcome"],
            "turns": len(row["turns"] or []),
            "valid_turns": sum(turn["failure"] is None for turn in row["turns"] or []),
            "anls": _anls(row) if asked else None,
            **(_citations(row) if asked else _NO_CITATIONS),
            **{name: row[name] for name in ("prompt_tokens", "completion_tokens", "elapsed_s")},
        }
        for row in rows
    ]
    kept = read_provenance(trajectories)
    facts = provenance({"trajectories": trajectories}, run=run, settings=settings.model_dump(), rollouts=kept)
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
    chosen = set(select(questions, settings.split, settings.limit))
    if not chosen:
        raise InputError(f"there is no question in split {settings.split!r}", file=questions.uri)
    results = []
    for row in read_rows(questions):
        if row["question_id"] in chosen:
            rank, found = _rank(searcher, as_words(row["question"]), settings.depth, row)
            results.append(
                {
                    **_unanswered(run, row, row["question"], rank, found),
                    "best_rank": rank,
                    "best_known": True,
                    "searches_to_success": 1 if rank is not None and rank <= top_k else None,
                }
            )
    facts = provenance({"questions": questions}, run=run, settings=settings.model_dump(), top_k=top_k)
    return write_table(table_of(results, SCHEMA), uri, SCHEMA, facts)


def rescore(results: Artifact, searcher: Searcher, settings: config.Evaluate, run: str, uri: str) -> Artifact:
    """Rank the first query of each row of a run again, with a searcher of other settings, at no model cost.

    What later searches would have been cannot be known, as they answer to other results: `best_known` is false.

    Args:
        run: name of the new run, such as "base, AND".
    """
    rescored = []
    for row in read_rows(results):
        query, rank, found = row["first_query"], None, None
        if query is not None and row["rollout_id"] is None:  # the raw question, which adds nothing to itself
            rank, found = _rank(searcher, as_words(query), settings.depth, row)
        elif query is not None:
            rank, found = _rank(searcher, query, settings.depth, row, question=row["question"])
        rescored.append({**_unanswered(run, row, query, rank, found), "rollout_id": row["rollout_id"]})
    facts = provenance({"results": results}, run=run, settings=settings.model_dump(), results=read_provenance(results))
    return write_table(table_of(rescored, SCHEMA), uri, SCHEMA, facts)


def _one_each(rows: list[dict[str, Any]], trajectories: Artifact) -> list[dict[str, Any]]:
    if not rows:
        raise InputError("holds no rollout to score", file=trajectories.uri)
    if len({row["question_id"] for row in rows}) < len(rows):
        raise InputError(
            "holds several rollouts of a question; evaluation takes one: one sampling configuration, one sample",
            file=trajectories.uri,
        )
    return rows


def _rank(searcher: Searcher, query: str, depth: int, row: Row, question: str | None = None) -> tuple[int | None, int]:
    """Rank of the best-ranked answer location among the first `depth`, and how many pages came."""
    hits = searcher.search(query, depth, question).hits
    return gt_rank([(hit.file, hit.page_number) for hit in hits], _pages(row)), len(hits)


def _pages(row: Row) -> list[tuple[str, int]]:
    return [(place["document"], place["page"]) for place in row["answer_locations"] or []]


def _retrieval(row: Row, searcher: Searcher, depth: int) -> dict[str, Any]:
    made = [] if row["status"] == "failed" else [s for turn in row["turns"] or [] for s in turn["searches"] or []]
    ranks: list[int | None] = []
    for search in made:
        # `searched` already holds the question's words where the settings add them
        rank, _ = _rank(searcher, search["searched"], depth, row)
        if (rank if rank is not None and rank <= row["top_k"] else None) != search["gt_rank"]:
            raise ArtifactError(
                f"question {row['question_id']}: the query {search['searched']!r} ranked the page {search['gt_rank']} in the "
                f"rollout and {rank} now: score with the index and the search settings of the rollouts, or collect again"
            )
        ranks.append(rank)
    best = best_search(ranks)
    return {
        "first_query": made[0]["query"] if made else None,
        "first_rank": ranks[0] if made else None,
        "best_rank": None if best is None else ranks[best],
        "best_known": True,
        "searches": len(made),
        "searches_to_success": first_success([search["gt_rank"] for search in made]),
        "zero_results": sum(not search["results"] for search in made),
    }


def _anls(row: Row) -> float | None:
    """ANLS* of an answer, a list, against the nearest of its reference answers, lists too (Peer et al., 2024).

    In the package's terms a tuple is one of several and a list is a set to be matched: missing and surplus items both
    cost. No answer scores 0; a question without a reference is not counted.
    """
    references = [list(reference) for reference in row["answers"] or []]
    if not references:
        return None
    return float(anls_score(tuple(references), list(row["answer"]))) if row["answer"] else 0.0


def _citations(row: Row) -> dict[str, float]:
    cited = [(place["file"], place["page"]) for place in row["citations"] or []]
    pages = set_f1(cited, _pages(row))
    documents = set_f1((file for file, _ in cited), (file for file, _ in _pages(row)))
    return {**_named("page", pages), **_named("document", documents)}


def _named(what: str, values: Iterable[float | None]) -> dict[str, Any]:
    return {f"{what}_{part}": value for part, value in zip(("precision", "recall", "f1"), values, strict=True)}


_NO_CITATIONS: dict[str, None] = {**_named("page", [None] * 3), **_named("document", [None] * 3)}


def _unanswered(run: str, row: Row, query: str | None, rank: int | None, found: int | None) -> dict[str, Any]:
    """A results row of one search at most, that says nothing of turns, answers or cost."""
    return {
        "run": run,
        "rollout_id": None,
        **{name: row[name] for name in _QUESTION},
        "first_query": query,
        "first_rank": rank,
        "best_rank": None,
        "best_known": False,
        "searches": int(found is not None),
        "searches_to_success": None,
        "zero_results": int(found == 0),
        "outcome": None,
        "turns": None,
        "valid_turns": None,
        "anls": None,
        **_NO_CITATIONS,
        "prompt_tokens": None,
        "completion_tokens": None,
        "elapsed_s": None,
    }
