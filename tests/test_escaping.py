"""Hidden characters are shown, harmless ones stay, Markdown marks stand for themselves; tables are aligned."""

import ast

from hypothesis import given
from hypothesis import strategies as st

from ijepa_hf import escaping


def harmless(text):
    """Whether a terminal would obey nothing in a text."""
    return text == escaping.printable(text)


def test_hidden_letters_are_shown_and_others_are_left_alone():
    plain = "runs/cifar10-vit_micro 2.0 (déjà vu) 木 🙂"
    assert [escaping.printable(plain), escaping.on_one_line(plain)] == [plain, plain]
    assert escaping.code_span(plain) == f"`{plain}`"
    assert escaping.python_string(plain) == f'"{plain}"'
    assert escaping.markdown_text("cifar10-vit_micro 2.0 (a)") == "cifar10-vit_micro 2.0 (a)"
    assert escaping.printable("a\nb\tc\x1b[1m\x9b\u202e") == "a\nb\tc\\x1b[1m\\x9b\\u202e"
    assert escaping.on_one_line("a\r\nb\u2028\x85") == "a\\r\\nb\\u2028\\x85"
    assert escaping.code_span("a``b`") == "``` a``b` ```"
    assert escaping.markdown_text("<b>*[x](y)|`$a$`") == r"\<b\>\*\[x\](y)\|\`\$a\$\`"


ANY_NAME = st.text(st.characters(exclude_categories=["Cs"]))  # half of a surrogate pair is no letter


@given(ANY_NAME)
def test_a_string_of_python_is_read_back_by_python_and_lies_on_one_line(name):
    literal = escaping.python_string(name)
    assert ast.literal_eval(literal) == name
    assert harmless(literal)
    assert len(literal.splitlines()) == 1


@given(ANY_NAME)
def test_whatever_a_name_holds_a_terminal_obeys_nothing_and_a_line_stays_one(name):
    assert harmless(escaping.printable(name))
    for on_a_line in (escaping.on_one_line(name), escaping.markdown_text(name), escaping.code_span(name)):
        assert harmless(on_a_line)
        assert len(on_a_line.splitlines()) <= 1


@given(ANY_NAME)
def test_no_run_of_backticks_in_a_name_is_as_long_as_those_around_it(name):
    span = escaping.code_span(name)
    fence = len(span) - len(span.lstrip("`"))
    inside = span[fence:-fence]
    assert "`" * fence not in inside


def test_the_columns_of_a_table_are_aligned_and_no_cell_breaks_its_line():
    rows = [["features", "kNN", ""], ["model", "9.5", "a\nb"], ["raw pixels", "10.0"]]
    assert escaping.text_table(rows) == ["features     kNN", "model        9.5  a\\nb", "raw pixels  10.0"]
    assert escaping.text_table(rows, align="><", indent="  ")[1:] == [
        "       model  9.5   a\\nb",
        "  raw pixels  10.0",
    ]
    assert escaping.text_table([]) == []
