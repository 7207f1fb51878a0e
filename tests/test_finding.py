"""What a new installation says when Keras finds no backend.

And what a folder that is called like the package does to an import.
"""

import os
import subprocess
import sys

import keras
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Stands in the way of the backends, as if they were not installed.
HIDING = """
import sys


class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hiding())
"""


@pytest.fixture
def run(tmp_path):
    def run(hidden, *command, **settings):
        (tmp_path / "sitecustomize.py").write_text(
            HIDING.format(hidden=sorted(hidden))
        )
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={
                **{k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"},
                "KERAS_HOME": str(tmp_path),
                "PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT]),
                **settings,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


BACKENDS = {"tensorflow", "jax", "torch"}


@pytest.mark.parametrize("settings", [{}, {"KERAS_BACKEND": "jax"}])
def test_the_command_without_a_backend(run, settings):
    done = run(BACKENDS, "-m", "keras_stab", **settings)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    missing = settings.get("KERAS_BACKEND", "tensorflow")
    assert f"pip install {missing}" in done.stderr
    assert f"export KERAS_BACKEND={missing}" in done.stderr


def test_an_import_without_that_backend(run):
    """The backends that are there are named."""
    here = keras.backend.backend()
    done = run(
        BACKENDS - {here},
        "-c",
        "import keras_stab",
        KERAS_BACKEND=("jax" if here == "torch" else "torch"),
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: KERAS_BACKEND is ")
    assert f"Set KERAS_BACKEND={here}" in last


def test_another_module_that_is_missing(run):
    done = run({"numpy"}, "-m", "keras_stab", KERAS_BACKEND="torch")
    assert "No module named 'numpy'" in done.stderr
    assert "KERAS_BACKEND" not in done.stderr


def test_a_folder_that_is_called_like_the_package(tmp_path):
    """As beside a clone: its folder is a namespace, found before a finder."""
    (tmp_path / "keras_stab").mkdir()
    (tmp_path / "script.py").write_text("import keras_stab; keras_stab.GRAIN")
    for command in ["script.py"], ["-c", "import keras_stab; keras_stab.GRAIN"]:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
