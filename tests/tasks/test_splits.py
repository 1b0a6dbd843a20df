"""Splits: no document in two of them, the same for any order and beside any other groups."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.splits import assign_splits

QUESTIONS = st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=3), max_size=25)
RATIOS = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda r: (r[0], min(r[1], 1 - r[0])))


@settings(max_examples=60, deadline=None)
@given(questions=QUESTIONS, ratios=RATIOS, salt=st.text(max_size=3))
def test_a_document_is_in_one_group_and_one_split(
    questions: list[list[str]], ratios: tuple[float, float], salt: str
) -> None:
    assigned = assign_splits(questions, *ratios, salt)
    assert len(assigned) == len(questions)
    groups: dict[str, set[str]] = {}
    for documents, (group, _) in zip(questions, assigned, strict=True):
        for document in documents:
            groups.setdefault(document, set()).add(group)
    assert all(len(found) == 1 for found in groups.values())
    assert len(dict(assigned)) == len(set(assigned))  # a group has one split
    assert {split for _, split in assigned} <= {"train", "dev", "test"}


@settings(max_examples=60, deadline=None)
@given(questions=QUESTIONS)
def test_groups_are_the_connected_documents_and_no_more(questions: list[list[str]]) -> None:
    """Against the definition: spread from each question to all that it can reach."""
    assigned = assign_splits(questions, 0.5, 0.2, "s")
    for start, (group, _) in enumerate(assigned):
        reached, documents = {start}, set(questions[start])
        while more := {i for i, q in enumerate(questions) if i not in reached and documents & set(q)}:
            reached |= more
            documents |= {d for i in more for d in questions[i]}
        assert {i for i, (g, _) in enumerate(assigned) if g == group} == reached


@settings(max_examples=30, deadline=None)
@given(questions=QUESTIONS, data=st.data())
def test_order_and_repetition_do_not_matter(questions: list[list[str]], data: st.DataObject) -> None:
    assigned = dict(zip(map(tuple, questions), assign_splits(questions, 0.6, 0.1, "s"), strict=True))
    shuffled = data.draw(st.permutations(questions + questions[:3]))
    shuffled_inside = [data.draw(st.permutations(documents + documents[:1])) for documents in shuffled]
    again = assign_splits(shuffled_inside, 0.6, 0.1, "s")
    assert again == [assigned[tuple(documents)] for documents in shuffled]


@settings(max_examples=60, deadline=None)
@given(questions=QUESTIONS, others=st.lists(st.lists(st.sampled_from("ABCDEF"), min_size=1, max_size=2), max_size=8))
def test_other_groups_move_nothing(questions: list[list[str]], others: list[list[str]]) -> None:
    alone = assign_splits(questions, 0.6, 0.1, "s")
    assert assign_splits(others + questions, 0.6, 0.1, "s")[len(others) :] == alone


def test_shares_hold_over_many_groups() -> None:
    counts = Counter(split for _, split in assign_splits([[f"{n}.pdf"] for n in range(5000)], 0.6, 0.1, "drag"))
    assert abs(counts["train"] / 5000 - 0.6) < 0.03
    assert abs(counts["dev"] / 5000 - 0.1) < 0.03


def test_all_or_nothing_and_salt() -> None:
    questions = [[f"{n}.pdf"] for n in range(200)]
    assert {split for _, split in assign_splits(questions, 1, 0, "s")} == {"train"}
    assert {split for _, split in assign_splits(questions, 0, 1, "s")} == {"dev"}
    assert {split for _, split in assign_splits(questions, 0, 0, "s")} == {"test"}
    assert assign_splits(questions, 0.5, 0, "s") != assign_splits(questions, 0.5, 0, "t")


def test_a_split_once_made_is_kept_by_later_versions() -> None:
    """What a model was trained on must not turn up in its test after an upgrade."""
    names = ["a.pdf", "b.pdf", "c.pdf", "d/é.pdf", "e.pdf", "f.pdf"]
    assigned = assign_splits([*([name] for name in names), ["f.pdf", "e.pdf"]], 0.6, 0.1, "drag")
    assert [split for _, split in assigned] == ["train", "test", "train", "train", "train", "train", "train"]
    assert assigned[0][0] == "a7949e623819aa32"


def test_a_long_chain_is_one_group() -> None:
    chain = [[f"{n:05}.pdf", f"{n + 1:05}.pdf"] for n in range(20_000)]
    assert len({group for group, _ in assign_splits(chain, 0.6, 0.1, "s")}) == 1
