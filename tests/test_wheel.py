"""The wheel holds every module of the tree and works away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """stdout of a command that succeeds; PYTHONPATH and fake devices stay behind."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves build/ and egg-info where it runs."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = ("pyproject.toml", "README.md", "LICENSE", "ldm_jax", "train", "sample", "configs")
    for name in tracked:
        target = source / name
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
            continue
        for path in (f for end in (".py", ".txt") for f in (ROOT / name).rglob(f"*{end}")):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of a fresh environment with the wheel; dependencies come from this one's packages.

    Named in a .pth file they lie behind the environment's own packages, and the .pth files in them
    (among which the checkout's editable install) are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(run(scripts / "python", "-c", code, cwd=folder).strip())
    dependencies = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (purelib / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return scripts


def test_wheel_holds_every_module(wheel):
    tree = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ldm_jax").rglob("*.py")}
    for folder in ("train", "sample", "configs"):
        tree |= {f"ldm_jax/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / folder).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert held == tree
    assert {name for name in top if not name.endswith(".dist-info")} == {"ldm_jax"}


def test_installed_modules_are_those_of_the_wheel(installed, tmp_path):
    code = "import ldm_jax.train.main as m, ldm_jax; print(m.__file__); print(ldm_jax.__file__)"
    for line in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(line).is_relative_to(installed.parent), line


def test_commands_run_from_an_empty_directory(installed, tmp_path):
    assert "digits" in run(installed / "ldm-train", "--help", cwd=tmp_path)
    assert "class2img" in run(installed / "ldm-sample", "--help", cwd=tmp_path)
    assert "--check" in run(installed / "ldm-convert", "--help", cwd=tmp_path)
    assert "reconstruct" in run(installed / "ldm-eval", "--help", cwd=tmp_path)
    text = run(installed / "ldm-train", "digits", "--help", cwd=tmp_path)
    assert "--workdir" in text
    assert "--first-stage.path" in text
    assert not list(tmp_path.iterdir())
