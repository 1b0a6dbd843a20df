"""An index comes from storage that others may write to: whatever its pickles name, nothing in it runs."""

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import whoosh.codec.whoosh3
import whoosh.filedb.structfile
import whoosh.index

from tasks import config
from tasks.artifact import Artifact, fetch_folder, provenance, write_folder
from tasks.errors import ArtifactError
from tasks.search.index import build_index, open_index
from tests.tasks.test_search_index import page, write_pages
from tests.tasks.training.test_pickles import Attack

WHOOSH = config.Index(engine="whoosh")
EMPTY = 2  # pickles of the empty index that Whoosh begins with, reads and replaces
QUERIES = ["revenue", '"net revenue"', "reven*", "5"]


class Swap:
    """Counts what is pickled, and puts an attack in the place of one of them."""

    def __init__(self, place: int | None, attack: object) -> None:
        self.place, self.attack, self.count = place, attack, 0

    def __call__(self, written: object) -> object:
        self.count += 1
        return self.attack if self.count - 1 == self.place else written


def build(folder: Path, swap: Swap, patch: pytest.MonkeyPatch) -> Artifact:
    """An index in which one of the objects that Whoosh pickles is another."""
    dump, dumps = pickle.dump, pickle.dumps
    patch.setattr(whoosh.filedb.structfile, "dump_pickle", lambda obj, file, protocol: dump(swap(obj), file, protocol))
    patch.setattr(whoosh.codec.whoosh3, "dumps", lambda obj, protocol: dumps(swap(obj), protocol))
    of_schema = SimpleNamespace(dumps=lambda obj, p: dumps(swap(obj), p), PicklingError=pickle.PicklingError)
    patch.setattr(whoosh.index, "pickle", of_schema)
    # enough of one word for a list of postings that is kept in blocks, and of another for one that is kept with its word
    texts = [f"Net revenue of {number} pages, revenue" for number in range(9)]
    pages = write_pages([page(text, number=number) for number, text in enumerate(texts, 1)], folder)
    built = build_index(pages, WHOOSH, str(folder / "index"))
    patch.undo()
    return built


def search(index: Artifact) -> list[int]:
    searcher = open_index(index, config.Search())
    return [len(searcher.search(query, 20).hits) for query in QUERIES]


def pickled(tmp_path_factory: pytest.TempPathFactory) -> int:
    counted = Swap(None, None)
    with pytest.MonkeyPatch.context() as patch:
        assert search(build(tmp_path_factory.mktemp("counted"), counted, patch)) == [9, 9, 9, 1]
    return counted.count


def test_a_pickle_anywhere_in_a_whoosh_index_is_not_run(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    for place in range(EMPTY, pickled(tmp_path_factory)):
        folder = tmp_path_factory.mktemp("attacked")
        trace = folder / "it-ran"
        index = build(folder, Swap(place, Attack(trace)), monkeypatch)
        try:
            search(index)
        except ArtifactError as error:
            refused.append(str(error))
        assert not trace.exists()
    assert len(refused) >= 3, "the list of segments, a table of names, postings"
    assert all("names posix.mkdir" in said for said in refused)


def test_the_attack_works_where_nothing_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, ran = EMPTY, []
    while len(ran) < 3:
        folder = tmp_path / str(place)
        folder.mkdir()
        trace = folder / "it-ran"
        index = build(folder, Swap(place, Attack(trace)), monkeypatch)
        place += 1
        with contextlib.suppress(TypeError, AttributeError):  # what was unpickled is not what Whoosh expects there
            opened = whoosh.index.open_dir(str(fetch_folder(index) / "engine")).searcher()
            list(opened.postings("text", "revenu").all_ids())
        if trace.exists():
            ran.append(place)
    assert len(ran) == 3


def test_an_index_of_another_engine_that_calls_itself_whoosh_is_not_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = pickled(tmp_path_factory) - 1  # the last thing that is written
    trace, folder = tmp_path / "it-ran", tmp_path / "folder"
    attacked = fetch_folder(build(tmp_path, Swap(segments, Attack(trace)), monkeypatch))
    pages = write_pages([page("Net revenue")], tmp_path)
    index = build_index(pages, config.Index(engine="tantivy"), str(tmp_path / "tantivy"))
    fetch_folder(index).rename(folder)
    (folder / "engine").rename(folder / "was")
    (attacked / "engine").rename(folder / "engine")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"engine": "whoosh"}))
    with pytest.raises(ArtifactError, match=r"names posix\.mkdir"):
        open_index(write_folder(folder, str(tmp_path / "stored"), "index/1", 1, provenance()), config.Search())
    assert not trace.exists()


def test_what_others_unpickle_is_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook looks at indexes alone: a process pool's messages are pickles too."""
    search(build(tmp_path, Swap(None, None), monkeypatch))
    assert pickle.loads(pickle.dumps(Path("a"))) == Path("a")
    called: Callable[..., Any] = pickle.loads(pickle.dumps(search))
    assert called is search
