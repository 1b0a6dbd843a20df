"""Mined queries from a scripted model over a real index: scored as searched, never done twice, and what is learned from them."""

from pathlib import Path
from typing import Any

import pytest

from flows.collect import collect
from flows.improve import steps
from flows.mine import mine
from flows.prepare import prepare, process
from tasks import config, storage
from tasks.agent.prompts import prompt_messages
from tasks.agent.protocol import as_stored
from tasks.artifact import read_rows
from tasks.errors import CollectError
from tasks.refs import load_ref
from tasks.search.index import open_index
from tasks.stages import StageRun
from tests.model_server import ModelServer, Reply, Status
from tests.small_collection import TOPICS, ingest_small, searcher

AGENT = config.Agent(protocol="tags", max_iterations=3)
SELF_TEST = 4


def sampled(request: dict[str, Any], call: int) -> Reply:
    """Queries in turn: some find the page at once, some below another, some do not find it."""
    asked = next(m["content"] for m in reversed(request["messages"]) if m["content"].startswith("Question:"))
    topic = next((t for t in TOPICS if t in asked), "lamp")
    queries = [f"mass {topic}", f"read {topic}", f"MASS  {topic}", "read OR safety", "before", "nothing here"]
    return Reply(f"<search>{queries[call % len(queries)]}</search>")


def _mine(root: str, url: str, **chosen: Any) -> config.MineRun:
    model = {name: chosen.pop(name) for name in ("agent", "search") if name in chosen}
    return config.MineRun(
        storage=root,
        **{"agent": AGENT.model_copy(update={"examples": True})} | model,
        server=config.Server(base_url=url, model="base", max_retries=0, concurrency=4),
        mine=config.Mine.model_validate({"split": "all", "shard_size": 4} | chosen),
    )


def _rows(run: StageRun) -> list[dict[str, Any]]:
    return read_rows(run.artifacts["mined"])


@pytest.mark.parametrize("expand", ["none", "question"])
def test_queries_rank_as_searching_directly_ranks_them(
    tmp_path: Path, documents: Path, expand: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root, search = str(tmp_path / "store"), config.Search(expand=expand)
    ingest_small(root, documents)
    with ModelServer(sampled) as server:
        (run,) = mine(_mine(root, server.url, limit=6, search=search))
        asked = server.requests[SELF_TEST:]
    assert "with a valid action" in capsys.readouterr().err
    rows = _rows(run)
    assert len(rows) == len(asked) == 6 * config.Mine().samples
    assert {row["sampling"] for row in rows} == set(config.Mine().sampling_config)
    index = open_index(load_ref(root, "index"), search)
    ranks = set()
    for row in rows:
        (turn,) = row["turns"]
        (made,) = turn["searches"]
        direct = index.search(made["query"], row["top_k"], row["question"])
        pages = [(hit.file, hit.page_number) for hit in direct.hits]
        (wanted,) = row["answer_locations"]
        page = wanted["document"], wanted["page"]
        assert made["searched"] == direct.searched
        assert made["gt_rank"] == (pages.index(page) + 1 if page in pages else None)
        assert (row["state"], row["outcome"]) == (None, "searched")
        ranks.add(made["gt_rank"])
    assert 1 in ranks
    assert len(ranks) > 1
    # the prompt is the agent's own, with worked examples, whatever the number of its turns
    told = {
        row["question"]: prompt_messages(row["question"], AGENT.model_copy(update={"examples": True})) for row in rows
    }
    assert all(request["messages"] in told.values() for request in asked)
    for first in range(0, len(asked), config.Mine().samples):  # samples of a question together, for the server's cache
        together = asked[first : first + config.Mine().samples]
        assert sum(request["messages"] == together[0]["messages"] for request in together) > 4

    prepare(config.PrepareRun(storage=root, source="mined", agent=AGENT, format=_formats()))
    best = read_rows(load_ref(root, "sft_best"))
    assert best
    questions = {row["question_id"]: row["question"] for row in rows}
    assert all(_said(row["prompt"]) == prompt_messages(questions[row["question_id"]], AGENT) for row in best)
    preferred = read_rows(load_ref(root, "dpo"))
    assert preferred
    assert all(_said(row["prompt"]) == prompt_messages(questions[row["question_id"]], AGENT) for row in preferred)
    assert {0.0, 1.0} <= {row["score"] for row in read_rows(load_ref(root, "reward"))}


def _said(stored: list[Any]) -> list[Any]:
    """Messages as they were before Parquet put a null where there are no images."""
    return [as_stored(message) for message in stored]


def _formats() -> config.Format:
    return config.Format(formats=["sft_best", "dpo", "reward"], split="all")


def test_nothing_is_mined_twice_and_more_samples_only_add(storage_root: str, documents: Path) -> None:
    root, failing = storage_root, True

    def script(request: dict[str, Any], call: int) -> Reply | Status:
        # by number, not by seed: the seeds follow the documents' paths and bytes, and of a run's few none might be chosen
        return Status(503) if failing and call > SELF_TEST and call % 4 == 0 else sampled(request, call)

    ingest_small(root, documents)
    with ModelServer(script) as server:
        with pytest.raises(CollectError, match="server_error"):
            mine(_mine(root, server.url, limit=5, samples=4))
        calls, failing = server.calls, False
        (run,) = mine(_mine(root, server.url, limit=5, samples=4))
        failed = sum(row["attempt"] > 1 for row in _rows(run))
        assert failed == 5 * 4 / 4
        assert server.calls - calls == SELF_TEST + failed
        assert all(row["status"] == "finished" for row in _rows(run))

        calls = server.calls
        assert mine(_mine(root, server.url, limit=5, samples=4))[0].cached
        assert server.calls == calls
        (more,) = mine(_mine(root, server.url, limit=6, samples=6))
        assert server.calls - calls == SELF_TEST + 6 * 6 - 5 * 4
        assert {row["rollout_id"] for row in _rows(run)} < {row["rollout_id"] for row in _rows(more)}


def test_conversations_are_gone_on_from_and_learned_from_as_they_were(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        asked = config.Server(base_url=server.url, model="base")
        chosen = config.Collect(split="all", limit=3)
        collect(config.CollectRun(storage=root, agent=AGENT, server=asked, collect=chosen))
    collected = {row["question_id"]: row for row in read_rows(load_ref(root, "trajectories"))}
    with ModelServer(sampled) as server:
        found, run = mine(_mine(root, server.url, states="both", found=True, limit=4))
        sent = server.requests[SELF_TEST:]
        calls = server.calls
        assert [run.cached for run in mine(_mine(root, server.url, states="both", found=True, limit=4))] == [True, True]
        assert server.calls == calls
        # questions alone were mined with them, and are not mined again
        mine(_mine(root, server.url, limit=4))
        assert server.calls == calls
        mine(_mine(root, server.url, states="both", found=True, limit=4))
    assert found.artifacts["states"].rows == len(TOPICS) + 3  # its second turn; the third had to answer

    # the conversation after the prompt, before the second turn
    earlier = {id_: _said(row["messages"][2:4]) for id_, row in collected.items()}
    rows = _rows(run)
    assert len(rows) == len(sent) == (4 + 3) * config.Mine().samples
    with_examples = AGENT.model_copy(update={"examples": True})
    for row in rows:
        after = earlier[row["question_id"]] if row["state"] else []
        assert _said(row["messages"][:-1]) == [*prompt_messages(row["question"], with_examples), *after]
        assert row["state_messages"] == len(after)
        assert {"role": row["messages"][-1]["role"], "turns": len(row["turns"])} == {"role": "assistant", "turns": 1}
    assert {row["question_id"] for row in rows if row["state"]} == set(collected)
    assert all(request["messages"] in [_said(row["messages"][:-1]) for row in rows] for request in sent)

    prepare(config.PrepareRun(storage=root, source="mined", agent=AGENT, format=_formats()))
    questions = {row["question_id"]: row["question"] for row in rows}
    for name in ("sft_best", "dpo"):
        lengths = set()
        for row in read_rows(load_ref(root, name)):
            prompt = prompt_messages(questions[row["question_id"]], AGENT)
            assert _said(row["prompt"]) in (prompt, prompt + earlier.get(row["question_id"], []))
            lengths.add(len(row["prompt"]) - len(prompt))
        assert lengths == {0, 2}
    process(config.ProcessRun(storage=root, source="both"))
    assert {row["state"] for row in read_rows(load_ref(root, "processed"))} > {None}
    assert load_ref(root, "statistics")
    both = {row["rollout_id"] for row in read_rows(load_ref(root, "processed"))}
    assert both & {row["rollout_id"] for row in rows}
    assert both & {row["rollout_id"] for row in collected.values()}


def test_nights_of_mined_queries_are_taken_by_date(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(sampled) as server:
        for dt in ("2026-11-22", "2026-11-23"):
            mine(_mine(root, server.url, dt=dt, order="new-and-hardest", limit=3, samples=4))
    nights = config.Nights.model_validate({"since": "2026-11-22"})
    process(config.ProcessRun(storage=root, source="mined", nights=nights, process=config.Process(include_failed=True)))
    rows = read_rows(load_ref(root, "processed"))
    assert len(rows) == 2 * 3 * 4
    assert len({row["question_id"] for row in rows}) == 6  # the second night took questions that the first had not
    assert not storage.exists(storage.join(root, "refs", "mined.json"))


@pytest.mark.parametrize(
    ("states", "names"),
    [
        (None, ["ingest", "collect", "prepare", "finetune", "evaluate"]),
        ("questions", ["ingest", "mine", "prepare", "finetune", "evaluate"]),
        ("trajectories", ["ingest", "collect", "mine", "prepare", "finetune", "evaluate"]),
    ],
)
def test_the_loop_mines_where_its_recipe_says_so(states: Any, names: list[str]) -> None:
    mining = config.Mine(states=states) if states else None
    settings = config.Improve(ingest=config.Ingest(documents="folder"), agent=AGENT, mine=mining)
    taken = {step.name: chosen for step, chosen in steps(settings)}
    assert list(taken) == names
    preparing = taken["prepare"]
    assert isinstance(preparing, config.PrepareRun)
    assert preparing.source == ("mined" if states else "trajectories")
    for name in {"collect", "mine"} & taken.keys():
        asking = taken[name]
        assert isinstance(asking, config.ModelRun)
        assert asking.agent == AGENT.model_copy(update={"examples": True})
