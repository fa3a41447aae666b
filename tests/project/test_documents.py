"""The documents say what is true: marked code blocks run, commands name targets, flags and recipes that exist.

The reader of documents (document_blocks.py) is tried on made-up ones first, wrong in every way that it has to notice.
"""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
from document_blocks import FEW_STEPS, SHELLS, Known, broken_links, code_blocks, commands, problems, run_blocks
from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    if path.is_file()
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MADE_UP = Known(
    make_targets={"pretrain", "test"},
    make_variables={"ARGS", "TORCH"},
    flags={"pretrain": {"--seed", "--output_dir"}, "convert": {"--num_attention_heads"}},
    recipes={"digits"},
    launch_flags={"--num_processes"},
    root=ROOT,
)


def written(folder: Path, text: str) -> Path:
    document = folder / "made_up.md"
    document.write_text(text, "utf-8")
    return document


# ---- the reader, on made-up documents -------------------------------------------------------------------------------


def test_blocks_are_read_with_their_language_tags_and_line(tmp_path: Path) -> None:
    text = (
        "# A\n\n```python run\nprint(1)\n```\n"
        "1. b\n   ~~~bash\n   make\n     test\n   ~~~\n"
        "````\n```\nplain\n```\n````\n"
    )
    blocks = code_blocks(written(tmp_path, text))
    assert [(block.language, set(block.tags), block.line, block.text) for block in blocks] == [
        ("python", {"run"}, 4, "print(1)\n"),
        ("bash", set(), 8, "make\n  test\n"),
        ("", set(), 12, "```\nplain\n```\n"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash runn\nmake\n```\n", "made_up.md:1: the tag 'runn'"),
        ("a\n```bash\nmake\n", "made_up.md:2: .* not closed"),
    ],
)
def test_a_misspelt_tag_or_an_open_block_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_blocks(written(tmp_path, text))


def test_shell_is_taken_apart_into_commands() -> None:
    text = (
        "# a comment\n"
        "$ cd x && A=1 B='2 3' make test ARGS=\"-k 'a b'\"  # another\n"
        "ijepa-hf pretrain \\\n    digits | tee log; (make pretrain)\n"
        "python - <<'END'\nmake nonsense\nEND\nls\n"
    )
    assert commands(text) == [
        ["cd", "x"],
        ["make", "test", "ARGS=-k 'a b'"],
        ["ijepa-hf", "pretrain", "digits"],
        ["tee", "log"],
        ["make", "pretrain"],
        ["python", "-", "<<", "END"],
        ["ls"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "make",
        'make -j2 pretrain TORCH=torch==2.13.0 ARGS="--seed 1"',
        'make test ARGS="--whatever-pytest-has"',
        "ijepa-hf --help",
        "ijepa-hf pretrain digits --seed 1 --output_dir=runs/x",
        "ijepa-hf pretrain my/recipe.yaml --help",
        "ijepa-hf pretrain RECIPE --seed $SEED",
        "ijepa-hf convert a.pth.tar out --num_attention_heads 16",
        "accelerate launch --num_processes 4 scripts/run_ijepa_pretraining.py digits --seed 1",
        "torchrun --nproc_per_node 2 scripts/run_ijepa_pretraining.py digits",
        "pip install --anything else",
    ],
)
def test_right_commands_pass(tmp_path: Path, command: str) -> None:
    (block,) = code_blocks(written(tmp_path, f"```bash\n{command}\n```\n"))
    assert problems(block, MADE_UP) == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make tset", "the Makefile has no target 'tset'"),
        ("make test ARG=1", "the Makefile has no variable 'ARG'"),
        ('make pretrain ARGS="--sed 1"', "ijepa-hf pretrain has no --sed"),
        ("ijepa-hf pretrian digits", "ijepa-hf has no subcommand 'pretrian'"),
        ("ijepa-hf pretrain digit", "there is no recipe 'digit'"),
        ("cd x && ijepa-hf pretrain digits --sed=1", "ijepa-hf pretrain has no --sed"),
        ("ijepa-hf convert a b --seed 1", "ijepa-hf convert has no --seed"),
        (
            "accelerate launch --processes 4 scripts/run_ijepa_pretraining.py digits",
            "accelerate launch has no --processes",
        ),
        ("accelerate launch train.py", "accelerate launch without a script of this project"),
        ("accelerate launch scripts/run_ijepa_pretraining.py digits --sed 1", "ijepa-hf pretrain has no --sed"),
        ("A=1 python scripts/run_ijepa_pretraining.py digit", "there is no recipe 'digit'"),
        ("sh scripts/no_such.sh", "there is no scripts/no_such.sh"),
    ],
)
def test_wrong_commands_are_caught(tmp_path: Path, command: str, problem: str) -> None:
    (block,) = code_blocks(written(tmp_path, f"```bash\n{command}\n```\n"))
    assert problems(block, MADE_UP) == [f"made_up.md:2: {problem}"]


def test_marked_blocks_run_in_order_in_one_folder(tmp_path: Path, child_environment: dict[str, str]) -> None:
    text = (
        "```python\nraise SystemExit('not marked, so not run')\n```\n"
        "```bash run\necho one > file\n```\n"
        "```python run\nfrom pathlib import Path\nassert Path('file').read_text() == 'one\\n'\n"
        "Path('file').write_text('two\\n')\n```\n"
        '```bash run\ntest "$(cat file)" = two\n```\n'
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    run_blocks(code_blocks(written(tmp_path, text)), folder, child_environment)
    assert (folder / "file").read_text() == "two\n"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python run\nprint('seen')\nassert 1 == 2\n```\n", r"made_up.md:2 ended with 1\nseen\n.*AssertionError"),
        ("```bash run\nfalse | cat\necho unseen\n```\n", "made_up.md:2 ended with 1\n$"),
        ("```bash run\necho $NO_SUCH_VARIABLE\n```\n", "NO_SUCH_VARIABLE: unbound"),
        ("```yaml run\na: 1\n```\n", "only python and bash can be run, not 'yaml'"),
    ],
    ids=["python", "pipe", "variable", "language"],
)
def test_a_failing_block_is_caught(
    tmp_path: Path, child_environment: dict[str, str], block: str, message: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(AssertionError, match=re.compile(message, re.DOTALL)):
        run_blocks(code_blocks(written(tmp_path, block)), folder, child_environment)


def test_a_pretrain_in_a_marked_block_is_cut_to_a_few_steps(tmp_path: Path, child_environment: dict[str, str]) -> None:
    package = tmp_path / "packages" / "ijepa_hf" / "commands"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text("def main(argv):\n    print(*argv, file=open('seen', 'a'))\n", "utf-8")
    lines = ["ijepa-hf pretrain digits", "ijepa-hf pretrain digits --max_train_steps 9", "ijepa-hf convert a b"]
    text = "\n".join(["```bash run", *lines, "```", ""])
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = {**child_environment, "PYTHONPATH": str(package.parents[1])}
    run_blocks(code_blocks(written(tmp_path, text)), folder, environment)
    assert (folder / "seen").read_text().splitlines() == [
        " ".join(["pretrain", "digits", *FEW_STEPS]),
        "pretrain digits --max_train_steps 9",
        "convert a b",
    ]


def test_broken_links_are_caught(tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()
    text = (
        "[a](there.png) ![b](there.png#part) [c](https://nowhere.invalid) [d](#part) [e](gone.md) "
        '<img src="lost.png"> [f](also/gone.md#x "title")\n```python\nx[0](gone)\n```\n'
    )
    assert broken_links(written(tmp_path, text)) == ["gone.md", "also/gone.md#x", "lost.png"]


# ---- this project's documents ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> Known:
    from accelerate.commands.launch import launch_command_parser

    from ijepa_hf.commands import main, visualize
    from ijepa_hf.recipes.parsing import flag_names
    from ijepa_hf.recipes.recipe_files import recipe_names

    modules = {name: importlib.import_module(f"ijepa_hf.commands.{name}") for name in main.COMMANDS}
    flags = {name: flag_names(module.build_parser()) for name, module in modules.items()}
    flags["visualize"] |= flag_names(visualize.build_masks_parser()) | flag_names(visualize.build_html_parser())

    makefile = (ROOT / "Makefile").read_text("utf-8")
    return Known(
        make_targets=set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE)),
        make_variables=set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE)),
        flags=flags,
        recipes=set(recipe_names()),
        launch_flags=set(launch_command_parser()._option_string_actions),
        root=ROOT,
    )


def test_the_makefile_has_what_the_readme_is_about(known: Known) -> None:
    assert known.make_targets >= {"help", "setup", "pretrain", "test", "test-slow", "format", "clean"}
    assert known.make_variables == {"PYTHON", "TORCH", "TORCH_INDEX", "ARGS"}


def test_the_readme_shows_the_two_commands_and_has_blocks_that_run() -> None:
    blocks = code_blocks(ROOT / "README.md")
    words = [command for block in blocks if block.language in SHELLS for command in commands(block.text)]
    assert ["make", "pretrain"] in words
    assert ["make", "test"] in words
    assert [block.place for block in blocks if "run" in block.tags] != []


def test_ci_runs_what_a_person_runs() -> None:
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "make test",
    ]


def test_the_command_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"ijepa-hf": "ijepa_hf_command:main"}


def test_the_version_is_the_same_everywhere() -> None:
    import ijepa_hf

    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert ijepa_hf.__version__ == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_name_what_exists(document: Path, known: Known) -> None:
    assert [problem for block in code_blocks(document) for problem in problems(block, known)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


WITH_MARKED_BLOCKS = [path for path in DOCUMENTS if any(block.tags for block in code_blocks(path))]


@pytest.mark.parametrize("document", WITH_MARKED_BLOCKS, ids=name_of)
def test_marked_blocks_run(document: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    run_blocks(code_blocks(document), tmp_path, child_environment, warm_python())


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_MARKED_BLOCKS, ids=name_of)
def test_marked_blocks_run_in_interpreters_that_have_imported_nothing(
    document: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    run_blocks(code_blocks(document), tmp_path, child_environment)
