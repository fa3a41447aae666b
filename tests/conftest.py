"""What every test shares: no network, one thread, repeatable draws, and where the reference numbers are."""

import gc
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _set_environment() -> str:
    """Set what libraries read while they are imported, for this process and those that tests start.

    Returns:
        The empty folder that stands for the user's Hugging Face folder, so that no test finds a token or a model.
    """
    hugging_face_home = tempfile.mkdtemp(prefix="ijepa-hf-tests-")
    os.environ.update(
        HF_HOME=hugging_face_home,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
        ACCELERATE_USE_CPU="true",  # values are compared with the CPU's, also on a machine with a GPU
        MPLBACKEND="Agg",
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    # A relative PYTHONPATH, as in `PYTHONPATH=src pytest`, would be lost to a process in another folder.
    if os.environ.get("PYTHONPATH"):
        folders = [os.path.abspath(folder) for folder in os.environ["PYTHONPATH"].split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    return hugging_face_home


HUGGING_FACE_HOME = _set_environment()

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import thrift  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

for _profile, _examples in (("everyday", 25), ("thorough", 300)):
    hypothesis.settings.register_profile(
        _profile,
        max_examples=_examples,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],  # it judges the machine's load, not the test
    )

# Names and addresses of this machine. An empty host means any of its own addresses.
_LOOPBACK_NAMES = {"", "localhost", "ip6-localhost", "::1", "::", "0.0.0.0", socket.gethostname()}


class NetworkUse(BaseException):
    """A test tried to reach another machine. No `Exception`, so that a library's retries cannot swallow it."""


def _refuse_other_machines(address: Any) -> None:
    """Raise `NetworkUse` unless a socket address, a `(host, port, ...)` tuple or a Unix path, is on this machine."""
    if not isinstance(address, tuple):
        return
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    if host is not None and host not in _LOOPBACK_NAMES and not host.startswith("127."):
        raise NetworkUse(f"a test tried to reach {host}; tests have to work without a network")


def _block_network() -> None:
    """Let this process's sockets reach this machine only. Processes that it starts have the offline variables only."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_other_machines(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_other_machines(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_other_machines((host,))
        return getaddrinfo(host, *args, **kwargs)

    socket.socket.connect = guarded_connect  # type: ignore[method-assign]
    socket.socket.connect_ex = guarded_connect_ex  # type: ignore[method-assign]
    socket.getaddrinfo = guarded_getaddrinfo


_block_network()


# The files that take longest, longest first: each is run by one worker, and both should end at the same time.
LONG_FILES = (
    "hub/test_uploader", "model/test_masking", "figures/test_features", "figures/test_curves", "model/test_mask_audit",
    "project/test_documents", "invariant/test_stopping", "evaluation/test_scorecard",
    "weights/test_official_checkpoint", "runs/test_folder", "invariant/test_hub_circle", "diagnosis/test_demo",
    "model/test_modeling_ijepa", "invariant/test_bad_checkpoints", "training/test_pretrain", "runs/test_export",
    "invariant/test_faults", "evaluation/probes/test_linear", "invariant/test_parallel", "invariant/test_data_faults",
    "test_image_kinds", "evaluation/test_evaluate", "evaluation/test_backbones", "invariant/test_resume",
    "diagnosis/test_run_monitor", "invariant/test_without_package", "finetuning/test_finetune", "data/test_streaming",
    "invariant/test_streaming", "model/test_sharding", "runs/test_checkpoints", "weights/test_convert",
    "project/test_tutorial", "project/test_sweep",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Try few examples of each property, or many where properties are asked for, as `make test-slow` does."""
    hypothesis.settings.load_profile("thorough" if "property" in config.option.markexpr else "everyday")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the properties, and put long files first."""
    for item in items:
        if hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("property")
    order = {name: place for place, name in enumerate(LONG_FILES)}
    names = {item.path: item.path.relative_to(ROOT / "tests").with_suffix("").as_posix() for item in items}
    items.sort(key=lambda item: order.get(names[item.path], len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what the test does not look at, before its fixtures are made."""
    thrift.leave_out()
    for name in thrift.wanted:
        thrift.wanted[name] = item.get_closest_marker(name) is not None


def pytest_collection_finish() -> None:
    """Take what was imported out of garbage collection; each run collects, which took it a quarter of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(HUGGING_FACE_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of default `tiny_flags` at its end, with nothing left out; to be read, and copied before it is changed."""
    from tiny import tiny_run

    with thrift.nothing_left_out():
        return tiny_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def scored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose encoder was scored, to be read only."""
    from tiny import tiny_run

    folder = tmp_path_factory.mktemp("scored") / "digits-tiny"
    return tiny_run(folder, eval_split_name="test", max_eval_samples=80)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers that the published code produced."""
    return ROOT / "tests" / "fixtures" / "golden"


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """The folder of CIFAR-10's parquet shards, where the machine has it; the test is skipped where not."""
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not any(folder.rglob("*.parquet")):
        pytest.skip("needs CIFAR-10 as parquet shards in ../shared/data/cifar10")
    return folder


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment for a process that a test starts: offline, and with this Python's commands first on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path}


@pytest.fixture
def threads_since() -> Callable[[str], list[threading.Thread]]:
    """Lists the threads that the test has started and that still run, by a word in their name; no others count."""
    before = set(threading.enumerate())
    return lambda word: [thread for thread in threading.enumerate() if thread not in before and word in thread.name]
