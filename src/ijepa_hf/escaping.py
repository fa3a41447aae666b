"""Escapes names from untrusted data for terminals, Markdown and Python; lays out plain text tables.

A file, a class, a column or a data set may have any name. A name can hold line breaks, sequences that move a
terminal's cursor or set its title, marks that end a code span, or the quote that ends a string. Harmless characters
stay as they are.
"""

import json
import re
import unicodedata
from collections.abc import Sequence

# Unicode categories that a terminal obeys or a reader does not see, and the marks that change the writing direction.
_HIDDEN = {"Cc", "Zl", "Zp", "Cs"}
_DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_MARKDOWN_SYNTAX = re.compile(r"([\\`*\[\]<>&|$])")


def printable(text: str) -> str:
    r"""Escapes the control characters of a text of several lines, for a screen or a log.

    Args:
        text: Any text.

    Returns:
        The text. Control characters other than line breaks and tabs, and marks that change the writing direction, are
        written as Python escapes: `\x1b`, `\u202e`.
    """
    return "".join(letter if letter in "\n\t" or not _is_hidden(letter) else _escaped(letter) for letter in text)


def on_one_line(text: object) -> str:
    """Escapes all control characters of a name, line breaks and tabs too.

    Args:
        text: A name, or another object; it is converted with `str`.

    Returns:
        One line.
    """
    return "".join(_escaped(letter) if _is_hidden(letter) else letter for letter in str(text))


def markdown_text(text: object) -> str:
    """Escapes a name for the running text of a Markdown document.

    Args:
        text: The name.

    Returns:
        One line, with a backslash before each character that could begin code, a link, emphasis, a table cell, a
        formula or HTML.

    Source: CommonMark 0.31, section 2.4; `|` and `$` are GitHub's and the Hub's.
    """
    return _MARKDOWN_SYNTAX.sub(r"\\\1", on_one_line(text))


def code_span(text: object) -> str:
    """Writes a name as a code span of Markdown.

    Args:
        text: The name.

    Returns:
        One line between backticks; there are more of them than the name has in a row.

    Source: CommonMark 0.31, section 6.1.
    """
    line = on_one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    ticks, space = "`" * (longest + 1), " " if longest else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def python_string(text: str) -> str:
    """Writes a name as a Python string literal.

    Args:
        text: The name.

    Returns:
        The literal, in double quotes, on one line.
    """
    literal = json.dumps(text, ensure_ascii=False)
    return "".join(f"\\u{ord(letter):04x}" if _is_hidden(letter) else letter for letter in literal)


def text_table(rows: Sequence[Sequence[object]], *, align: str = "<>", indent: str = "") -> list[str]:
    """Lays rows of cells out as lines of plain text with aligned columns, two spaces apart.

    Args:
        rows: Cells, each shown as `on_one_line` gives it; a row may have fewer cells than others.
        align: `<` (left) or `>` (right) for each column; the last letter holds for all further columns.
        indent: Put in front of each line.

    Returns:
        A line for each row, without spaces at its end.
    """
    cells = [[on_one_line(cell) for cell in row] for row in rows]
    num_columns = max(map(len, cells), default=0)
    widths = [max(len(row[column]) for row in cells if column < len(row)) for column in range(num_columns)]
    sides = align.ljust(num_columns, align[-1])
    return [indent + "  ".join(f"{row[i]:{sides[i]}{widths[i]}}" for i in range(len(row))).rstrip() for row in cells]


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in _HIDDEN or letter in _DIRECTION_MARKS


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
