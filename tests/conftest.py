"""Every test process: four fake CPU devices, no silent broadcasting over ranks, one compile cache,
and XLA that compiles in half the time, to slower code: programs here are large and run a few times.
`make test-all` compiles as users do.

Two tiny runs are trained once per session and shared by all workers; tests that change them copy
them first.
"""

import atexit
import fcntl
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and subprocesses inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ldm_jax_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--one-of-each", action="store_true", help="of every test that has parameters, the first"
    )


# The files that take longest begin, so that no worker ends alone on one of them; the first two
# compile different programs.
LONGEST = (
    *("train/test_multiprocess.py", "models/test_unet.py", "train/ldm/test_ldm.py"),
    *("test_public.py", "train/run/test_resume.py", "convert/diffusers/test_diffusers.py"),
    *("sample/test_convert.py", "test_landings.py", "convert/compvis/test_compvis.py"),
    *("sample/test_img2img.py", "sample/test_text2img.py", "train/test_parallel.py"),
    *("train/autoencoder/test_step.py", "sample/test_variations.py", "docs/test_docs.py"),
)


def pytest_collection_modifyitems(config, items):
    ranks = {str(pathlib.Path(__file__).parent / name): i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))
    if not config.getoption("one_of_each"):
        return
    seen, kept, left = set(), [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        (left if name in seen else kept).append(item)
        seen.add(name)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A worker that keeps the programs of every file ends at five gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def shown():
    """The library's log is on stderr, as inside a command."""
    from ldm_jax.runtime import log

    with log.shown():
        yield


@pytest.fixture(scope="session")
def first_stage_run(tmp_path_factory) -> pathlib.Path:
    """The run of tiny:first_stage: 8 steps on four devices."""
    from ldm_jax.configs import tiny
    from ldm_jax.train import autoencoder

    return _once(
        tmp_path_factory, "first_stage", lambda run: autoencoder.train(tiny.first_stage(), run)
    )


@pytest.fixture(scope="session")
def ldm_run(tmp_path_factory, first_stage_run) -> pathlib.Path:
    """The run of `ldm_flags`: 24 steps on four devices, uninterrupted."""
    import runs

    from ldm_jax.train import ldm

    config = runs.ldm_config(first_stage_run)
    return _once(tmp_path_factory, "ldm", lambda run: ldm.train(config, run))


def _once(tmp_path_factory, name, train) -> pathlib.Path:
    """The run `name`, trained by the first worker that asks; it appears when it is complete."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            assert train(root / f"{name}.part") == 0
            (root / f"{name}.part").rename(root / name)
    return root / name
