"""The shape of the package: one row of packages, sizes, names of files, and what no file may do.

The rules are checked on the source text, so imports inside functions and `if TYPE_CHECKING` count as well. Each check
is a function of a source or of the import graph, and is tried on made-up sources first: a check that finds nothing
proves nothing by itself.
"""

import ast
import re
import socket
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "ijepa_hf"

# Modules, then packages, in one row: each imports only from those to its left. docs/architecture.md has the same row.
ROW = (
    "files", "randomness", "escaping",
    "model", "data", "recipes", "figures", "runs", "diagnosis", "weights", "hub", "finetuning", "evaluation",
    "training", "estimation", "commands",
)  # fmt: skip
OPEN_TO_ALL = {"__version__"}  # the one name that may be imported from the package's own __init__

MOST_LINES_OF_A_MODULE = 600
MOST_LINES_OF_A_FUNCTION = 60  # of code: without its docstring, comments and blank lines
MOST_PARAMETERS = 8  # without self and cls

# Tests of the package as a whole, which have no module of their own; those of what stands around it are in project/.
TESTS_OF_THE_WHOLE = {"architecture", "image_kinds", "official_parity", "ijepa_hf_command", "security"}
FOLDERS_OF_THE_WHOLE = {"invariant", "project"}

# What is used of other libraries although its name says that it is private: what a new version may break first.
PRIVATE_PARTS_OF_OTHERS: dict[str, set[str]] = {
    "data.sources.opening": {"_resolve_features"},  # datasets: the columns of a stream
    "finetuning.finetune": {"_CACHED_NO_EXIST"},  # huggingface_hub: a file that is known to be missing
    "model.encoder_ijepa": {"_attn_implementation"},  # transformers
    "model.modeling_ijepa": {"_foreach_lerp_"},  # torch: the moving average in one call
    "model.sharding": {"_attn_implementation"},
    "recipes.parsing": {"_actions"},  # argparse: the flags of a parser
    "weights.locate": {"_CACHED_NO_EXIST"},
}

FORBIDDEN_EVERYWHERE = {"torchvision", "timm"}
UNSAFE_READERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# What torch.load raises on a broken file: the one thing that pickle is needed for.
HARMLESS = {"pickle.UnpicklingError"}


def module_name(path: Path) -> str:
    """The dotted name below the package: `model.masking`, or "" for the package's own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = {module_name(path): path for path in python_files("src/ijepa_hf")}
SOURCES = {name: path.read_text("utf-8") for name, path in MODULES.items()}


def imported_modules(source: str, importer: str, *, is_package: bool, modules: set[str]) -> set[str]:
    """Names below the package that a source imports, wherever in it the import stands.

    Args:
        source: Python source.
        importer: Dotted name of the module below the package, "" for the package itself.
        is_package: Whether the source is an `__init__.py`, which counts as its own folder for relative imports.
        modules: Names below the package that are modules, to tell `from . import masking` from a function's name.

    Returns:
        Dotted names below the package; "" stands for the package itself.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "ijepa_hf"]
            found.update(name.removeprefix("ijepa_hf").removeprefix(".") for name in names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = importer.split(".") if importer else []
                climb = node.level - 1 if is_package else node.level
                base = package[: len(package) - climb] if climb else package
                below = [*base, *(node.module or "").split(".")]
            elif node.module is not None and node.module.split(".")[0] == "ijepa_hf":
                below = node.module.split(".")[1:]
            else:
                continue
            parent = ".".join(part for part in below if part)
            for alias in node.names:
                child = f"{parent}.{alias.name}".removeprefix(".")
                if child in modules:
                    found.add(child)
                elif not (parent == "" and alias.name in OPEN_TO_ALL):
                    found.add(parent)
    return found


def steps_back(graph: dict[str, set[str]]) -> list[str]:
    """Imports of an import graph that do not point to the left in the row, one sentence each."""
    problems = []
    for importer, imports in sorted(graph.items()):
        room = importer.split(".")[0]
        if importer == "":
            continue  # the package's own __init__ gathers the public names
        if room not in ROW:
            problems.append(f"{importer} stands outside the row: move it into a package")
            continue
        for imported in sorted(imports):
            other = imported.split(".")[0]
            if other not in ROW:
                problems.append(f"{importer} imports {imported or 'ijepa_hf'}, which stands outside the row")
            elif other != room and ROW.index(other) > ROW.index(room):
                problems.append(f"{importer} imports {imported}, but {other} stands to the right of {room}")
    return problems


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules of an import graph that import each other, directly or through others, sorted."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        ahead = list(graph[start])
        while ahead:
            name = ahead.pop()
            if name in graph and name not in seen:
                seen.add(name)
                ahead += graph[name]
        reached[start] = seen
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(circle) for circle in found)


def row_of_document(text: str) -> list[str] | None:
    """The row in a document: the names in the first code block that has `|` in it; None where there is none."""
    block = re.search(r"```\w*\n([^`]*\|[^`]*)```", text)
    return re.findall(r"\w+", block[1]) if block else None


def modules_of_document(text: str) -> set[str]:
    """The modules in a document's tables: `model/masking.py` as the first cell of a row, in backticks."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)\.py`", cell)]
    return {name.replace("/", ".") for name in names}


def too_long(source: str) -> list[str]:
    """Functions of a source that have too many lines of code or too many parameters, one sentence each."""
    lines = source.splitlines()
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
        body = [line.strip() for line in lines[first - 1 : node.end_lineno]]
        code = [line for line in body if line and not line.startswith("#")]
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
        if len(code) > MOST_LINES_OF_A_FUNCTION:
            problems.append(f"{node.name} has {len(code)} lines of code")
        if len(parameters) > MOST_PARAMETERS:
            problems.append(f"{node.name} has {len(parameters)} parameters")
    return problems


def private_attributes(source: str) -> set[str]:
    """Names of one leading underscore that a source asks of anything but `self` and `cls`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and re.match(r"_[A-Za-z]", node.attr)
        and ast.unparse(node) != "os._exit"
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


def own_names(sources: list[str]) -> set[str]:
    """Every name that some sources define: functions, classes, variables, attributes that are set."""
    found: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def unsafe_reads(source: str) -> list[str]:
    """What in a source could run code out of a file that it reads, one sentence each."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0]: alias for alias in node.names}
            # A plain `import pickle` does nothing yet; what is used of it is looked at below.
            unsafe = [name for name in names if name in UNSAFE_READERS and (name != "pickle" or names[name].asname)]
            problems += [f"line {node.lineno}: imports {name}" for name in unsafe]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            unsafe = [
                name for name in names - HARMLESS if name.split(".")[0] in UNSAFE_READERS or name == "torch.load"
            ]
            problems += [f"line {node.lineno}: imports {name}" for name in sorted(unsafe)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            if ast.unparse(node) not in HARMLESS:
                problems.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and options.get("weights_only") != "True":
                problems.append(f"line {node.lineno}: torch.load without weights_only=True")
            if options.get("allow_pickle", "False") != "False":
                problems.append(f"line {node.lineno}: {called} with allow_pickle")
    return problems


def foreign_imports(source: str) -> set[str]:
    """Top-level names of the packages that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


# ---- the checks themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "importer", "is_package", "expected"),
    [
        ("import ijepa_hf.escaping", "data.order", False, {"escaping"}),
        ("import ijepa_hf", "data.order", False, {""}),
        ("from ijepa_hf import escaping, IJepaModel", "data.order", False, {"escaping", ""}),
        ("from ijepa_hf import __version__", "data.order", False, set()),
        ("from ijepa_hf.model import masking", "training.loop", False, {"model.masking"}),
        ("from ijepa_hf.model.masking import draw_masks", "training.loop", False, {"model.masking"}),
        ("from .masking import draw_masks", "model.modeling_ijepa", False, {"model.masking"}),
        ("from . import masking", "model.modeling_ijepa", False, {"model.masking"}),
        ("from ..model.masking import Masks", "training.loop", False, {"model.masking"}),
        ("from .masking import Masks", "model", True, {"model.masking"}),
        ("def f():\n    from ijepa_hf.training.loop import run", "model.masking", False, {"training.loop"}),
        ("if TYPE_CHECKING:\n    from ijepa_hf.hub import push", "model.masking", False, {"hub.push"}),
        ("import torch\nfrom numpy import random", "model.masking", False, set()),
    ],
)
def test_every_way_of_writing_an_import_is_seen(
    source: str, importer: str, is_package: bool, expected: set[str]
) -> None:
    modules = {"escaping", "model", "model.masking", "training.loop", "hub.push"}
    assert imported_modules(source, importer, is_package=is_package, modules=modules) == expected


def test_an_import_from_the_right_is_a_step_back() -> None:
    graph = {
        "": {"commands.main", "model.masking"},
        "model.masking": {"escaping", "data.order"},
        "data.order": {"data.reading", "randomness", ""},
        "data.reading": {"model.masking"},
        "randomness": {"files", "escaping"},
        "helpers": set(),
    }
    assert steps_back(graph) == [
        "data.order imports ijepa_hf, which stands outside the row",
        "helpers stands outside the row: move it into a package",
        "model.masking imports data.order, but data stands to the right of model",
        "randomness imports escaping, but escaping stands to the right of randomness",
    ]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "e"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]


def test_the_row_and_the_modules_of_a_document_are_read() -> None:
    text = "```\nls\n```\n```text\nfiles | model\n  | data\n```\n"
    assert row_of_document(text) == ["files", "model", "data"]
    assert row_of_document("```\nls\n```") is None
    assert modules_of_document("| `model/a.py`, `b.py` * | x `c.py` |\n| d | `e.py` |\n") == {"model.a", "b"}


def test_long_functions_and_many_parameters_are_found() -> None:
    body = "\n".join(["    x = 1", "    # a comment", ""] * 60)
    most = "self, a, b, c, d, *, e, f, g, h"
    assert too_long(f'def f({most}):\n    """A\n    docstring."""\n{body}') == []
    assert too_long(f"def f({most}, i):\n{body}\n    x = 2") == ["f has 61 lines of code", "f has 9 parameters"]


def test_private_parts_of_others_are_told_from_our_own() -> None:
    source = "class A:\n    def f(self, other):\n        self._x = other._y\n        other._x, other.__dict__, cls._z"
    assert private_attributes(source) == {"_x", "_y"}
    assert private_attributes(source) - own_names([source]) == {"_y"}


def test_reads_that_can_run_code_are_seen() -> None:
    harmful = [
        "import dill",
        "import pickle as p",
        "from joblib import load",
        "from torch import load",
        "pickle.loads(data)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ]
    for line in harmful:
        assert len(unsafe_reads(line)) == 1, line
    harmless = [
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "try:\n    import pickle\nexcept pickle.UnpicklingError:\n    pass",
        "from pickle import UnpicklingError",
    ]
    for line in harmless:
        assert unsafe_reads(line) == [], line


# ---- the checks on this project -------------------------------------------------------------------------------------

GRAPH = {
    name: imported_modules(source, name, is_package=MODULES[name].name == "__init__.py", modules=set(MODULES) - {""})
    for name, source in SOURCES.items()
}


def test_packages_import_only_from_their_left() -> None:
    assert steps_back(GRAPH) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles({name: imports for name, imports in GRAPH.items() if name}) == []


def test_the_document_on_architecture_has_the_same_row_and_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert row_of_document(text) == list(ROW)
    modules = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    assert sorted(modules_of_document(text) ^ modules) == []


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_modules_functions_and_their_parameters_are_few_enough_to_read(name: str) -> None:
    assert len(SOURCES[name].splitlines()) <= MOST_LINES_OF_A_MODULE
    assert too_long(SOURCES[name]) == []


def test_private_parts_of_other_libraries_are_used_only_where_it_is_listed() -> None:
    ours = own_names(list(SOURCES.values()))
    found = {name: private_attributes(source) - ours for name, source in SOURCES.items()}
    assert {name: parts for name, parts in found.items() if parts} == PRIVATE_PARTS_OF_OTHERS


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {part for name in MODULES for part in name.split(".")}
    assert names & {"utils", "util", "helpers", "common", "misc"} == set()


@pytest.mark.parametrize("path", python_files("src", "scripts"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring is not None, f"{path.name} needs a paragraph at its top"
    assert len(docstring) > 20


def test_the_tests_stand_as_the_modules_do() -> None:
    expected = {"/".join([*name.split(".")[:-1], f"test_{name.split('.')[-1]}"]) for name in MODULES if name}
    expected |= {f"test_{name}" for name in TESTS_OF_THE_WHOLE}
    tests = ROOT / "tests"
    found = {path.relative_to(tests).with_suffix("").as_posix() for path in tests.rglob("test_*.py")}
    of_the_whole = {name for name in found if name.split("/")[0] in FOLDERS_OF_THE_WHOLE}
    assert sorted(found - of_the_whole - expected) == []


@pytest.mark.parametrize(
    "path",
    python_files("src", "scripts", "tests", "benchmarks", "examples"),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_file_needs_torchvision_or_timm(path: Path) -> None:
    assert foreign_imports(path.read_text("utf-8")) & FORBIDDEN_EVERYWHERE == set()


@pytest.mark.parametrize("path", python_files("src", "scripts"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_that_is_read_can_run_code(path: Path) -> None:
    assert unsafe_reads(path.read_text("utf-8")) == []


# ---- what is installed ----------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    entries = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {entry.name.lower().replace("_", "-"): str(entry.specifier).removeprefix("==") for entry in entries}


def test_the_lock_pins_what_the_project_asks_for_within_its_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    own = {line: re.fullmatch(r"ijepa-hf\[(\w+)\]", line) for line in extras["dev"]}
    asked = project["project"]["dependencies"] + [line for line in extras["dev"] if not own[line]]
    asked += [line for match in own.values() if match for line in extras[match[1]]]
    pinned = pins()
    for line in [*asked, *project["build-system"]["requires"]]:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"requirements.lock has no {name}"
        assert requirement.specifier.contains(pinned[name]), f"{line}, but requirements.lock has {pinned[name]}"


def test_the_lock_names_no_host_and_no_build_of_torch() -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; sys_platform == '\w+')?", line)
    ] == []
    assert [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton", "torchvision"))] == []


def test_tests_cannot_reach_another_machine() -> None:
    # 192.0.2.0/24 is set apart for documents, so not even a broken guard would reach anyone.
    with pytest.raises(BaseException, match=r"tried to reach 192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(BaseException, match=r"tried to reach example\.invalid"):
        socket.getaddrinfo("example.invalid", 443)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
