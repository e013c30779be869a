"""The support matrix in the docs is what the tests show."""

from matrix import DOCS, render, rows, written


def test_the_table_in_the_docs_is_that_of_the_tests() -> None:
    text = DOCS.read_text()
    assert text == written(text, render(rows())), "run scripts/support_matrix.py"
