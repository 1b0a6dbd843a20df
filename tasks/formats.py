"""Training sets, made of scored rollouts and preference pairs.

A format is a function that yields examples, and a line in `FORMATS`. Examples are neutral: the question, what was said
since the prompt, and what is to be learned; the prompt itself is put before them here, and is byte for byte the one that
is served under the same agent settings. The reference pipeline's JSONL is made of the same examples (tasks/jsonl.py).

A query that repeats the names of the prompt's worked examples is never what is to be learned; dpo may reject it, and reward
scores it like any other.

    <uri>/sft_best.parquet   <uri>/dpo.parquet   …   <uri>/jsonl/sft_best_train.jsonl   …
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from tasks import artifact, jsonl, storage
from tasks.agent import prompts
from tasks.agent.message import Message, scored_query
from tasks.agent.prompts import repeats_examples
from tasks.artifact import Artifact
from tasks.config import Agent, Format, FormatName
from tasks.errors import EmptyError
from tasks.pairs import fold
from tasks.schemas import TABLES

_CHUNK = 1024  # examples

Example = dict[str, Any]
Say = Callable[[str | None, str], list[Message]]
"""(reasoning, query) → the assistant's turn that searches so, as messages."""


@dataclass(frozen=True)
class Source:
    """What examples are made of."""

    processed: Artifact
    pairs: Artifact
    settings: Format

    def rollouts(self, *columns: str) -> Iterator[dict[str, Any]]:
        """Those columns of the scored rollouts that are learned from, row by row; only a batch is in memory."""
        for table in artifact.read_batches(self.processed, [*columns, "split"]):
            yield from filter(self._is_learned_from, table.to_pylist())

    def preferences(self) -> Iterator[dict[str, Any]]:
        """The pairs that are learned from, row by row."""
        for table in artifact.read_batches(self.pairs):
            yield from filter(self._is_learned_from, table.to_pylist())

    def _is_learned_from(self, row: Mapping[str, Any]) -> bool:
        return self.settings.split in ("all", row["split"])


def sft_best(source: Source, say: Say) -> Iterator[Example]:
    """State, a question or a conversation gone on from → the best query of a rollout. Of a state's, identical ones are one.

    A query of a later turn stands behind the thought that came first, for its own is about pages that the state does not show.
    With `best_per_question`, only so many of them: by rank score, then by effort score, then the shorter.
    """
    found: dict[tuple[str, str], dict[str, Example]] = {}
    columns = ("question_id", "question", "state", "best_query", "best_rank", "rank_score", "effort", "reasonings")
    for row in source.rollouts(*columns, "messages", "prompt_messages", "state_messages"):
        row["reasoning"] = next(iter(row.pop("reasonings")), None)
        if row["best_query"] is not None and not repeats_examples(row["best_query"], row["question"]):
            start = row.pop("prompt_messages")
            row["earlier"] = row.pop("messages")[start : start + (row["state_messages"] or 0)]
            own, key = found.setdefault((row["question_id"], row["state"] or ""), {}), fold(row["best_query"])
            own[key] = min(own.get(key, row), row, key=_merit)
    for state in sorted(found):
        for row in sorted(found[state].values(), key=_merit)[: source.settings.best_per_question]:
            yield {
                **_weights(row),
                "gt_rank": row["best_rank"],
                "earlier": row["earlier"],
                "completion": say(row["reasoning"], row["best_query"]),
            }


def _merit(row: Example) -> tuple[Any, ...]:
    query = row["best_query"]
    return -row["rank_score"], -row["effort"], len(query), query, row["reasoning"] or "", row["best_rank"]


def sft_trajectory(source: Source, say: Say) -> Iterator[Example]:
    """Question → the whole conversation of a rollout that found the page, wasted no turn and answered.

    Where the answer is wrong, the conversation up to its last search.

    A search that was only read later wasted its turn: the conversation goes on with a complaint. One in which images gave way is
    not as the model saw it turn by turn.
    """
    columns = ("question_id", "question", "outcome", "best_rank", "rank_score", "effort", "searches")
    for row in source.rollouts(*columns, "search_messages", "messages", "prompt_messages", "as_answered", "right"):
        start, messages = row["prompt_messages"], row["messages"]
        spoken = {at for at in range(start, len(messages)) if messages[at]["role"] == "assistant"}
        useful = {*row["search_messages"], max(spoken, default=None)}
        shown = all(search["shown"] is not False for search in row["searches"])
        own = not any(repeats_examples(search["query"], row["question"]) for search in row["searches"])
        found = row["best_rank"] is not None and row["outcome"] == "answered" and own
        if found and spoken == useful and shown and min(spoken) >= (row["as_answered"] or 0):
            yield {
                **_weights(row),
                "gt_rank": row["best_rank"],
                "earlier": [],
                "completion": messages[start : max(row["search_messages"] if row["right"] is False else spoken) + 1],
            }


def sft_context(source: Source, say: Say) -> Iterator[Example]:
    """Question, and earlier searches with what they found → a search that ranked the page better than all of them.

    Not behind messages that are no longer as the model saw them, as images gave way.
    """
    columns = ("question_id", "question", "effort", "searches", "reasonings", "search_messages", "as_answered")
    for row in source.rollouts(*columns, "messages", "prompt_messages"):
        best_before: float | None = None
        tried = zip(row["search_messages"], row["searches"], row["reasonings"], strict=True)
        # one message may hold several searches, none of which saw the others' results
        for at, turn in groupby(tried, key=lambda t: t[0]):
            _, search, reasoning = max(turn, key=lambda t: t[1]["rank_score"])
            score, own = search["rank_score"], not repeats_examples(search["query"], row["question"])
            if best_before is not None and score > best_before and own and at >= (row["as_answered"] or 0):
                yield {
                    **_weights({**row, "rank_score": score}),
                    "gt_rank": search["gt_rank"],
                    "earlier": row["messages"][row["prompt_messages"] : at],
                    "completion": say(reasoning, search["query"]),
                }
            best_before = max(score, best_before or 0.0)


def _weights(row: Example) -> Example:
    return {name: row[name] for name in ("question_id", "question", "rank_score", "effort")}


def dpo(source: Source, say: Say) -> Iterator[Example]:
    """State → a better query, rather than a worse one."""
    for pair in source.preferences():
        if repeats_examples(pair["chosen"], pair["question"]):
            continue
        yield {
            **{name: pair[name] for name in ("question_id", "question", "chosen_score", "rejected_score")},
            "rank_score": pair["chosen_score"],
            "effort": pair["chosen_effort"],
            "gt_rank": pair["chosen_rank"],
            "earlier": pair["earlier"],
            "chosen": say(pair["chosen_reasoning"], pair["chosen"]),
            "rejected": say(pair["rejected_reasoning"], pair["rejected"]),
        }


def reward(source: Source, say: Say) -> Iterator[Example]:
    """(Question, query) → score, of all searches of the rollouts and of both sides of the pairs; identical ones once.

    The pairs bring queries of rollouts that never found the page, which the filters may have taken out.
    """
    found: dict[tuple[str, str], Example] = {}

    def add(row: Example, query: str, score: float, rank: int | None, effort: float) -> None:
        made = {"question_id": row["question_id"], "question": row["question"], "query": query, "score": score}
        made |= {"effort": effort, "gt_rank": rank}
        key = row["question_id"], fold(query)
        found[key] = min(found.get(key, made), made, key=lambda r: (-r["score"], -r["effort"], r["query"]))

    for row in source.rollouts("question_id", "question", "searches", "effort"):
        for search in row["searches"]:
            add(row, search["query"], search["rank_score"], search["gt_rank"], row["effort"])
    for pair in source.preferences():
        for which in ("chosen", "rejected"):
            add(pair, pair[which], *(pair[f"{which}_{name}"] for name in ("score", "rank", "effort")))
    yield from (found[key] for key in sorted(found))


@dataclass(frozen=True)
class Kind:
    """A format: the schema of its table, what yields its examples, and what to change when there are none."""

    schema: str
    examples: Callable[[Source, Say], Iterator[Example]]
    when_empty: str
    conversation: bool = False  # shows turns as they were collected


FORMATS: dict[FormatName, Kind] = {
    "sft_best": Kind("sft/2", sft_best, "no kept rollout found its page; collect more samples"),
    "sft_trajectory": Kind(
        "sft/2",
        sft_trajectory,
        "no kept rollout found its page, answered and wasted no turn, all its images in the model's context; collect more "
        "samples, with worked examples in the prompt, or train on sft_best",
        conversation=True,
    ),
    "sft_context": Kind(
        "sft/2",
        sft_context,
        "no kept rollout searched again and found more; collect with max_iterations of 3 or more and more samples, or "
        "train on sft_best",
        conversation=True,
    ),
    "dpo": Kind(
        "dpo/3",
        dpo,
        "there are no preference pairs; collect several samples a question, and process with max_pairs above 0",
    ),
    "reward": Kind("reward/3", reward, "no kept rollout made a search; process with include_failed"),
}


def format_training(
    processed: Artifact, pairs: Artifact, settings: Format, agent: Agent, uri: str
) -> dict[str, Artifact]:
    """Make the training sets that `settings` names.

    All rows of a question are on one side of train and val, by hash of the question's id.

    Args:
        agent: the agent as it will be served, which need not be as it was collected (worked examples are in the prompt of
            an untrained model, not in that of a trained one).
        uri: folder for what is written.

    Returns:
        The artifact of each format by its name, and "jsonl" for the folder of JSONL files when it was asked for.

    Raises:
        EmptyError: a format has no example, or none of them fell into the training part.
        ConfigError: conversations are shown that were collected under another protocol or view of pages than the agent has.
    """
    source = Source(processed, pairs, settings)
    facts = artifact.provenance(
        {"processed": processed, "pairs": pairs},
        settings=settings.model_dump(mode="json"),
        reward=artifact.read_provenance(processed).get("settings", {}).get("reward"),
        agent=prompts.told_by(agent),
        prompt_fingerprint=prompts.prompt_fingerprint(agent),
        prompt_messages=len(prompts.prompt_messages("", agent)),
    )
    names = list(dict.fromkeys(settings.formats))
    if any(FORMATS[name].conversation for name in names):
        _refuse_other_conversations(processed, agent)
    made: dict[str, Artifact] = {
        name: artifact.write_tables(
            _tables(name, source, agent), storage.join(uri, f"{name}.parquet"), FORMATS[name].schema, facts
        )
        for name in names
    }
    if settings.jsonl:
        files = [f"{name}_{part}.jsonl" for name in names for part in ("train", "val")]
        made["jsonl"] = jsonl.write(_lines(names, source), files, storage.join(uri, "jsonl"), facts)
    return made


def _tables(name: FormatName, source: Source, agent: Agent) -> Iterator[pa.Table]:
    """A format's rows, in tables, so that conversations are never all in memory."""
    kind = FORMATS[name]
    examples = kind.examples(source, lambda reasoning, query: [prompts.search_message(reasoning, query, agent)])
    common = {
        "format": name,
        "tools": prompts.tools_json(agent),
        "prompt_fingerprint": prompts.prompt_fingerprint(agent),
    }
    parts: set[str] = set()
    while chunk := list(islice(examples, _CHUNK)):
        rows = []
        for example in chunk:
            part = side(example["question_id"], source.settings.train_ratio)
            earlier = example.get("earlier", [])
            if earlier and not kind.conversation:
                _refuse_other_conversations(source.processed, agent)
            prompt = [*prompts.prompt_messages(example["question"], agent), *earlier]
            row = {**common, **example, "split": part, "prompt": prompt}
            if "query" in example:
                row |= scored_query(example["question"], example["query"])
            rows.append({column: row[column] for column in TABLES[kind.schema].names})
            parts.add(part)
        yield artifact.table_of(rows, kind.schema)
    if not parts:
        learned = source.settings.split
        which = "" if learned == "all" else f" for the {learned} questions, which alone are learned from"
        raise EmptyError(f"the training set {name} is empty{which}: {kind.when_empty}")
    if "train" not in parts:
        raise EmptyError(
            f"no question of {name} fell into the training part: raise train_ratio, or collect more questions"
        )


def _lines(names: list[FormatName], source: Source) -> Iterator[tuple[str, Example]]:
    for name in names:
        for example in FORMATS[name].examples(source, jsonl.say):
            yield f"{name}_{side(example['question_id'], source.settings.train_ratio)}.jsonl", example


@functools.lru_cache(maxsize=1)
def _refuse_other_conversations(processed: Artifact, agent: Agent) -> None:
    """A conversation is only what a model will be served if it was collected under the same protocol and view of pages."""
    prompts.refuse_other_conversations(artifact.read_provenance(processed)["agent"], agent)


def side(question_id: str, train_ratio: float) -> str:
    """ "train" or "val": the same for all rows of a question, on every machine; more go to "train" as the ratio rises."""
    digest = hashlib.sha256(f"train/val\0{question_id}".encode()).digest()
    return "train" if int.from_bytes(digest[:8]) / 2**64 < train_ratio else "val"
