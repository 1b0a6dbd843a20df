"""Search: an index of pages as an artifact, one query language, and engines that match the same pages."""

from typing import NamedTuple


class Kind(NamedTuple):
    """A search engine: its module with `build(pages, folder)`, `Engine(folder, weights)` and `blocking`, and its package."""

    module: str
    package: str


# a new engine is a line here
ENGINES = {
    "tantivy": Kind("tasks.search.tantivy_engine", "tantivy"),
    "whoosh": Kind("tasks.search.whoosh_engine", "whoosh-reloaded"),
}
