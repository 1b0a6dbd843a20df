"""What a query means: Whoosh's parser reads it, and this module reduces its tree to one that every engine answers alike.

The language is that of Whoosh's default parser: words, "phrases" and "phrases with slop"~3, 'one quoted term', AND, OR,
NOT, ANDNOT, ANDMAYBE, REQUIRE, parentheses, wildcards (* and ?), prefixes, ranges ([2019 TO 2021], {a TO b}), boosts (^2),
*:* for every page, and field: for text, file, title and page_number (a number, or a range of numbers). The default parser
has no fuzzy terms, and neither has this. It is read as Whoosh reads it, except that

- a ? that ends a word is a question mark, as questions have it (`wom?n` is a pattern, `women?` is not);
- a colon that follows no field's name is punctuation;
- NOT takes away from the group it stands in, also where the group is an OR; a group of nothing else takes away from all
  pages;
- a word that analysis splits (`covid-19`) stands for all its parts; where alternatives are ranked, each counts by itself.

The reduced tree holds Whoosh's query classes, on analysed terms:

    Term(field, stem)           Phrase(field, [stem, None, stem]), where None is any one word
    Wildcard(field, pattern)    TermRange(field, low, high), both over words as they are written
    NumericRange(page_number)   Every()      And, Or of two or more      AndNot, AndMaybe, Require of two

where a field is text, file, title or ANY. Only leaves have boosts. The tree of plain words, the common case, is made
without the parser, which takes a millisecond or more; a property test holds both ways to the same tree.
"""

import functools
import itertools
import logging
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from whoosh import fields, qparser, query

from tasks.schemas import LARGEST
from tasks.search import analysis

ANY = "any"  # the default field: text, file and title, each with its weight
PAGE = "page_number"
Operator = Literal["or", "and"]

MAX_PARSED = 2_000  # characters; what is longer is a model that repeats itself, and is read as words
MAX_WORDS = 1_000  # distinct words that are searched
MAX_DEPTH = 40  # of nested groups
MAX_BINARY = 8  # ANDNOT, ANDMAYBE and REQUIRE: Whoosh's parser takes time exponential in their number
MAX_PLACINGS = 100  # ways to place the words of a phrase with slop
_MIN_BOOST, _MAX_BOOST = 0.001, 1_000.0

OPERATORS = ("AND", "OR", "NOT", "ANDNOT", "ANDMAYBE", "REQUIRE")
_NAMES = "|".join((ANY, *analysis.FIELDS, PAGE))
_QUESTION_MARKS = "?\u055e\u061f\u1367"  # Whoosh reads the Armenian, Arabic and Ethiopic ones as wildcards too
_CHARACTERS = rf"[\"*()\[\]{{}}^~{_QUESTION_MARKS}]|(?<!\w)'"
# with what the parser sees around an operator once question marks and colons are gone
_OPERATORS = rf"(?<![^\s:{_QUESTION_MARKS}])(?:{'|'.join(OPERATORS)})(?![^\s:{_QUESTION_MARKS}])"
_SYNTAX = re.compile(rf"{_CHARACTERS}|\b(?:{_NAMES}):(?=\S)|{_OPERATORS}")
_MEANT = re.compile(rf"[\"*{_QUESTION_MARKS}]|\b(?:{_NAMES}):(?=\S)|{_OPERATORS}")
_SIMPLE = re.compile(r"[\w\s.,;!/$%&#@+=|\\<>`-]*\??\s*")
_NOT_WORDS = re.compile(rf"{_CHARACTERS}|:")
_ENDING = re.compile(rf"[{_QUESTION_MARKS}]+(?=[\s)\]}}\"',.;:!]|$)")
_COLON = re.compile(rf"(\b(?:{_NAMES}):(?=\S)|\*:\*)|:")
_PIECE = re.compile(r"(?:[^\W_]|[*?])+")

logger = logging.getLogger(__name__)


class Reading(NamedTuple):
    """A query as it was understood: the reduced tree (None: nothing to search), the string that it was read from, and how."""

    tree: query.Query | None
    searched: str
    read_as: Literal["query", "words"]


class UnreadableQuery(ValueError):
    """The query breaks a limit or says nothing that can be searched; never leaves this module."""


def is_plain(text: str) -> bool:
    """Whether a query is words only: no operator, quote, wildcard, field, boost or bracket."""
    if _SIMPLE.fullmatch(text) and not ("AND" in text or "OR" in text or "NOT" in text or "REQUIRE" in text):
        return True  # most questions, at a fifth of the cost
    return _SYNTAX.search(_ENDING.sub(" ", text)) is None


def has_operators(text: str) -> bool:
    """Whether a query says more than words: quotes, wildcards, fields, AND, OR, NOT. A bracket, as in a formula, does not."""
    return _MEANT.search(_ENDING.sub(" ", text)) is not None


def as_words(text: str) -> str:
    """Any text as a query of plain words, with all that could be syntax taken out."""
    return re.sub(_OPERATORS, lambda found: found[0].lower(), _NOT_WORDS.sub(" ", text)).strip()


def read(text: str, operator: Operator) -> Reading:
    """Understand a query; `operator` joins the words that nothing joins. Never raises.

    A query that cannot be read, or in which nothing is left to search, is read as plain words.
    """
    text = _characters(text)
    if is_plain(text):
        tree = _words_tree(text, operator)
        return Reading(tree, text, "words" if tree is None else "query")
    try:
        return Reading(parse(text, operator), text, "query")
    except Exception as error:  # noqa: BLE001 - whatever trips Whoosh's parser: the words in the query still say enough
        logger.debug("searched as plain words, because %r: %r", error, text)
    words = as_words(text)
    return Reading(_words_tree(words, operator), words, "words")


def read_with(text: str, question: str, operator: Operator) -> Reading:
    """Understand words with the question's words beside them: ranked alike, or, where all words are demanded, not demanded."""
    words, beside = as_words(_characters(text)), as_words(_characters(question))
    if operator == "or":
        return read(f"{words} {beside}".strip(), operator)
    demanded, added = _words_tree(words, "and"), _words_tree(beside, "or")
    tree = query.AndMaybe(demanded, added) if demanded and added else demanded or added
    return Reading(tree, f"({words}) ANDMAYBE ({' OR '.join(beside.split())})", "words" if tree is None else "query")


def _characters(text: str) -> str:
    return text.encode("utf-8", "ignore").decode()  # a lone surrogate, as JSON may hold, is none


def _words_tree(text: str, operator: Operator) -> query.Query | None:
    terms = [query.Term(ANY, stem) for stem in dict.fromkeys(analysis.stems(text))][:MAX_WORDS]
    if len(terms) > 1:
        return query.Or(terms) if operator == "or" else query.And(terms)
    return terms[0] if terms else None


def parse(text: str, operator: Operator) -> query.Query:
    """The reduced tree of a query by way of Whoosh's parser.

    Raises:
        UnreadableQuery: it is too long or too deep, or nothing in it can be searched.
        Exception: anything that Whoosh's parser raises.
    """
    if len(text) > MAX_PARSED or len(re.findall(r"\b(?:ANDNOT|ANDMAYBE|REQUIRE)\b", text)) > MAX_BINARY:
        raise UnreadableQuery("too long")
    text = _COLON.sub(lambda found: found[1] or " ", _ENDING.sub(" ", re.sub(r"\s", " ", text)))
    tree = _reduce(_parser(operator).parse(text, normalize=False), loose=operator == "or")
    if tree is None:
        raise UnreadableQuery("nothing to search")
    return tree


@functools.cache
def _parser(operator: Operator) -> Any:
    # ID fields leave every text as it is: Whoosh reads the syntax, the shared analyzer the words
    schema = fields.Schema(**{name: fields.ID() for name in (ANY, *analysis.FIELDS, PAGE)})
    group = qparser.OrGroup if operator == "or" else qparser.AndGroup
    return qparser.QueryParser(ANY, schema, group=group)


def _reduce(node: query.Query, *, loose: bool, boost: float = 1.0, depth: int = 0) -> query.Query | None:
    """The reduced form of a node, None when nothing is left; `loose` where it is one of several ranked alternatives."""
    if depth > MAX_DEPTH:
        raise UnreadableQuery("too deep")
    boost *= getattr(node, "boost", 1.0)
    down = functools.partial(_reduce, boost=boost, depth=depth + 1)
    match node:
        case query.And() | query.Or():
            inner = loose if isinstance(node, query.Or) else False
            kept = [down(sub, loose=inner) for sub in node.subqueries if not isinstance(sub, query.Not)]
            dropped = [down(sub.query, loose=False) for sub in node.subqueries if isinstance(sub, query.Not)]
            return _without(_join(type(node), kept), _join(query.Or, dropped))
        case query.Not():
            return _without(None, down(node.query, loose=False))
        case query.AndNot():
            return _without(down(node.a, loose=False), down(node.b, loose=False))
        case query.AndMaybe() | query.Require():
            a, b = down(node.a, loose=False), down(node.b, loose=False)
            return type(node)(a, b) if a and b else a or b
        case query.Every():
            return query.Every()
        case _:
            return _leaf(node, loose, min(max(boost, _MIN_BOOST), _MAX_BOOST))


def _join(kind: Any, parts: Iterable[query.Query | None]) -> query.Query | None:
    """Parts as one node of a kind: nested ones of that kind unfolded, equal ones once, none and one as they are."""
    flat: dict[query.Query, None] = {}
    for part in parts:
        if part is not None:
            flat.update(dict.fromkeys(part.subqueries if isinstance(part, kind) else [part]))
    return kind(list(flat)) if len(flat) > 1 else next(iter(flat), None)


def _without(kept: query.Query | None, dropped: query.Query | None) -> query.Query | None:
    return kept if dropped is None else query.AndNot(kept or query.Every(), dropped)


def _leaf(node: query.Query, loose: bool, boost: float) -> query.Query | None:
    if not isinstance(node, query.Term | query.Phrase | query.Prefix | query.Wildcard | query.TermRange):
        raise UnreadableQuery(f"no engine answers {type(node).__name__}")
    field = node.fieldname
    if field == PAGE:
        return _page(node, boost)
    match node:
        case query.Term():
            return _word(field, node.text, loose, boost)
        case query.Phrase():
            return _phrase(field, " ".join(node.words), node.slop, boost)
        case query.TermRange():
            low, high = (bound and _lower(bound) for bound in (node.start, node.end))
            return query.TermRange(field, low or None, high or None, node.startexcl, node.endexcl, boost=boost)
        case _:  # in the text of a prefix, Whoosh leaves its * out
            pattern = node.text + "*" * isinstance(node, query.Prefix)
            return _join(query.And, (_pattern(field, piece, boost) for piece in _PIECE.findall(_lower(pattern))))


def _lower(text: str) -> str:
    return "".join(map(str.lower, text))  # one by one, as the analyzer does: a final sigma is a sigma


def _word(field: str, text: str, loose: bool, boost: float) -> query.Query | None:
    terms = [query.Term(field, stem, boost=boost) for stem in analysis.stems(text)]
    return _join(query.Or if loose and field == ANY else query.And, terms)


def _phrase(field: str, text: str, slop: int, boost: float) -> query.Query | None:
    """The phrase with every distance of neighbours that slop allows; stop words keep their place."""
    placed = analysis.placed(text, "stems")
    if len(placed) < 2:
        return _word(field, text, False, boost)
    gaps = [after - before for (_, before), (_, after) in itertools.pairwise(placed)]
    if slop ** len(gaps) > MAX_PLACINGS:
        raise UnreadableQuery("too much slop")
    phrases = []
    for distances in itertools.product(*(range(gap, gap + slop) for gap in gaps)):
        words: list[str | None] = [placed[0][0]]
        for distance, (stem, _) in zip(distances, placed[1:], strict=True):
            words += [None] * (distance - 1) + [stem]
        phrases.append(query.Phrase(field, words, boost=boost))
    return _join(query.Or, phrases)


def _pattern(field: str, piece: str, boost: float) -> query.Query | None:
    if not set("*?") & set(piece):
        return _word(field, piece, False, boost)
    pattern = re.sub(r"\*+", "*", piece)
    return query.Every() if (field, pattern) == (ANY, "*") else query.Wildcard(field, pattern, boost=boost)


def _page(node: query.Query, boost: float) -> query.Query:
    """A page number or a range of them, both ends included.

    Raises:
        ValueError: no number, or a range that holds none.
    """
    match node:
        case query.Term():
            low = high = int(node.text)
        case query.TermRange():
            low = int(node.start) + node.startexcl if node.start else 0
            high = int(node.end) - node.endexcl if node.end else LARGEST
        case _:
            raise UnreadableQuery("page_number takes a number or a range")
    if not 0 <= low <= high <= LARGEST:
        raise UnreadableQuery("no such page number")
    return query.NumericRange(PAGE, low, high, boost=boost)
