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
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from tasks import hub, storage
from tasks.artifact import Artifact

_PACKAGE = "tasks"
_TRIES, _PAUSE_S = 100, 0.02
# What these hold is said, stored or kept alive, and no result depends on it.
_NO_RESULT = {
    f"{_PACKAGE}.{name}" for name in ("errors", "folders", "locks", "logs", "processes", "storage", "watchdog")
}
# What a rollout found is scored anew by every stage that takes it on, so that a new reward needs no new rollouts.
_SCORED_LATER = {"tasks.collect": {"tasks.reward"}}


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
    """Hash of the source of a module and of all that it imports from this package, directly or not.

    Settings are left out: their values are in the key, and a reworded description changes no result. So is what errors say,
    and how files are stored.
    """
    digest = hashlib.sha256()
    for name in sorted(n for n in _closure(module) if not n.startswith(f"{_PACKAGE}.config")):
        digest.update(name.encode() + b"\0" + _syntax(_source(name)) + b"\0")
        for data in _files_beside(_source(name)):
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
    """A module's meaning without comments, docstrings and layout, so that better words cost nobody a training run."""
    tree = _parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree).encode()


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    left_out = (_NO_RESULT | _SCORED_LATER.get(module, set())) - {module}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name in left_out:
            continue
        seen.add(name)
        source = _source(name)
        waiting += _imports(source)
        if source.name == "__init__.py":  # its modules may be found by name in a registry
            waiting += [f"{name}.{path.stem}" for path in source.parent.glob("*.py") if path != source]
    return seen


def _files_beside(source: Path) -> list[Path]:
    """A package's data files, such as a template."""
    if source.name != "__init__.py":
        return []
    return sorted(path for path in source.parent.iterdir() if path.is_file() and path.suffix != ".py")


def _imports(path: Path) -> list[str]:
    """Names of this package's modules that a source file imports, at any depth of nesting."""
    found: list[str] = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    ours = {name for name in found if name.startswith(f"{_PACKAGE}.")}
    return [name for name in ours if _is_module(name)]


def _is_module(name: str) -> bool:
    parent, _, last = name.rpartition(".")
    folder = Path(_source(parent)).parent if _source(parent).name == "__init__.py" else None
    return folder is not None and ((folder / f"{last}.py").is_file() or (folder / last / "__init__.py").is_file())


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} is not a module of this project")
    return Path(spec.origin)
