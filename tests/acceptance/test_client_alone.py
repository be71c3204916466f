"""The client in an environment without torch can submit and download."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.conftest import ROOT, UserFarm

pytestmark = pytest.mark.long

SCRIPT = """
import json, sys
from importlib.metadata import distributions
from farm import Farm

with Farm() as farm:
    batch = farm.submit(["a red circle"], name="light", num_inference_steps=3)
    batch.wait(120)
    paths = batch.download("light")
heavy = {"torch", "diffusers", "transformers", "numpy", "flower"}
installed = {found.metadata["Name"].lower() for found in distributions()}
print(json.dumps({"files": [str(path) for path in paths], "heavy": sorted(heavy & (installed | set(sys.modules)))}))
"""


def test_the_client_alone_submits_and_downloads_without_torch(user: UserFarm, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ROOT], check=True, timeout=600
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", SCRIPT], cwd=user.folder, env=env, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["heavy"] == []
    assert [Path(user.folder / path).stat().st_size > 0 for path in said["files"]] == [True]
