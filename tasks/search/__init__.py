"""Search: an index of pages as an artifact, one query language, and engines that match the same pages."""

# name → module with `build(pages, folder)`, `Engine(folder, weights)` and `blocking`; a new engine is a line here
ENGINES = {"tantivy": "tasks.search.tantivy_engine", "whoosh": "tasks.search.whoosh_engine"}
