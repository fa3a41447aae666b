"""Several processes of one machine, as `torchrun` starts them: they talk over gloo, on the CPU."""

import os
import signal
import subprocess
import sys
from pathlib import Path

SECONDS = 200  # below the limit of a test, so that nothing is left behind


def torchrun(ranks: int, script: Path, arguments: list[str], environment: dict[str, str]) -> str:
    """Runs a script in some processes and returns what they wrote to the screen; fails where one of them does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    process = subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:  # the processes that it started would outlive it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, f"{out[-1000:]}\n{err[-4000:]}"
    return out
