"""Does scripts/setup_env.sh use what there is, and install once where nothing is?"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NOTHING_ACTIVE = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}


@pytest.fixture
def project(tmp_path) -> Path:
    """A project that installs in seconds, with our script."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPO / "scripts/setup_env.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "tiny"\nversion = "1"\ndependencies = [\n    "tomli-w",\n]\n'
        '[tool.setuptools]\npy-modules = []\n[project.optional-dependencies]\ndev = ["six"]\n'
    )
    return tmp_path


def _start(project: Path, extra: str = "run", **environment: str) -> subprocess.Popen:
    command = f"set -euo pipefail; source scripts/setup_env.sh {extra}; echo $PYTHON"
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=project,
        env=NOTHING_ACTIVE | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_active_environment_that_has_all_is_used_as_it_is(project):
    out, err = _start(project, VIRTUAL_ENV=sys.prefix).communicate()
    assert (out.strip(), err) == (f"{sys.prefix}/bin/python", "")
    assert not (project / ".venv").exists()


def test_two_starts_at_once_install_once(project):
    (project / ".venv").mkdir()  # the machine's python3 may have the dependencies: leave it aside
    both = [_start(project), _start(project)]
    results = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert {out.strip() for out, _ in results} == {f"{project}/.venv/bin/python"}
    assert sum("installing torchtitan" in err for _, err in results) == 1
    assert _start(project).communicate()[1] == ""  # nothing is repeated

    assert "installing" in _start(project, "dev").communicate()[1]  # now with what tests need
    assert [_start(project, extra).communicate()[1] for extra in ("dev", "run")] == ["", ""]


def test_a_failed_installation_is_said_and_not_used(project):
    (project / ".venv").mkdir()
    text = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(text.replace("tomli-w", "tomli-w==0.0.0.no"))
    for _ in range(2):
        process = _start(project)
        assert "[setup] pip failed, see above" in process.communicate()[1]
        assert process.returncode == 1
