"""Runs the slow tests of bad input, and counts what was tried and how each example ended.

    python benchmarks/bad_input.py --output benchmarks/results/bad_input.json

Every example is either "right" (what was asked for came out whole) or an error of a class that says what is wrong; any
other outcome fails the run, and nothing is written. Examples differ from run to run. With `--property NAME` one of
the files is tried, and the others keep their numbers in the output.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FILES = {"settings": "test_bad_settings.py", "flags": "test_bad_flags.py", "images": "test_bad_images.py",
         "checkpoints": "test_bad_checkpoints.py"}  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--property", choices=sorted(FILES), action="append")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="In words.")
    parser.add_argument("--output", type=Path)
    named = parser.parse_args()
    files = [str(ROOT / "tests" / "invariant" / FILES[name]) for name in named.property or FILES]
    code = pytest.main(["-q", "-p", "no:xdist", "-m", "slow", "--show-capture=no", f"--rootdir={ROOT}", *files])
    if code:
        raise SystemExit(int(code))
    import bad_input  # from tests/, which pytest has put on the path

    counted = {
        name: {
            "examples": outcomes.total(),
            "right": outcomes["right"],
            "others": {kind: number for kind, number in sorted(outcomes.items()) if kind != "right"},
            "cpu_seconds": round(bad_input.SECONDS[name], 1),
        }
        for name, outcomes in bad_input.OUTCOMES.items()
    }
    before = json.loads(named.output.read_text()) if named.output and named.output.is_file() else {}
    properties = dict(sorted({**before.get("properties", {}), **counted}.items()))
    record = {
        "machine": named.machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "examples": sum(row["examples"] for row in properties.values()),
        "properties": properties,
    }
    text = json.dumps(record, indent=2) + "\n"
    sys.stdout.write(text)
    if named.output:
        named.output.write_text(text)


if __name__ == "__main__":
    main()
