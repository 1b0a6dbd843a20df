"""Runs are compared where a page's rank means the same in both, and refused where it does not."""

from pathlib import Path

import pytest

from tasks import config
from tasks.artifact import Artifact, read_provenance
from tasks.compare import compare
from tasks.errors import InputError
from tasks.evaluate import rescore, score_question_baseline
from tasks.search.index import open_index
from tests.tasks.test_evaluate import (
    EVALUATE,
    SUBJECTS,
    TOP_K,
    baseline,
    index_of,
    question,
    rollout,
    scored,
    stored_questions,
    turn,
)

ASKED = question(0)


def _compared(folder: Path, *runs: Artifact) -> Artifact:
    return compare(runs, 100, str(folder / "comparison.parquet"))


def test_runs_measured_under_other_conditions_are_not_compared(tmp_path: Path) -> None:
    """A page at rank 25 would count .04 to the MRR of a run of depth 50, and nothing to that of one of depth 10."""
    index = index_of(tmp_path, SUBJECTS)
    searcher = open_index(index, config.Search())
    base = scored(tmp_path, searcher, [rollout(ASKED, turn(searcher, ASKED, "pumps"))])
    _compared(tmp_path, baseline(tmp_path, searcher, [ASKED]), base)

    deeper = baseline(tmp_path, searcher, [ASKED], depth=50)
    with pytest.raises(InputError, match=r"depth 10, 'question' with 50.* run `drag evaluate`"):
        _compared(tmp_path, deeper, base)

    questions, uri = stored_questions(tmp_path, [ASKED]), str(tmp_path / "shown less.parquet")
    shown_less = score_question_baseline(questions, searcher, EVALUATE, "question", uri, top_k=1)
    with pytest.raises(InputError, match=f"top_k {TOP_K}, 'question' with 1"):
        _compared(tmp_path, shown_less, base)

    other = index_of(tmp_path / "other", SUBJECTS[:2])
    elsewhere = baseline(tmp_path / "other", open_index(other, config.Search()), [ASKED])
    with pytest.raises(InputError, match=f"index {index.sha256}, 'question' with {other.sha256}"):
        _compared(tmp_path, elsewhere, base)


def test_runs_ranked_again_by_another_search_are_compared_with_each_other_and_with_themselves(tmp_path: Path) -> None:
    index = index_of(tmp_path, SUBJECTS)
    searcher, strict = (open_index(index, config.Search(operator=operator)) for operator in ("or", "and"))
    base = scored(tmp_path, searcher, [rollout(ASKED, turn(searcher, ASKED, "pumps"))])
    runs = {"typed": baseline(tmp_path, searcher, [ASKED]), "base": base}
    again = [
        rescore(run, strict, EVALUATE, f"{name} and", f"{tmp_path}/{name} and.parquet") for name, run in runs.items()
    ]
    twice = rescore(again[0], searcher, EVALUATE, "and back", f"{tmp_path}/back.parquet")
    for compared in ([*again, base], [twice, *again]):
        made = _compared(tmp_path, *compared)
        assert set(read_provenance(made)["inputs"].values()) == {run.sha256 for run in compared}
