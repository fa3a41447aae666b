"""Command lines and recipes of every kind: checked arguments, or one sentence that names what is wrong."""

import contextlib
import dataclasses
import io
import itertools
import math
import string
import tempfile
from pathlib import Path
from typing import Any

from bad_input import bounded, examples
from hypothesis import given
from hypothesis import strategies as st

from ijepa_hf.commands import main
from ijepa_hf.recipes.arguments import ARGUMENT_CLASSES, argument_names, argument_values
from ijepa_hf.recipes.parsing import build_parser, parse_arguments
from ijepa_hf.recipes.recipe_files import as_recipe, load_recipe, recipe_names
from ijepa_hf.training.plan import make_plan, values_at

KINDS = {entry.name: str(entry.type) for cls in ARGUMENT_CLASSES for entry in dataclasses.fields(cls) if entry.init}
# About one folder or upload, so that a recipe does not hold them.
LOCAL = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo",
    "hub_strategy", "hub_revision",
}  # fmt: skip
NAMES = st.sampled_from(sorted(argument_names()))
# What a flag's value has to be for something to come of it, where any word or number will not do.
GOOD = {
    "dataset_name": ["digits", "shapes", "some/folder"],
    "image_size": ["32", "224", "32 64"],
    "patch_size": ["4", "16", "8 4"],
    "num_channels": ["3", "1"],
    "masking_strategy": ["multi_block", "multi_block_official", "block", "rasterized", "random", "regions"],
    "loss_type": ["mse", "smooth_l1"],
    "context_scale": ["0.8 1"],
    "target_scale": ["0.1 0.2"],
    "image_mean": ["0.5 0.5 0.5", "-1e-3 0 .5", "0"],
    "image_std": ["0.5 0.5 0.5", "1e-3 1 10", "1"],
    "keep_images_in_memory": ["yes", "no", "auto"],
    "mixed_precision": ["no", "bf16"],
    "on_collapse": ["warn", "stop"],
    "on_save_error": ["stop", "continue"],
    "hub_strategy": ["end", "checkpoint"],
    "report_to": ["wandb", "tensorboard trackio"],
}
BY_KIND = {
    "bool": ["yes", "no", "true"],
    "int": ["1", "2", "8"],
    "float": ["0.5", "1", "1e-3"],
    "str": ["wide", "a/b"],
}


def plausible(name: str) -> list[str]:
    """Values that an argument can have, where the others let it."""
    return GOOD.get(name) or next(values for kind, values in BY_KIND.items() if kind in KINDS[name])


WORDS = st.sampled_from(
    [
        "", "0", "1", "2", "3", "-1", "-3", "1.5", "-0.5", ".5", "1e-3", "-1e-3", "1e3", "010", "0x10", "1_000",
        "nan", "inf", "-inf", "-nan", "1e400", "1e308", "99999999999999999999", "9" * 5000, "true", "no", "None",
        "null", "wide", "a b", "--", "-", "-x", "--seed", "=", "[1, 2]", "{}", "ünï", "a\nb", "x" * 3000, "../..",
        "/", "~", "@file", "%(prog)s", "{0}", "2026-01-31", "1:30", "'quoted'", "# no comment", "*",
        "!!python/object:os.system",
    ]
)  # fmt: skip
START = ["--dataset_name", "digits", "--learning_rate", "1e-3"]


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A command line that works, mostly, with flags of every kind after it."""
    argv = draw(
        st.sampled_from(
            [START, START, START, ["digits"], ["digits"], [], ["in1k-vitb16"], ["digit"], ["nowhere.yaml"]]
        )
    )
    argv = [*argv, *(["--dataset_name", "x"] if argv == ["in1k-vitb16"] else [])]
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        name = draw(NAMES)
        kind = draw(st.integers(0, 9))
        flag = f"--{name}"
        values = draw(st.sampled_from(plausible(name))).split() if kind < 6 else [draw(WORDS)]
        if kind == 7:
            flag = draw(
                st.sampled_from(
                    [flag[:-2], flag.replace("_", "-"), flag + "s", f"--no_{name}", flag[1:], flag.upper()]
                )
            )
        if kind == 8:
            values = draw(st.sampled_from([[], [*values, *values], [*values, "extra"]]))
        argv += [f"{flag}={values[0]}", *values[1:]] if values and draw(st.booleans()) else [flag, *values]
    return argv


class Refused(Exception):
    """A command line or recipe was refused with this message."""


def parsed(argv: list[str]) -> Any:
    """The arguments; a refusal of any of the kinds that are right becomes `Refused`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parse_arguments(argv)
    except SystemExit as error:
        code = error.code
        assert code == 2
        raise Refused("SystemExit", said.getvalue().partition(": error: ")[2]) from None
    except (ValueError, FileNotFoundError) as error:
        raise Refused(type(error).__name__, str(error)) from error


def outcome_of_command_line(argv: list[str]) -> str:
    with bounded(seconds=3, megabytes=200):
        try:
            groups = parsed(argv)
        except Refused as refusal:
            kind, message = refusal.args
            named = {name_in(word) for word in argv if len(word) > 3} | {repr(word) for word in argv}
            named |= {"-h" for word in argv if word.startswith("-h")}  # which argparse takes for -h with more after it
            assert any(word and word in message for word in named | {"dataset_name", "learning_rate"}), (message, argv)
            return str(kind)
        # what a run from weights asks to be otherwise than there
        assert {name_in(word) for word in argv if word.startswith("--")} & {*KINDS} <= groups[0].given
        check_values(groups)
        check_round_trip(groups)
        return use(groups)


def name_in(word: str) -> str:
    """The argument that a flag names, which may be spelt with dashes."""
    return word.split("=")[0].lstrip("-").replace("-", "_")


def check_values(groups: Any) -> None:
    for name, value in argument_values(*groups).items():
        for item in value if isinstance(value, list) else [value]:
            assert not isinstance(item, float) or math.isfinite(item), name
            assert not isinstance(item, int) or abs(item) < 2**63, name
            assert item != "", name


def check_round_trip(groups: Any) -> None:
    """The recipe that is written of a run starts the same run."""
    before = argument_values(*groups)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "again.yaml"
        path.write_text(as_recipe(before), "utf-8")
        again = argument_values(*parsed([str(path), "--output_dir", "x"]))
    assert {name: value for name, value in again.items() if name not in LOCAL} == {
        name: value for name, value in before.items() if name not in LOCAL
    }


def use(groups: Any) -> str:
    """The first things that are done with arguments: the configuration and the plan of the run."""
    model, _, run = groups
    try:
        model.to_config()
        plan = make_plan(run, num_samples=10**6, num_ranks=1)
    except (ValueError, TypeError) as error:
        message = str(error)
        assert any(f"{name}=" in message or f"{name} " in message for name in (*KINDS, "data set")), message
        return type(error).__name__
    for step in {0, 1, plan.num_steps // 2, plan.num_steps - 1}:
        values = values_at(step, run, plan)
        assert all(math.isfinite(value) for value in dataclasses.astuple(values))
        assert 0 <= values.ema_momentum <= 1
        assert values.learning_rate >= 0
    return "right"


@examples(100, 2000)
@given(argv=command_lines())
def test_a_command_line_becomes_checked_arguments_or_is_refused_naming_what_was_written(argv):
    outcome_of_command_line(argv)


@examples(20, 300)
@given(argv=command_lines())
def test_a_refused_command_line_is_one_message_and_exit_code_2(argv):
    outcome_of_refusal(argv)


def outcome_of_refusal(argv: list[str]) -> str:
    """Through the command itself; what would start a run is left out."""
    try:
        parsed(argv)
    except Refused:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = main.main(["pretrain", *argv])
            except SystemExit as error:  # argparse's own, after its usage
                code = error.code
        assert code == 2
        assert "Traceback" not in said.getvalue()
        last = said.getvalue().rpartition("ijepa-hf pretrain: ")[2]
        assert last.strip()
        return "exit code 2"
    return "not refused"


# -- recipes ---------------------------------------------------------------------------------------------------------

SCALARS = st.sampled_from(
    [
        "yes", "no", "on", "off", "true", "False", "~", "null", "", "1", "0", "-1", "1.5", "1e-3", "-1e-05", ".5",
        "010", "0x10", "0o7", "1_000", "1:30", "+1", ".nan", ".inf", "-.inf", "nan", "1e400", "9" * 5000,
        "2026-01-31", "2026-13-45", "wide", "'wide'", '"1"', "'yes'", "[]", "[1]", "[1, 2]", "[0.5, 0.5, 0.5]",
        "[a, b]", "[[1]]", "{}", "{a: 1}", "&a 1", "*a", "&a [*a]", "!!python/object/apply:os.system ['true']",
        "!!binary aGk=", "!!set {a}", "!!timestamp x", "!!int x", "!!int ''", "!!float [1]", "!!bool x", "!!str 5",
        "!local 1", "|\n  text", "> folded", "'unclosed", "[1", "{1", "\t1", "a: b", "- 1", "# only a comment",
        "x" * 3000, "ünï", "\x07", "%", "@a", "`a`", "[" * 3000, "{a: " * 400, "<<", "? a", "digits", "bf16",
        "block",
    ]
)  # fmt: skip
ODD_KEYS = st.one_of(
    st.sampled_from(
        [
            "lerning_rate",
            "given",
            "1",
            "[a]",
            "? [a, b]",
            "<<",
            "null",
            "true",
            "model",
            "",
            "ünï",
            "--seed",
            "'seed'",
            "x" * 3000,
        ]
    ),
    st.text(string.printable, max_size=8),
)
# Lists of lists of the same list: short in the file, a million million words when written out.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
DOUBLED = ", ".join(f"&{new} [*{old}, *{old}]" for old, new in itertools.pairwise(LETTERS))
BOMB = f"dataset_name: digits\nlearning_rate: 1e-3\nreport_to: [&a [x, x], {DOUBLED}]\n"
WHOLE = st.sampled_from(
    [
        b"", b"\n", b"# nothing\n", b"--- \n", b"---\na: 1\n---\nb: 2\n", b"[]", b"0", b"false", b"''", b"text",
        b"- seed\n", b"\xff\xfe\x00", b"seed: \xff\n", b"\xef\xbb\xbfseed: 1\n", "seed: 1\n".encode("utf-16"),
        b"\x00", b"seed: 1\x00\n", b"%YAML 9.9\n---\nseed: 1\n", b"[" * 50_000, b"a: " * 3000, BOMB.encode(),
        b"seed: 1\n" * 3, b"<<: {seed: 3}\n", b"a: &a {seed: 1}\nb: *a\n", b"? {a: 1}\n: 2\n",
        b"\xc2\x85", b"seed: 1\r\nseed: 2\r",
    ]
)  # fmt: skip


@st.composite
def recipes(draw: Any) -> bytes:
    """The bytes of a recipe: a good beginning, mostly, and lines of every kind; or something else entirely."""
    if draw(st.integers(0, 7)) == 7:
        return draw(st.one_of(WHOLE, st.binary(max_size=60), st.text(string.printable, max_size=60).map(str.encode)))
    lines = draw(st.sampled_from([["dataset_name: digits", "learning_rate: 1e-3"]] * 4 + [[]]))
    lines = [*lines]
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        kind = draw(st.integers(0, 9))
        name = draw(NAMES if kind < 9 else ODD_KEYS)
        value = draw(SCALARS)
        if kind < 6:
            words = draw(st.sampled_from(plausible(name))).split()
            value = words[0] if len(words) == 1 else f"[{', '.join(words)}]"
        lines.append(f"{name}: {value}")
    return "\n".join(lines).encode()


def outcome_of_recipe(content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder, bounded(seconds=4, megabytes=300):
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        try:
            groups = parsed([str(path)])
        except Refused as refusal:
            kind, message = refusal.args
            assert any(name in message for name in (*KINDS, str(path))), (message, content)
            return str(kind)
        check_values(groups)
        check_round_trip(groups)
        check_words(load_recipe(str(path)), content, argument_values(*groups))
        return use(groups)


def check_words(values: dict[str, Any], content: bytes, arguments: dict[str, Any]) -> None:
    """Whatever is given plainly on a line reaches its argument as it stands there, as a number or a word."""
    for line in content.decode("utf-8-sig").splitlines():
        name, separator, written = line.partition(": ")
        if (
            not separator
            or name not in values
            or values[name] is None
            or not written.isascii()
            or not written.isalnum()
        ):
            continue
        found = arguments[name][0] if isinstance(arguments[name], list) else arguments[name]
        if isinstance(found, bool):
            assert found == (written.lower() in ("yes", "true", "t", "y", "1"))
        elif isinstance(found, str):
            assert found == written
        else:
            assert found == float(written)


@examples(100, 2000)
@given(content=recipes())
def test_a_recipe_becomes_checked_arguments_or_is_refused_naming_the_key_or_the_file(content):
    outcome_of_recipe(content)


def test_what_is_drawn_covers_every_flag_of_the_parser():
    flags = {flag.lstrip("-") for action in build_parser()._actions for flag in action.option_strings}
    flags -= {flag for flag in flags if "-" in flag}
    assert flags - {"h", "help"} == set(KINDS) | {f"no_{name}" for name in KINDS if f"no_{name}" in flags}
    assert set(GOOD) <= set(KINDS)
    assert "digits" in recipe_names()
