"""Python programs of tests, forked from a process that has imported what takes seconds.

    subprocess.run([*warm_python(), "-c", program, argument], env=environment, ...)

stands for `[sys.executable, "-c", program, argument]`: a process with its own arguments, folder, environment and
streams. Whoever waits for it gets its exit code; signals reach it. `-c`, `-m`, `-P`, `-W` and a file are understood.
The interpreter is not taken down at the end (that takes a second): a test that looks at it starts a real one.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

_STOCK = ["torch", "transformers", "transformers.pipelines", "transformers.models.ijepa.modeling_ijepa", "datasets"]
_STOCK += ["transformers.models.auto.modeling_auto", "transformers.models.vit.modeling_vit", "huggingface_hub.hf_api"]
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_AT_MOST = 120.0  # seconds that the imports may take


@functools.cache
def warm_python(package: bool = True) -> list[str]:
    """Returns what stands before a program's arguments.

    Args:
        package: Whether the program finds this package imported; if not, only what it needs.
    """
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    place = folder / "socket"
    if package:
        from forked_runs import start

        process = start(functools.partial(_serve, str(place)), folder / "log", {})
        is_alive, end = process.is_alive, process.join
    else:
        process = subprocess.Popen([sys.executable, "-P", __file__, str(place)], stdin=subprocess.PIPE)
        is_alive, end = lambda: process.poll() is None, process.communicate

    def stop() -> None:
        process.kill()
        end()
        shutil.rmtree(folder)

    atexit.register(stop)
    deadline = time.monotonic() + _AT_MOST
    while not place.exists():
        assert is_alive(), "the process that imports everything has ended"
        assert time.monotonic() < deadline, "imports take too long"
        time.sleep(0.02)
    return [sys.executable, "-I", "-S", __file__, str(place)]


def warm_executable(folder: Path, package: bool = True) -> str:
    """Writes `warm_python` as one program, for `monkeypatch.setattr(sys, "executable", ...)`; returns its path."""
    program = folder / "warm-python"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(warm_python(package))} "$@"\n', "utf-8")
    program.chmod(0o755)
    return str(program)


# -- what a test starts ----------------------------------------------------------------------------------------------


def _ask(place: str, argv: list[str]) -> int:
    """Has a program run with this process's streams, folder and environment; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        request = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        for number in _FORWARDED:
            signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
        code = int(server.recv(16) or b"-9")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


# -- the process that has imported everything ------------------------------------------------------------------------


def _serve(place: str) -> None:
    """Forks a keeper for each request, and the program from it."""
    parent = multiprocessing.parent_process()
    pytest_ended = 0 if parent is None else parent.sentinel
    gc.freeze()  # what is never collected is not copied in forked processes
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place + ".new")
    listener.listen(16)
    os.rename(place + ".new", place)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, whose end closes stdin
    while True:
        if pytest_ended in select.select([pytest_ended, listener], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which programs do not use
            if os.fork():
                connection.close()
                continue
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            length, streams, *_ = socket.recv_fds(connection, 8, 3)
            request = b""
            while len(request) < int.from_bytes(length, "big"):
                request += connection.recv(1 << 16)
            program = os.fork()
        if program:
            for stream in streams:
                os.close(stream)
            _keep(connection, program)
        connection.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _run(*json.loads(request))


def _keep(connection: socket.socket, program: int) -> None:
    """Passes signals on to a program, kills it when who asked for it is gone, and reports its end."""
    ended = os.pidfd_open(program)
    while ended not in (ready := select.select([connection, ended], [], [])[0]):
        if connection in ready:
            numbers = connection.recv(16)
            for number in numbers or [signal.SIGKILL]:
                os.kill(program, number)
            if not numbers:
                break
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(str(code).encode())
    os._exit(0)


def _read_environment_again() -> None:
    """Gives libraries the Hub's address and folders that this process's variables name."""
    from huggingface_hub import constants, hf_api

    before = dict(vars(constants))
    importlib.reload(constants)
    changed = {name: value for name, value in vars(constants).items() if before.get(name) != value and name.isupper()}
    changed["HF_MODULES_CACHE"] = os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))
    for name, module in list(sys.modules.items()):
        if name.startswith(("huggingface_hub.", "transformers.")):
            for constant in changed.keys() & vars(module).keys():
                setattr(module, constant, changed[constant])
    hf_api.api.endpoint = constants.ENDPOINT


def _become(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Runs a program in this process, as Python does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _read_environment_again()
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    is_safe = argv[0] == "-P"
    del argv[: int(is_safe)]
    while argv[0] == "-W":
        warnings.simplefilter(argv[1])  # type: ignore[arg-type]
        del argv[:2]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    if argv[0] in ("-c", "-m"):
        sys.path[:0] = [] if is_safe else [""]
        source, name = argv.pop(1), "<string>"
        if argv[0] == "-m":
            name = importlib.util.find_spec(source).origin
            source, argv[0] = Path(name).read_text("utf-8"), name
    else:
        name = main.__file__ = argv[0]
        sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
        source = Path(name).read_text("utf-8")
    sys.argv = argv
    exec(compile(source, name, "exec"), vars(main))


def _run(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Runs a program and ends this process with its exit code."""
    code = 0
    try:
        _become(argv, folder, environment)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__" and sys.flags.isolated:
    sys.exit(_ask(sys.argv[1], sys.argv[2:]))
if __name__ == "__main__":
    for _name in _STOCK:
        importlib.import_module(_name)
    importlib.import_module("torch").set_num_threads(1)
    _serve(sys.argv[1])
