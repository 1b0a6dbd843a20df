"""When a stage's earlier result may be taken: same inputs, same settings, same code.

A stage's key is a hash of those three. It is the Prefect cache key and the name of the folder that the stage writes to,
so a hit means that the artifact lies where it would be written, for every run and machine that shares the storage.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import BaseModel

from tasks import hub, storage
from tasks.artifact import Artifact
from tasks.schemas import TABLES

_PACKAGE = "tasks"
_TRIES, _PAUSE_S = 100, 0.02
# What these hold is said, stored, kept alive, asked or fetched, and no result depends on how. Of the schemas those count that the
# code names.
_NO_RESULT = {
    "tasks.agent.fleet",
    "tasks.breaker",
    "tasks.cache",
    "tasks.errors",
    "tasks.folders",
    "tasks.locks",
    "tasks.logs",
    "tasks.network",
    "tasks.processes",
    "tasks.schemas",
    "tasks.server_api",
    "tasks.source",
    "tasks.storage",
    "tasks.training.messages",
    "tasks.unwritten",
    "tasks.watchdog",
}
_BY_KIND = "tasks.exchange.rows"  # finds schemas without naming them
_KNOWN_OTHERWISE = {
    # What a rollout found is scored anew by every stage that takes it on, so that a new reward needs no new rollouts. A model
    # is among the facts, by the fingerprint of what was found.
    "tasks.collect": {"tasks.model", "tasks.reward"},
    "tasks.exchange.adapter": {"tasks.model"},
    # Nor is an adapter another one whose card says otherwise how it was made.
    "tasks.training.launch": {"tasks.model", "tasks.training.card", "tasks.training.lineage", "tasks.markdown"},
    "tasks.training.merge": {"tasks.model"},
}


def stage_key(
    module: str,
    *,
    settings: Mapping[str, BaseModel] | None = None,
    inputs: Mapping[str, Artifact] | None = None,
    facts: Mapping[str, object] | None = None,
) -> str:
    """Key of one execution of a stage: 16 hexadecimal digits.

    Args:
        module: the module that does the work, such as "tasks.process".
        settings: every settings model that can change the result. Leave out what cannot (timeouts, numbers of workers).
        inputs: artifacts that are read; their hashes count, not where they lie.
        facts: other JSON-able things that can change the result.
    """
    content = {
        "code": code_version(module),
        "settings": {name: model.model_dump(mode="json") for name, model in (settings or {}).items()},
        "inputs": {name: [artifact.schema, artifact.sha256] for name, artifact in (inputs or {}).items()},
        "facts": dict(facts or {}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def content_fingerprint(uri: str) -> str:
    """Hash of all files at or below `uri`, or what tells a data set (hf:NAME) from others."""
    return hub.fingerprint(uri) if uri.startswith(hub.PREFIX) else storage.fingerprint(uri)


@functools.cache
def code_version(module: str) -> str:
    """Hash of the source of a module and of all that it uses of this package, directly or not.

    Settings are left out: their values are in the key, and a reworded description changes no result. So is what errors say,
    and how files are stored. Of tables, the schemas count that the code names. It is the same under every version of Python.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digest = hashlib.sha256()
    found = _closure(module)
    named = TABLES.keys() & {text for path in found.values() for text in _texts(path)}
    for schema in sorted(TABLES if _BY_KIND in found else named):
        digest.update(f"{schema}\0{TABLES[schema]}\0".encode())
    for name, source in sorted(found.items()):
        if name.startswith(f"{_PACKAGE}.config"):
            continue
        digest.update(name.encode() + b"\0" + _syntax(source) + b"\0")
        for data in _files_beside(source):
            digest.update(data.name.encode() + b"\0" + data.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _parsed(path: Path) -> ast.Module:
    """A source file's tree.

    Python 3.11 counts the depth of trees for all threads together: while another thread builds one, parsing may end in a
    SystemError (https://github.com/python/cpython/issues/106905), and goes well when tried again.
    """
    source = path.read_text(encoding="utf-8")
    for _ in range(_TRIES):
        try:
            return ast.parse(source)
        except SystemError:
            time.sleep(_PAUSE_S)
    return ast.parse(source)


def _syntax(path: Path) -> bytes:
    """A module's meaning without comments, docstrings, layout and what errors say, so that better words cost nobody a training
    run."""
    tree = _parsed(path)
    of_errors = (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == f"{_PACKAGE}.errors")
    return _meaning(tree, {alias.asname or alias.name for node in of_errors for alias in node.names}).encode()


def _meaning(node: object, errors: Collection[str]) -> str:
    """A tree as text. `ast.dump` gives another one under each version of Python, which differ in what is empty in a tree, and
    in which letters they print.

    Args:
        errors: names of classes whose arguments do not count.
    """
    if isinstance(node, list):
        return f"[{','.join(_meaning(item, errors) for item in node if not _does_nothing(item))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors:
        fields = {"func": node.func}
    elif isinstance(node, ast.JoinedStr):
        fields["values"] = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    # A constant is the only one whose value may be None, so without it says that it is.
    told = (f"{name}={_meaning(fields[name], errors)}" for name in sorted(fields) if fields[name] not in (None, []))
    return f"{type(node).__name__}({','.join(told)})"


def _does_nothing(node: object) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _closure(module: str) -> dict[str, Path]:
    """The modules that a module uses, with itself, and their source files."""
    found: dict[str, Path] = {}
    left_out = (_NO_RESULT | _KNOWN_OTHERWISE.get(module, set())) - {module}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name in left_out or not (source := _source(name)):
            continue
        found[name] = source
        waiting += _names(source)
    if not found:
        raise ModuleNotFoundError(f"{module} is not a module of this project")
    return found


def _files_beside(source: Path) -> list[Path]:
    """A package's data files, such as a template."""
    if source.name != "__init__.py":
        return []
    return sorted(path for path in source.parent.iterdir() if path.is_file() and path.suffix != ".py")


def _names(path: Path) -> list[str]:
    """Names of this package that a source file imports, at any depth of nesting, or has as a text: as a registry names modules
    that are imported when chosen, or a program one that it runs. Not all are modules."""
    found: list[str] = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in [*found, *_texts(path)] if name.startswith(f"{_PACKAGE}.")]


def _texts(path: Path) -> list[str]:
    """The texts that a source file has as constants."""
    constants = (node.value for node in ast.walk(_parsed(path)) if isinstance(node, ast.Constant))
    return [value for value in constants if isinstance(value, str)]


def _source(module: str) -> Path | None:
    """The file of a module of this package; None where there is no such module."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not all(part.isidentifier() for part in parts):
        return None
    base = Path(spec.origin).parent.joinpath(*parts)
    return next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)
