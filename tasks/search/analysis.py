"""The one analyzer: how text becomes terms, in pages and in queries, for every engine.

A word is a run of letters and digits (so `covid-19`, `report_2020.pdf` and `don't` are two or more words each), lower-cased.
English stop words are dropped, but keep their place, so that a phrase knows how far apart its other words stand. What is
left is reduced to its English Snowball (Porter2) stem. The analyzers are tantivy's own, which run at the speed of its
index; the Whoosh engine calls the same objects, hence token streams are identical by construction.

Patterns and ranges speak of words as they are written (`revenue*` should find "revenues", whose stem is "revenu"): each
field F is indexed a second time, without stems, as `written(F)`.
"""

import functools
from typing import Any, Literal

FIELDS = ("text", "file", "title")
MAX_WORD_BYTES = 64  # a longer run of letters is the debris of a broken table or a hash; it is not indexed
# Lucene's list, and what is left of "company's" and "don't" when it is split at the apostrophe
_LISTED = """
a an and are as at be but by for if in into is it no not of on or s such t that the their then there these they this to was
will with
"""
STOP_WORDS = _LISTED.split()
Form = Literal["stems", "written"]


def written(field: str) -> str:
    """Name of the index field that holds `field`'s words as they are written."""
    return f"{field}_written"


@functools.cache
def analyzer(form: Form) -> Any:
    """The tantivy TextAnalyzer that yields stems, or words as they are written; safe to share between threads."""
    from tantivy import Filter, TextAnalyzerBuilder, Tokenizer

    builder = (
        TextAnalyzerBuilder(Tokenizer.simple())
        .filter(Filter.remove_long(MAX_WORD_BYTES + 1))
        .filter(Filter.lowercase())
        .filter(Filter.custom_stopword(STOP_WORDS))
    )
    return builder.filter(Filter.stemmer("english")).build() if form == "stems" else builder.build()


def stems(text: str) -> list[str]:
    """The terms of a text, in order, repeats included."""
    return analyzer("stems").analyze(text)


def placed(text: str, form: Form) -> list[tuple[str, int]]:
    """The terms of a text, each with its position counted in words from 0, stop words included."""
    return [(token.text, token.position) for token in analyzer(form).pre_tokenize(text).tokens]
