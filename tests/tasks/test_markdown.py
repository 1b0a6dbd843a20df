"""What a cell holds is what is shown, whatever it is."""

import io

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown

from tasks.markdown import markdown_table

word = st.sampled_from(["run", "7", "|", "||", r"\|", r"\\|", "a|b", "a\nb", "\r\n", "µ", "–"])
cell = st.lists(word, max_size=4).map(" ".join)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cell, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_every_cell_is_read_as_it_was_written(rows: list[list[str]]) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown_table(*rows[:1], rows[1:]))
    read = [t for t in tokens if t.type == "inline"]
    shown = ["".join(part.content for part in t.children or ()) for t in read]
    assert [text.split() for text in shown] == [text.split() for row in rows for text in row]


def test_columns_stand_right_where_that_is_asked_for() -> None:
    table = markdown_table(("", "n"), [("a|b", "1"), ("two\nlines", "22")], right=[1])
    assert table.splitlines() == ["|  | n |", "| --- | ---: |", r"| a\|b | 1 |", "| two lines | 22 |"]
    console = Console(file=io.StringIO(), width=60)
    console.print(Markdown(table))
    shown = console.file.getvalue()
    assert "a|b" in shown
    assert "two lines" in shown
