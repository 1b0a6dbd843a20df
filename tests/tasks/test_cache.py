"""Stage keys: they change with inputs, settings and code, and with nothing else."""

import ast
import itertools
import sys
from pathlib import Path

import pytest

from tasks import cache, config
from tasks.artifact import Artifact

PAGES = Artifact("/a/pages.parquet", "ab" * 32, 3, "pages/2")


def _key(**changes: object) -> str:
    arguments: dict = {"settings": {"process": config.Process()}, "inputs": {"pages": PAGES}, "facts": {"model": "m"}}
    return cache.stage_key("tasks.artifact", **(arguments | changes))


def test_same_inputs_settings_and_code_give_the_same_key() -> None:
    assert _key() == _key()


def test_where_an_input_lies_does_not_count_but_its_content_does() -> None:
    moved = Artifact("s3://b/pages.parquet", PAGES.sha256, 3, "pages/2")
    other = Artifact(PAGES.uri, "cd" * 32, 3, "pages/2")
    assert _key(inputs={"pages": moved}) == _key()
    assert _key(inputs={"pages": other}) != _key()


def test_settings_and_facts_count() -> None:
    assert _key(settings={"process": config.Process(min_rank_score=0.5)}) != _key()
    assert _key(facts={"model": "n"}) != _key()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of its own, in place of `tasks`, whose sources a test may change."""
    folder = tmp_path / "stagecode"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "stage.py").write_text("from stagecode import helper\nimport stagecode.inner\n")
    (folder / "helper.py").write_text('"""Words."""\nvalue = 1\n')
    (folder / "other.py").write_text("value = 2\n")
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "engine.py").write_text("value = 3\n")
    (folder / "inner" / "page.html").write_text("<p>")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cache, "_PACKAGE", "stagecode")
    yield folder
    for name in [n for n in sys.modules if n.startswith("stagecode")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "content", "changes"),
    [
        ("stage.py", "from stagecode import helper\nimport stagecode.inner\nx = 1\n", True),
        ("helper.py", "value = 2\n", True),
        ("helper.py", '"""Better words."""\n\nvalue = 1  # as it should be\n', False),
        ("inner/engine.py", "value = 4\n", True),
        ("inner/page.html", "<b>", True),
        ("other.py", "value = 9\n", False),
    ],
)
def test_code_counts_as_far_as_the_stage_uses_it(package: Path, file: str, content: str, changes: bool) -> None:
    version = cache.code_version.__wrapped__
    before = version("stagecode.stage")
    (package / file).write_text(content)
    assert (version("stagecode.stage") != before) == changes


def test_how_it_is_trained_does_not_count_for_what_is_collected_nor_the_agent_for_what_is_trained() -> None:
    collected, trained = cache._closure("tasks.collect"), cache._closure("tasks.training")
    assert "tasks.agent.rollout" in collected
    assert not [name for name in collected if name.startswith("tasks.training")]
    assert "tasks.training.train" in trained
    assert "tasks.agent.protocol" not in trained


def test_what_changes_no_result_does_not_count() -> None:
    for module in ("tasks.collect", "tasks.process", "tasks.training", "tasks.evaluate"):
        assert not cache._closure(module) & {"tasks.errors", "tasks.storage", "tasks.logs"}
    # a new reward scores what was collected, and needs no new rollouts
    assert "tasks.reward" not in cache._closure("tasks.collect")
    assert all("tasks.reward" in cache._closure(module) for module in ("tasks.process", "tasks.evaluate"))


def test_what_other_threads_do_to_a_parse_is_outlived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that Python 3.11 raises now and then while another thread parses; seen in a killed run's second try."""
    expected, parse, calls = cache.code_version("tasks.process"), ast.parse, itertools.count()

    def disturbed(source: str) -> ast.Module:
        if next(calls) % 3:
            raise SystemError("AST constructor recursion depth mismatch (before=63, after=74)")
        return parse(source)

    monkeypatch.setattr(ast, "parse", disturbed)
    cache.code_version.cache_clear()
    assert cache.code_version("tasks.process") == expected
