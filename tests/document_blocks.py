"""Reads the code blocks of Markdown documents, runs those marked `run` and checks the commands in the others.

A block is marked in its opening line, after the language: `python run` or `bash run`. All marked blocks of a document
run in one temporary folder, in order, with a `pretrain` of at most a few steps. In every block of shell commands,
`make` targets and variables, subcommands, recipes and flags of `ijepa-hf`, of `accelerate launch` and of the scripts
have to exist.

Used by test_documents.py, which also tries it on made-up documents.
"""

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHELLS = {"bash", "sh", "shell", "console"}
TAGS = {"run"}
PRETRAINING_SCRIPT = "scripts/run_ijepa_pretraining.py"
# A marked block shows a real command; unless it says itself how long to train, the test cuts it to these few steps.
FEW_STEPS = ["--max_train_steps", "4", "--warmup_epochs", "0"]
SECONDS = 240


@dataclass(frozen=True)
class Block:
    """One fenced code block.

    Attributes:
        document: File it stands in.
        line: Line of its first code line, counted from 1.
        language: First word of the opening line, "" where there is none.
        tags: The words after it.
        text: The code, without the block's own indentation.
    """

    document: Path
    line: int
    language: str
    tags: frozenset[str]
    text: str

    @property
    def place(self) -> str:
        return f"{self.document.name}:{self.line}"


@dataclass(frozen=True)
class Known:
    """What commands in a document may name.

    Attributes:
        make_targets: Targets of the Makefile.
        make_variables: Variables of the Makefile that a person may set.
        flags: For each subcommand of `ijepa-hf` its flags, with their dashes.
        recipes: Names of recipes.
        launch_flags: Flags of `accelerate launch`.
        root: The project's folder, in which `scripts/` lies.
    """

    make_targets: set[str]
    make_variables: set[str]
    flags: dict[str, set[str]]
    recipes: set[str]
    launch_flags: set[str] = field(default_factory=set)
    root: Path = Path()


def code_blocks(document: Path) -> list[Block]:
    """The fenced code blocks of a Markdown document.

    Raises:
        ValueError: A block is not closed, or has a tag that means nothing (as a misspelt `run` would).
    """
    blocks = []
    opening: re.Match[str] | None = None
    first, lines = 0, []
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if opening is None:
            opening = re.fullmatch(r"( *)(`{3,}|~{3,})([^`]*)", line)
            first, lines = number + 1, []
        elif re.fullmatch(rf" *{re.escape(opening[2][0])}{{{len(opening[2])},}} *", line):
            language, *tags = opening[3].split() or [""]
            unknown = sorted(set(tags) - TAGS)
            if unknown:
                raise ValueError(f"{document.name}:{first - 1}: the tag {unknown[0]!r} means nothing; known: {TAGS}")
            text = textwrap.dedent("\n".join(lines)) + "\n"
            blocks.append(Block(document, first, language, frozenset(tags), text))
            opening = None
        else:
            lines.append(line)
    if opening is not None:
        raise ValueError(f"{document.name}:{first - 1}: the code block is not closed")
    return blocks


def commands(text: str) -> list[list[str]]:
    """The simple commands of a piece of shell, each as its words.

    Pipes and lists are taken apart, comments and the bodies of here-documents dropped, lines ending in a backslash
    joined, `$ ` prompts and assignments before a command removed.
    """
    found: list[list[str]] = []
    here = None
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if here is not None:
            here = None if line.strip() == here else here
            continue
        start = re.search(r"<<-?\s*(['\"]?)(\w+)\1", line)
        here = start[2] if start else None
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|()"):
                while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
                    del words[0]
                if words:
                    found.append(words)
                words = []
            else:
                words.append(word)
    return found


def problems(block: Block, known: Known) -> list[str]:
    """What the shell commands of a block name and is not there, one sentence each."""
    if block.language not in SHELLS:
        return []
    found = []
    for words in commands(block.text):
        found += [f"{block.place}: {problem}" for problem in _problems_of_command(words, known)]
    return found


def _problems_of_command(words: list[str], known: Known) -> list[str]:
    program, *rest = words
    if program == "make":
        return _problems_of_make(rest, known)
    if program == "ijepa-hf":
        return _problems_of_ijepa_hf(rest, known)
    found = []
    scripts = [position for position, word in enumerate(words) if re.match(r"(\./)?scripts/", word)]
    launch = words[2 : scripts[0]] if scripts else words[2:]
    if words[:2] == ["accelerate", "launch"]:
        found += [f"accelerate launch has no {flag}" for flag in _flags(launch) if flag not in known.launch_flags]
        if not scripts:
            found.append("accelerate launch without a script of this project")
    for position in scripts:
        script = words[position].removeprefix("./")
        if not (known.root / script).is_file():
            found.append(f"there is no {script}")
        if script == PRETRAINING_SCRIPT:
            found += _problems_of_ijepa_hf(["pretrain", *words[position + 1 :]], known)
    return found


def _problems_of_make(words: list[str], known: Known) -> list[str]:
    found = []
    for word in words:
        name, is_variable, value = word.partition("=")
        if word.startswith("-"):
            continue
        if not is_variable:
            if word not in known.make_targets:
                found.append(f"the Makefile has no target {word!r}")
        elif name not in known.make_variables:
            found.append(f"the Makefile has no variable {name!r}")
        elif name == "ARGS" and "pretrain" in words:
            found += _unknown_flags("pretrain", shlex.split(value), known)
    return found


def _problems_of_ijepa_hf(words: list[str], known: Known) -> list[str]:
    if words[:1] in ([], ["--help"], ["--version"]):
        return []
    subcommand, *rest = words
    if subcommand not in known.flags:
        return [f"ijepa-hf has no subcommand {subcommand!r}"]
    found = _unknown_flags(subcommand, rest, known)
    if subcommand == "pretrain" and rest and not rest[0].startswith("-"):
        recipe = rest[0]
        # A path to a file of one's own, or a stand-in as in RECIPE or $RECIPE, is as good as a name.
        if recipe not in known.recipes and not re.fullmatch(r".*\.ya?ml|\$?\{?[A-Z_]+\}?", recipe):
            found.append(f"there is no recipe {recipe!r}")
    return found


def _unknown_flags(subcommand: str, words: list[str], known: Known) -> list[str]:
    return [
        f"ijepa-hf {subcommand} has no {flag}"
        for flag in _flags(words)
        if flag not in known.flags[subcommand] | {"--help"}
    ]


def _flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--\w", word)]


def run_blocks(
    blocks: list[Block], folder: Path, environment: dict[str, str], python: Sequence[str] = (sys.executable,)
) -> None:
    """Run the marked blocks of one document, in order.

    Args:
        blocks: The document's blocks; those without the tag `run` are passed over.
        folder: An empty folder, in which they all run.
        environment: The environment of their processes.
        python: What stands before a program's arguments.

    Raises:
        AssertionError: A block ended with an error, ran for too long, or is of a language that cannot be run. The
            message names its line and shows the end of its output.
    """
    programs = folder / ".document-programs"
    _write_short_ijepa_hf(programs, python)
    environment = {**environment, "PATH": f"{programs}:{environment['PATH']}"}
    for block in blocks:
        if "run" not in block.tags:
            continue
        source = programs / f"{block.document.stem}_line_{block.line}"
        if block.language == "python":
            command = [*python, str(source)]
        elif block.language in {"bash", "sh"}:
            command = ["bash", "-euo", "pipefail", str(source)]
        else:
            raise AssertionError(f"{block.place}: only python and bash can be run, not {block.language!r}")
        source.write_text(block.text, "utf-8")
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{block.place} ran for more than {SECONDS} s\n{_end(error.stdout)}") from error
        assert done.returncode == 0, f"{block.place} ended with {done.returncode}\n{_end(done.stdout)}"


def _end(output: bytes | None) -> str:
    return (output or b"").decode("utf-8", "replace")[-4000:]


def _write_short_ijepa_hf(folder: Path, python: Sequence[str]) -> None:
    """Write an `ijepa-hf` that cuts a `pretrain` to a few steps, unless the block itself says how many."""
    folder.mkdir()
    (folder / "short_ijepa_hf.py").write_text(
        "import sys\n"
        "from ijepa_hf.commands.main import main\n"
        "arguments = sys.argv[1:]\n"
        "cut = arguments[:1] == ['pretrain'] and not {'--max_train_steps', '--help'} & set(arguments)\n"
        f"sys.exit(main(arguments + {FEW_STEPS} if cut else arguments))\n",
        "utf-8",
    )
    program = folder / "ijepa-hf"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(python)} "{folder}/short_ijepa_hf.py" "$@"\n', "utf-8")
    program.chmod(0o755)


def broken_links(document: Path) -> list[str]:
    """Links and pictures of a document to files that are not there, as written; web addresses are not tried."""
    text = re.sub(r"^( *)(```+|~~~+).*?^ *\2 *$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", text) + re.findall(r"<img[^>]*\bsrc=\"([^\"]+)\"", text)
    paths = [(link, link.partition("#")[0]) for link in links if not re.match(r"[a-z]+:", link)]
    return [link for link, path in paths if path and not (document.parent / path).exists()]
