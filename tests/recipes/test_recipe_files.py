"""The YAML of recipes: plain words and numbers mean what they look like, and what is written is read back."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ijepa_hf.recipes.recipe_files import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("y", "y"), ("true", True), ("False", False), ("~", None), ("null", None),
        ("", None), ("010", 10.0), ("0", 0), ("-7", -7), ("1e-3", 0.001), ("2.5", 2.5), (".5", 0.5),
        ("1_000", "1_000"),
        ("0x10", "0x10"), ("2026-01-31", "2026-01-31"), ("1:30", "1:30"), ("'1'", "1"),
        ("[1, no, 1e3]", [1, "no", 1000.0]),
    ],
)  # fmt: skip
def test_a_plain_value_is_what_it_looks_like(text, value):
    found = read_yaml(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_it_differs_from_what_the_library_reads_by_itself():
    assert yaml.safe_load("key: no")["key"] is False
    assert yaml.safe_load("key: 010")["key"] == 8
    assert yaml.safe_load("key: 1e-3")["key"] == "1e-3"
    assert yaml.safe_load("key: 1\nkey: 2")["key"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key: 1\nkey: 2", "the key 'key' stands twice"),
        ("key: [1", "expected"),
        ("key: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("key: !!int word", "invalid literal"),
        ("[" * 5000, "recursion"),
    ],
)
def test_what_cannot_be_read_is_a_value_error_of_one_line(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_yaml(text)
    assert "\n" not in str(raised.value)


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)


@given(st.dictionaries(st.text(min_size=1), PLAIN | st.lists(PLAIN, max_size=3), max_size=5))
def test_what_is_written_is_read_back(values):
    assert read_yaml(write_yaml(values)) == values
