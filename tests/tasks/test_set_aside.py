"""What was set aside is counted and shown, whatever the bytes that it is about."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifact, storage
from tasks.set_aside import KEPT, REASONS, SetAside, count_reasons, first_reasons, printable, write_set_aside

FOUND = [
    SetAside("b.pdf", None, "no_text", "3 pages"),
    SetAside("q.jsonl", 10, "bad_json", "no comma"),
    SetAside("q.jsonl", 9, "bad_json", "no colon"),
]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(), max_size=40), limit=st.integers(1, 60))
def test_any_text_can_be_shown(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit + 1
    assert shown.isprintable()
    shown.encode("utf-8")
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def test_the_table_counts_each_reason_with_an_example(storage_root: str) -> None:
    one = write_set_aside(FOUND, storage.join(storage_root, "1.parquet"), {})
    two = write_set_aside([], storage.join(storage_root, "2.parquet"), {})
    assert [(c.reason, c.times, c.kept, c.example) for c in count_reasons(one, two)] == [
        ("bad_json", 2, False, "q.jsonl, row 9: no colon"),
        ("no_text", 1, True, "b.pdf: 3 pages"),
    ]
    assert count_reasons(two) == []


def test_the_order_of_finding_changes_no_byte(storage_root: str) -> None:
    there = [write_set_aside(found, storage.join(storage_root, "x.parquet"), {}) for found in (FOUND, FOUND[::-1])]
    assert there[0] == there[1]
    assert [row["row"] for row in artifact.read_rows(there[1])] == [None, 9, 10]


def test_the_first_reasons_name_file_and_row() -> None:
    told = "b.pdf: no_text (3 pages); q.jsonl, row 10: bad_json (no comma); q.jsonl, row 9: bad_json (no colon)"
    assert first_reasons([*FOUND, SetAside("c.pdf", None, "no_text", "1 page")]) == told


def test_what_is_kept_is_a_reason() -> None:
    assert set(REASONS) > KEPT
