"""The shape of the package: layers of imports, names of files, and what no file may do.

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

# The layer of every module; a module imports only from lower layers. docs/architecture.md holds the same table.
LAYERS = {
    "randomness": 0,
    "block_sizes": -2,
    "masking": -1,
    "image_transforms": 0,
    "schedules": 0,
    "shapes": 0,
    "diagnostics": 0,
    "mask_audit": 1,
    "configuration_ijepa": 0,
    "encoder_ijepa": 1,
    "activation_checkpointing": 3,
    "arguments": 2,
    "recipe_files": 3,
    "argument_parsing": 4,
    "modeling_ijepa": 2,
    "sources": 1,
    "export": 3,
    "evaluation.features": 4,
    "evaluation.knn": 3,
    "data": 4,
    "evaluation.linear_probe": 4,
    "checkpointing": 4,
    "visualization": 5,
    "hub_process": 0,
    "official_checkpoint": 5,
    "published_code": 3,
    "evaluation.labelled_data": 5,
    "conversion": 6,
    "evaluation.finetune_arguments": 6,
    "evaluation.finetune_report": 6,
    "model_card": 5,
    "plan": 5,
    "streaming": 5,
    "memory_images": 5,
    "preparation": 5,
    "run_rows": 1,
    "run_folder": 5,
    "warm_start": 6,
    "hub_contents": 6,
    "hub": 7,
    "evaluation.finetune": 8,
    "evaluation.finetune_classifier": 7,
    "evaluation.finetune_folder": 7,
    "metrics_log": 7,
    "report": 8,
    "loading": 6,
    "run_start": 8,
    "run_state": 8,
    "training_loop": 9,
    "training": 10,
    "collapse_verdict": 0,
    "panels": 0,
    "evaluation.intervals": 0,
    "evaluation.image_settings": 0,
    "evaluation.metrics": 3,
    "evaluation.splits": 0,
    "diagnostics_figure": 1,
    "evaluation.attentive_probe": 1,
    "evaluation.regression_probe": 1,
    "evaluation.dense_probe": 2,
    "evaluation.backbones": 3,
    "expected_band": 4,
    "feature_views": 3,
    "feature_figures": 4,
    "collapse_monitor": 5,
    "evaluation.feature_store": 5,
    "run_diagnostics": 6,
    "collapse_demo": 6,
    "html_report": 6,
    "evaluation.evaluate_arguments": 6,
    "evaluation.results": 6,
    "evaluation.targets": 6,
    "evaluation.scorecard": 7,
    "evaluation.evaluate": 9,
    "diagnose": 8,
    "visualize": 8,
    "interruption": 0,
    "non_finite": 0,
    "ranks": 0,
    "retrying": 0,
    "workers": 0,
    "escaping": 0,
    "files": 0,
    "sharding": 3,
    "run_lock": 4,
    "batch_fitting": 6,
    "optimization": 6,
    "announcement": 9,
    "step_cost": 5,
    "step_timing": 10,
    "estimate": 11,
    "cli": 12,
}
# A package's __init__ gathers what is below it, and nothing inside imports it back, but for the version.
GATHERING = {"", "evaluation"}
OPEN_TO_ALL = {"__version__"}

# Tests of the project as a whole, which have no module of their own.
TESTS_OF_THE_WHOLE = {
    "architecture", "compatibility_slow", "image_kinds", "official_parity", "recipes_slow", "ijepa_hf_command",
    "security",
}  # fmt: skip

FORBIDDEN_EVERYWHERE = {"torchvision", "timm"}
UNSAFE_READERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# What torch.load raises on a broken file: the one thing that pickle is needed for.
HARMLESS = {"pickle.UnpicklingError"}


def module_name(path: Path) -> str:
    """The dotted name below the package: `evaluation.knn`, or "" for the package's own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = {module_name(path): path for path in python_files("src/ijepa_hf")}


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


def violations(graph: dict[str, set[str]]) -> list[str]:
    """What in an import graph breaks the layers, one sentence each."""
    problems = []
    for importer, imports in sorted(graph.items()):
        if importer not in LAYERS and importer not in GATHERING:
            problems.append(f"{importer} has no layer: add it to the table here and in docs/architecture.md")
            continue
        for imported in sorted(imports):
            if importer in GATHERING and (importer == "" or imported.startswith(f"{importer}.")):
                continue
            if imported not in LAYERS:
                problems.append(f"{importer or 'ijepa_hf'} imports {imported or 'ijepa_hf'}, which has no layer")
            elif importer not in LAYERS:
                problems.append(f"{importer}/__init__.py gathers {importer}, but imports {imported}")
            elif LAYERS[imported] >= LAYERS[importer]:
                layers = f"layer {LAYERS[importer]}", f"layer {LAYERS[imported]}"
                problems.append(f"{importer}, {layers[0]}, imports {imported}, {layers[1]}")
    return problems


def layers_of_document(text: str) -> dict[str, int] | None:
    """The table of layers in a document, module by module; None where the document has none.

    A row is `| layer | modules | ... |` with modules as paths in backticks below the package: `masking.py`,
    `evaluation/knn.py`. Backticked names that are no Python file (`scripts/`, a template) are passed over. A folder
    (`evaluation/`) stands for its modules, which are the backticked words of the next cell.
    """
    layers: dict[str, int] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) < 2 or not cells[0].removeprefix("-").isdigit():
            continue
        for name in re.findall(r"`([^`]+)`", cells[1]):
            if name.endswith(".py") and not name.startswith("scripts/"):
                layers[name.removesuffix(".py").replace("/", ".")] = int(cells[0])
            elif name == "evaluation/" and len(cells) > 2:
                for module in re.findall(r"`(\w+)(?:\.py)?`", cells[2]):
                    layers[f"evaluation.{module}"] = int(cells[0])
    return layers or None


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
        ("import ijepa_hf.model.masking", "data", False, {"masking"}),
        ("import ijepa_hf", "data", False, {""}),
        ("from ijepa_hf import masking, IJepaModel", "data", False, {"masking", ""}),
        ("from ijepa_hf import __version__", "data", False, set()),
        ("from ijepa_hf.evaluation.probes.knn import knn_accuracy", "training", False, {"evaluation.knn"}),
        ("from .masking import draw_masks", "data", False, {"masking"}),
        ("from . import masking", "data", False, {"masking"}),
        ("from .features import extract_features", "evaluation.knn", False, {"evaluation.features"}),
        ("from ..masking import Masks", "evaluation.knn", False, {"masking"}),
        ("from .knn import knn_accuracy", "evaluation", True, {"evaluation.knn"}),
        ("def f():\n    from ijepa_hf.training.pretrain import train", "masking", False, {"training"}),
        ("if TYPE_CHECKING:\n    from ijepa_hf import cli", "masking", False, {"cli"}),
        ("import torch\nfrom numpy import random", "masking", False, set()),
    ],
)
def test_every_way_of_writing_an_import_is_seen(
    source: str, importer: str, is_package: bool, expected: set[str]
) -> None:
    assert imported_modules(source, importer, is_package=is_package, modules=set(LAYERS)) == expected


def test_an_import_from_the_same_or_a_higher_layer_is_a_violation() -> None:
    graph = {
        "": {"cli", "masking"},
        "evaluation": {"evaluation.knn", "data"},
        "masking": {"schedules"},
        "data": {"training", ""},
        "training": {"report", "export"},
        "report": {"training"},
        "helpers": set(),
    }
    assert violations(graph) == [
        "data imports ijepa_hf, which has no layer",
        "data, layer 4, imports training, layer 10",
        "evaluation/__init__.py gathers evaluation, but imports data",
        "helpers has no layer: add it to the table here and in docs/architecture.md",
        "masking, layer -1, imports schedules, layer 0",
        "report, layer 8, imports training, layer 10",
    ]


def test_the_table_of_a_document_is_read() -> None:
    text = (
        "| layer | module | one job |\n| --- | --- | --- |\n"
        "| 0 | `masking.py`, `schedules.py` | draws `indices` |\n"
        "| 3 | `hub.py`, `model_card_template.md` | push |\n"
        "| 4 | `evaluation/` | `features`, `knn` |\n"
        "| 4 | `evaluation/linear_probe.py` | probe |\n"
        "| 6 | `cli.py`, `scripts/run.py` | `ijepa-hf pretrain` |\n"
    )
    assert layers_of_document(text) == {
        "masking": 0,
        "schedules": 0,
        "hub": 3,
        "evaluation.features": 4,
        "evaluation.knn": 4,
        "evaluation.linear_probe": 4,
        "cli": 6,
    }
    assert layers_of_document("# No table\n| a | b |\n") is None


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


def test_modules_import_only_from_lower_layers() -> None:
    graph = {
        name: imported_modules(
            path.read_text("utf-8"), name, is_package=path.name == "__init__.py", modules=set(MODULES) - {""}
        )
        for name, path in MODULES.items()
    }
    assert violations(graph) == []


def test_every_module_in_the_table_of_layers_exists() -> None:
    assert sorted(set(LAYERS) - set(MODULES)) == []


def test_the_document_on_architecture_has_the_same_table_of_layers() -> None:
    document = ROOT / "docs" / "architecture.md"
    assert layers_of_document(document.read_text("utf-8")) == LAYERS


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {part for name in MODULES for part in name.split(".")}
    assert names & {"utils", "util", "helpers", "common", "misc"} == set()


@pytest.mark.parametrize("path", python_files("src", "scripts"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring is not None, f"{path.name} needs a paragraph at its top"
    assert len(docstring) > 20


def test_every_test_file_is_named_after_a_module() -> None:
    expected = {name.replace(".", "/test_", 1) if "." in name else f"test_{name}" for name in MODULES if name}
    expected |= {f"test_{name}" for name in TESTS_OF_THE_WHOLE}
    tests = ROOT / "tests"
    found = {path.relative_to(tests).with_suffix("").as_posix() for path in tests.rglob("test_*.py")}
    others = {name for name in found if name.startswith(("invariant/", "project/"))}  # of runs; around the package
    assert sorted(found - others - expected) == []


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
