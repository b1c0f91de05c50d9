"""The package as it is imported: `ldm_jax.load` is the function, and importing costs little."""

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
    ],
)
def test_load_is_a_function_whatever_was_imported_before(code):
    assert fresh(code) == "load"


def test_configs_are_read_without_jax():
    code = "import sys, ldm_jax.configs.digits; print(sorted({'jax', 'flax'} & sys.modules.keys()))"
    assert fresh(code) == "[]"


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
