"""Names that somebody else has chosen, written where they can do nothing: on a screen, in Markdown, in Python.

A file, a class, a column or a data set may be called anything: a name can hold line breaks, the sequences that move a
terminal's cursor or set its title, marks that end a code span, or the quote that ends a string. What is harmless
stays as it is, letter by letter.
"""

import json
import re
import unicodedata

# What a terminal obeys or a reader does not see: controls, and the marks that turn the direction of writing.
_HIDDEN = {"Cc", "Zl", "Zp", "Cs"}
_TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_MEANS_SOMETHING = re.compile(r"([\\`*\[\]<>&|$])")


def printable(text: str) -> str:
    r"""Text of several lines for a screen or a log: what a terminal would obey is shown instead.

    Args:
        text: Any text.

    Returns:
        The text with each control but line breaks and tabs, and each mark that turns the direction of writing, as
        Python writes it: `\x1b`, `\u202e`.
    """
    return "".join(letter if letter in "\n\t" or not _is_hidden(letter) else _escaped(letter) for letter in text)


def on_one_line(text: object) -> str:
    """A name for a line of text.

    Args:
        text: A name, or something else that is shown.

    Returns:
        As `printable` gives it, with line breaks and tabs shown as well.
    """
    return "".join(_escaped(letter) if _is_hidden(letter) else letter for letter in str(text))


def markdown_text(text: object) -> str:
    """A name among the words of a Markdown document.

    Args:
        text: The name.

    Returns:
        One line, with a backslash before what would begin code, a link, emphasis, a cell, a formula or HTML.

    Source: CommonMark 0.31, section 2.4; `|` and `$` are GitHub's and the Hub's.
    """
    return _MEANS_SOMETHING.sub(r"\\\1", on_one_line(text))


def code_span(text: object) -> str:
    """A name as code in a Markdown document.

    Args:
        text: The name.

    Returns:
        One line between backticks, more of them than the name has in a row.

    Source: CommonMark 0.31, section 6.1.
    """
    line = on_one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    ticks, space = "`" * (longest + 1), " " if longest else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def python_string(text: str) -> str:
    """A name as a string in Python.

    Args:
        text: The name.

    Returns:
        A literal between double quotes, on one line.
    """
    literal = json.dumps(text, ensure_ascii=False)
    return "".join(f"\\u{ord(letter):04x}" if _is_hidden(letter) else letter for letter in literal)


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in _HIDDEN or letter in _TURNS


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
