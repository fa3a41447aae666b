"""What this package and each version of transformers save, each version loads; see benchmarks/compatibility.py."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_version_of_transformers_loads_what_every_version_saved(tmp_path):
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "benchmarks" / "compatibility.py")
    compatibility = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compatibility)
    environments = ROOT / ".venv-transformers"
    try:
        for version in compatibility.VERSIONS:
            compatibility.make_environment(environments, version)
    except subprocess.CalledProcessError:
        pytest.skip("pip could not install other versions of transformers: this test needs a package index")
    table = compatibility.measure(tmp_path, environments)
    print(compatibility.render(table))
    assert compatibility.problems(table) == []
    # the cells that only this package can fill are there
    assert table["5.23.0"]["5.9.0"].keys() == {"encoder", "head", "classifier", "whole", "remote code"}
    assert table["5.23.0"]["4.57.6"].keys() == {"encoder", "head", "classifier"}
