"""Train, dev and test, so that no document is in two of them.

Questions that share a document, directly or through other questions, form a group and never part; documents with the very same
text count as one (tasks/questions.py). A group's split is the
hash of its smallest document name, so it is the same on every machine, in whatever order questions come, and stays when
other groups come or go. The price is balance: shares hold on average over many groups, and a collection of few
documents can miss them by far. Cutting a sorted list of groups would balance better, but then one more document would
move others between splits, and what a model was trained on could turn up in its test.
"""

import hashlib
from collections.abc import Collection, Sequence

SPLITS = ("train", "dev", "test")


def assign_splits(
    questions: Sequence[Collection[str]], train_ratio: float, dev_ratio: float, salt: str
) -> list[tuple[str, str]]:
    """(group, split) of each question, given the names of the documents that it is answered by.

    Args:
        questions: of each question, one or more document names.
        train_ratio: share of groups, from 0 to 1, that are "train".
        dev_ratio: share of groups that are "dev"; the rest is "test".
        salt: another salt gives another split.
    """
    assigned = []
    for root in connected(questions):
        group = hashlib.sha256(root.encode()).hexdigest()[:16]
        share = int.from_bytes(hashlib.sha256(f"{salt}\n{root}".encode()).digest()[:8]) / 2**64
        split = "train" if share < train_ratio else "dev" if share < train_ratio + dev_ratio else "test"
        assigned.append((group, split))
    return assigned


def connected(questions: Sequence[Collection[str]]) -> list[str]:
    """Smallest document name of each question's group: of the questions that share documents, directly or over others."""
    parent: dict[str, str] = {}

    def find(document: str) -> str:
        while parent.setdefault(document, document) != document:
            parent[document] = parent[parent[document]]
            document = parent[document]
        return document

    for documents in questions:
        first, *others = map(find, documents)
        for other in others:
            # The smaller name becomes the root, so a group's root is its smallest document.
            first, other = sorted((find(first), find(other)))
            parent[other] = first

    return [find(next(iter(documents))) for documents in questions]
