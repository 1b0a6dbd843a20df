"""The data of a report's browser for trajectories: what each run did with each question, small enough for one file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.fate import MEANINGS
from tasks.reward import pages_found, pages_wanted

Row = Mapping[str, Any]

MAX_BYTES = 4_000_000
_TEXT, _LONG = 400, 1200  # characters of short and of long texts that are kept


def embedded(results: Mapping[str, Sequence[Row]], trajectories: Mapping[str, Sequence[Row]]) -> str:
    """JSON to stand in a script element: runs, and questions with each run's ranks, queries and turns.

    When all would take more than `MAX_BYTES`, questions whose first rank differs between the last two runs go in first,
    then the others, each in the order of their ids; `all` says how many there are. No character of it can end the script
    element or begin a comment.
    """
    runs = list(results)
    rows = {run: {row["question_id"]: row for row in found} for run, found in results.items()}
    rollouts = {run: {row["question_id"]: row for row in found} for run, found in trajectories.items()}
    ids = sorted(rows[runs[-1]])

    def changed(question_id: str) -> bool:
        return len({rows[run][question_id]["first_rank"] for run in runs[-2:]}) > 1

    kept: dict[str, str] = {}
    size = 0
    for question_id in sorted(ids, key=lambda id_: not changed(id_)):
        entry = _json(_question(question_id, rows, rollouts))
        size += len(entry) + 1
        if size > MAX_BYTES:
            break
        kept[question_id] = entry
    questions = ",".join(kept[question_id] for question_id in ids if question_id in kept)
    return f'{{"runs":{_json(runs)},"all":{len(ids)},"questions":[{questions}]}}'


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _cut(text: str | None, limit: int) -> str | None:
    if text is None or len(text) <= limit:
        return text
    return text[:limit] + " …"


def _question(
    question_id: str, rows: Mapping[str, Mapping[str, Row]], rollouts: Mapping[str, Mapping[str, Row]]
) -> dict[str, Any]:
    *_, last = rows.values()
    row = last[question_id]
    wanted = set(pages_wanted(row))
    made = {run: found[question_id] for run, found in rollouts.items() if question_id in found}
    # the raw question counts as the runs beside it
    beside = next((rollout["top_k"] for rollout in made.values()), None)
    return {
        "id": question_id,
        "question": _cut(row["question"], _LONG),
        "category": row["category"] or "",
        "answers": [_cut(", ".join(reference), _TEXT) for reference in row["answers"] or []],
        "pages": [list(page) for page in sorted(wanted)],
        "runs": [
            {
                "first": found[question_id]["first_rank"],
                "searches": found[question_id]["searches"],
                "shown": made[run]["top_k"] if run in made else beside,
                "best": found[question_id]["best_rank"] if found[question_id]["best_known"] else None,
                "end": MEANINGS[fate][0] if (fate := found[question_id]["fate"]) else None,
                "query": _cut(found[question_id]["first_query"], _TEXT),
                "rollout": _rollout(made.get(run), wanted),
            }
            for run, found in rows.items()
        ],
    }


def _rollout(row: Row | None, wanted: set[tuple[str, int]]) -> dict[str, Any] | None:
    if row is None:
        return None
    cited = {(place["file"], place["page"]): place["seen"] for place in row["citations"] or []}
    silent = not any(turn["searches"] for turn in row["turns"] or [])
    return {
        "failed": row["status"] == "failed",
        "outcome": row["outcome"],
        "detail": _cut(row["failure_detail"], _TEXT),
        "seconds": None if row["elapsed_s"] is None else round(row["elapsed_s"], 1),
        "turns": [_turn(turn, wanted, silent=silent) for turn in row["turns"] or []],
        "answer": _cut(", ".join(row["answer"] or []), _LONG) or None,
        "cited": [[*page, page in wanted, seen] for page, seen in cited.items()],
    }


def _turn(turn: Row, wanted: set[tuple[str, int]], *, silent: bool) -> dict[str, Any]:
    """A turn; as it came where it was not understood, or where its rollout never searched, else as what it was understood as."""
    return {
        "reasoning": _cut(turn["reasoning"], _LONG),
        "action": turn["action"],
        "failure": turn["failure"],
        "raw": _cut(turn["raw_text"], _LONG) if silent or turn["failure"] else None,
        "searches": [
            {
                "query": _cut(search["query"], _TEXT),
                "searched": _cut(search["searched"], _TEXT) if search["searched"] != search["query"] else None,
                "words": search["read_as"] == "words",
                "rank": search["gt_rank"],
                "results": [[*page, page in wanted] for page in pages_found(search)],
            }
            for search in turn["searches"] or []
        ],
    }
