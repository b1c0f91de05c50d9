"""The package as it is imported: `ldm_jax.load` is the function, and importing costs little."""

import pathlib
import subprocess
import sys

import pytest

import ldm_jax


def fresh(code: str) -> str:
    """stdout of `code` in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import ldm_jax; print(ldm_jax.load.__name__)",
        "from ldm_jax import load; print(load.__name__)",
        "import ldm_jax.loading, ldm_jax.sample.main, ldm_jax; print(ldm_jax.load.__name__)",
        "from ldm_jax import checkpoint, load; checkpoint.save; print(load.__name__)",
    ],
)
def test_load_is_a_function_whatever_was_imported_before(code):
    assert fresh(code) == "load"


def test_configs_are_read_without_jax():
    code = "import sys, ldm_jax.configs.digits; print(sorted({'jax', 'flax'} & sys.modules.keys()))"
    assert fresh(code) == "[]"


def test_metrics_are_written_without_torch(tmp_path):
    """tensorboardX would import it where it is installed; whoever wants it later still gets it."""
    code = f"""
import importlib.util, pathlib, sys
from ldm_jax.train.run import writers
path = pathlib.Path({str(tmp_path)!r})
board = writers.TensorBoard(path)
board.scalars(1, {{"loss": 0.5}})
board.close()
before = "torch" in sys.modules
try:
    import torch
    found = True
except ImportError:
    found = False
files = list((path / "tensorboard").iterdir())
print(before, found == (importlib.util.find_spec("torch") is not None), len(files))
"""
    assert fresh(code) == "False True 1"


def test_nothing_reads_torch_tensorflow_or_transformers_in():
    code = (
        "import sys, ldm_jax.train.ldm, ldm_jax.train.autoencoder, ldm_jax.sample.main\n"
        "import ldm_jax.data.tfds, ldm_jax.data.tokens\n"
        "heavy = {'torch', 'tensorflow', 'diffusers', 'sklearn', 'transformers'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    assert fresh(code) == "[]"


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ldm_jax.lode


def test_the_demo_installs_nothing_for_tests(tmp_path):
    """And the tests install what the demo needs: one environment serves both."""

    root = pathlib.Path(__file__).parents[1]

    def installs(target):
        command = ["make", "-n", target, f"VENV={tmp_path}/none"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        run = [line for line in done.stdout.splitlines() if not line.startswith("echo")]
        return [line.split()[-1] for line in run if "pip install" in line]

    assert installs("demo") == ["'.[demo]'"]
    assert installs("test") == installs("lint") == ["'.[demo,test]'"]
