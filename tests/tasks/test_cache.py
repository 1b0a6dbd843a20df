"""Stage keys: they change with inputs, settings and code, and with nothing else."""

import ast
import itertools
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import cache, config
from tasks.artifact import Artifact
from tasks.schemas import TABLES

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
    (folder / "errors.py").write_text("class ConfigError(Exception): pass\nclass InputError(Exception): pass\n")
    (folder / "stage.py").write_text("from stagecode import helper\nimport stagecode.inner\n")
    (folder / "helper.py").write_text('"""Words."""\nvalue = 1\n')
    (folder / "other.py").write_text("value = 2\n")
    (folder / "inner" / "__init__.py").write_text('ENGINES = {"engine": "stagecode.inner.engine"}\n')
    (folder / "inner" / "engine.py").write_text("value = 3\n")
    (folder / "inner" / "unused.py").write_text("value = 3\n")
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
        ("inner/unused.py", "value = 4\n", False),
        ("other.py", "value = 9\n", False),
    ],
)
def test_code_counts_as_far_as_the_stage_uses_it(package: Path, file: str, content: str, changes: bool) -> None:
    version = cache.code_version.__wrapped__
    before = version("stagecode.stage")
    (package / file).write_text(content)
    assert (version("stagecode.stage") != before) == changes


_CODE = """from stagecode.errors import ConfigError, InputError as Wrong
from elsewhere import Refused


class Strange(ConfigError):
    pass


def check(value, limit=None):
    if value is None:
        raise ConfigError("give a value")
    if value > 3:
        raise Wrong(f"{value} is too large", file="a", row=value) from None
    if not value:
        raise Refused("no_value", "0")
    return f"{value!r:>{limit}}"
"""
_SAME = {
    "comment": ("give a value", 'give a value")  # so'),
    "docstrings": ("None):\n", 'None):\n    "What it is for."\n'),
    "docstring of a class": ("    pass", '    """Said."""'),
    "text below a name": ("\n\nclass", '\n"""What Refused is for."""\n\nclass'),
    "layout": ("value > 3", "(value>3)"),
    "what an error says": ("give a value", "a value, please"),
    "how it says it": ('"give a value"', 'f"{value}" + advice(value)'),
    "what one under another name says": ("is too large", "is above 3"),
    "where it was": ("row=value", "row=value + 1"),
}
_OTHER = {
    "condition": ("value > 3", "value > 4"),
    "kind of number": ("value > 3", "value > 3.0"),
    "truth": ("value > 3", "value > True"),
    "nothing": ("value is None", "value is ..."),
    "default": ("limit=None", "limit=0"),
    "no default": ("limit=None", "limit"),
    "which error": ("raise ConfigError", "raise Wrong"),
    "no error": ("raise ConfigError(", "ConfigError("),
    "its cause": (" from None", ""),
    "why a row is refused": ('"no_value", "0"', '"no_value", "none"'),
    "format": (":>", ":<"),
    "text": ("return f", 'return "" or f'),
    "base": ("(ConfigError):", "(Wrong):"),
    "no return": ("    return f", "    f"),
}


def _version(package: Path, code: str) -> str:
    (package / "helper.py").write_text(code)
    return cache.code_version.__wrapped__("stagecode.helper")


@pytest.mark.parametrize("change", [*_SAME, *_OTHER])
def test_words_do_not_count_and_everything_else_does(package: Path, change: str) -> None:
    old, new = (_SAME | _OTHER)[change]
    assert old in _CODE
    changed = _version(package, _CODE.replace(old, new, 1)) != _version(package, _CODE)
    assert changed == (change in _OTHER)


_LITERALS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0),
    st.floats(0, allow_nan=False, allow_infinity=False),
    st.text(),
    st.binary(),
)
_PARTS = st.tuples(st.text(), st.text(), st.lists(_LITERALS), st.sampled_from(["pass", "return", "value = value"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=_PARTS, other=_PARTS)
def test_code_is_the_same_where_its_values_and_statements_are(package: Path, one: tuple, other: tuple) -> None:
    versions = []
    for documented, said, values, statement in (one, other):
        lines = [
            "from stagecode.errors import ConfigError",
            "def check(value):",
            f"    {documented!r}",
            f"    if value not in {values!r}: raise ConfigError({said!r})",
            f"    {statement}",
        ]
        versions.append(_version(package, "\n".join(lines)))
    assert (versions[0] == versions[1]) == (repr(one[2:]) == repr(other[2:]))


def test_every_version_of_python_gives_code_the_same_version(package: Path) -> None:
    """On one storage, images may have another Python than a laptop. This key was computed by 3.11, 3.12 and 3.13."""
    letters = 'NEW = "\U0001fae8 é"\n'  # 3.12 took the first for a letter that can be printed, 3.11 did not
    assert _version(package, _CODE + letters) == "bd23c7efd8f51d9a"


def test_how_it_is_trained_does_not_count_for_what_is_collected_nor_the_agent_for_what_is_trained() -> None:
    collected, trained = cache._closure("tasks.collect"), cache._closure("tasks.training.launch")
    assert "tasks.agent.rollout" in collected
    assert not [name for name in collected if name.startswith("tasks.training")]
    assert {"tasks.training.train", "tasks.training.ranks"} <= trained.keys()  # programs that it starts
    assert "tasks.agent.protocol" not in trained


def test_what_changes_no_result_does_not_count() -> None:
    for module in ("tasks.collect", "tasks.process", "tasks.training.launch", "tasks.evaluate"):
        assert not cache._closure(module).keys() & {"tasks.errors", "tasks.storage", "tasks.logs", "tasks.model"}
    assert not cache._closure("tasks.collect").keys() & {
        *("tasks.agent.fleet", "tasks.agent.selftest", "tasks.breaker", "tasks.unwritten")
    }
    # a new reward scores what was collected, and needs no new rollouts
    assert "tasks.reward" not in cache._closure("tasks.collect")
    assert all("tasks.reward" in cache._closure(module) for module in ("tasks.process", "tasks.evaluate"))
    # chosen by name, each of them
    assert {"tasks.search.whoosh_engine", "tasks.search.tantivy_engine"} <= cache._closure("tasks.search.index").keys()
    assert "tasks.model" in cache._closure("tasks.report")  # which says where no hub gave it


def test_the_schemas_of_other_tables_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or results with one more column would make everything be collected and trained again."""
    stages = ["tasks.collect", "tasks.process", "tasks.training.launch", "tasks.evaluate", "tasks.exchange.importing"]

    def versions() -> dict[str, str]:
        cache.code_version.cache_clear()
        return {stage: cache.code_version(stage) for stage in stages}

    before = versions()
    for schema, of in {"results/4": {"tasks.evaluate"}, "trajectories/2": {"tasks.collect", "tasks.process"}}.items():
        with monkeypatch.context() as patch:
            patch.setitem(TABLES, schema, TABLES[schema].append(pa.field("more", pa.string())))
            changed = {stage for stage, version in versions().items() if version != before[stage]}
        assert changed >= of | {"tasks.exchange.importing"}
        assert "tasks.training.launch" not in changed
        assert ("tasks.collect" in changed) == ("tasks.collect" in of)
    assert versions() == before


def test_what_is_no_module_has_no_version() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"tasks\.nothing is not a module"):
        cache.code_version("tasks.nothing")


def test_whatever_is_named_is_there() -> None:
    root = Path(cache.__file__).parents[1]
    named = "".join(path.read_text() for folder in ("flows", "tasks") for path in (root / folder).rglob("*.py"))
    stages = set(re.findall(r"(?:stage_key|code_version)\(\s*\"(tasks\.[a-z_.]+)\"", named))
    assert {"tasks.collect", "tasks.training.launch", "tasks.search.index"} <= stages
    # a package of no more than words uses nothing, and would never count as changed
    assert [stage for stage in stages if "\ndef " not in cache._source(stage).read_text()] == []
    left_out = cache._NO_RESULT.union(cache._KNOWN_OTHERWISE, *cache._KNOWN_OTHERWISE.values())
    assert [name for name in left_out if not cache._source(name)] == []


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
