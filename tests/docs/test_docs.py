"""The scripts of docs/ run as they are, on the tiny config."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import task_models
import text_model
from PIL import Image

import ldm_jax
from ldm_jax import bundle, sampling, saving, schema
from ldm_jax.configs import digits, folder, tiny
from ldm_jax.runtime import checkpoint, flags, rundir
from ldm_jax.sample import again, convert
from ldm_jax.sample import main as sample
from ldm_jax.sample.evaluate import main as evaluate
from ldm_jax.sample.web import main as web
from ldm_jax.train import main
from ldm_jax.train.plan import command as plan
from ldm_jax.train.run import supervisor

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def script(name: str):
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(first_stage_run, tmp_path_factory) -> Path:
    """The run of docs/train_multihost.py on four devices, stopped after a step and resumed."""
    base, run = tiny.get_config("class"), tmp_path_factory.mktemp("docs") / "run"
    config = dataclasses.replace(
        base,
        first_stage=schema.FirstStageConfig(path=str(first_stage_run), scale_images=16),
        unet=dataclasses.replace(base.unet, channel_mult=(1,)),
        max_to_keep=3,
    )
    train = script("train_multihost").train
    train(dataclasses.replace(config, steps=1), str(run))
    assert checkpoint.saved_steps(run) == [1]
    train(dataclasses.replace(config, steps=5), str(run))
    return run


@pytest.mark.slow
def test_training_script_resumes_and_saves(trained):
    assert checkpoint.saved_steps(trained) == [1, 4, 5]
    assert rundir.read_config(trained).steps == 5
    kernels = [
        checkpoint.restore_parts(trained, step, ["params"])["params"]["unet"]["conv_in"]["kernel"]
        for step in (1, 5)
    ]
    assert 1e-4 < np.abs(kernels[1] - kernels[0]).max() < 0.1


def test_sampling_script_draws_every_label(trained, tmp_path):
    script("sample").main(str(trained), str(tmp_path / "a.png"), "3", "1", steps=4)
    script("sample").main(str(trained), str(tmp_path / "b.png"), "3", "0", steps=4)
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in "ab")
    side = ldm_jax.load(trained).config.size
    assert a.shape == b.shape == (side + 4, 2 * (side + 2) + 2, 3)
    first, second = a[:, : side + 2], a[:, side + 2 : 2 * side + 4]
    assert np.abs(first - b[:, : side + 2]).max() == 0  # a picture has its own label and key
    assert np.abs(first - second).max() > 1


def test_slant_of_a_line():
    y, x = np.mgrid[:32, :32]
    ink = np.exp(-((x - 16 + np.array([0.5, 0, -0.25])[:, None, None] * (y - 16)) ** 2) / 4)
    slants = script("guide_digits").slant(2 * ink[..., None] - 1)
    np.testing.assert_allclose(slants, [0.5, 0, -0.25], atol=0.02)


@pytest.mark.slow
def test_guiding_script_moves_every_picture_to_its_goal(trained):
    guide = script("guide_digits")
    model = ldm_jax.load(trained)
    goals, keys = np.array([0.3, -0.3]), sampling.keys_of(0, range(2))
    before, after = guide.guide(model, [3, 1], goals, keys, steps=4, updates=4)
    moved = np.asarray(guide.slant(after) - guide.slant(before))
    assert moved[0] > 0.01 > -0.01 > moved[1]


@pytest.mark.parametrize(
    ("name", "most"), [("train_multihost", 60), ("sample", 25), ("guide_digits", 85)]
)
def test_scripts_are_short(name, most):
    assert len((DOCS / f"{name}.py").read_text().splitlines()) <= most


def test_the_page_on_python_runs_as_it_is(tmp_path, monkeypatch):
    saving.save(text_model.make(), tmp_path / "runs" / "text")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    found: dict = {}
    exec("\n".join(blocks), found)
    assert found["images"].shape[0] == 4  # devices of the tests
    known = found["filled"] - found["changed"]
    assert np.isfinite(known).all()
    assert np.abs(known).max() > 0
    assert found["image"].shape == (1, 16, 16, 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs", "copy.safetensors", "copy.yaml")
    }


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    """A folder, the current one, whose runs/demo/ldm is a tiny model of ten classes."""
    context = task_models.CONTEXT
    cond = schema.ClassCondConfig(num_classes=10, embed_dim=context["context_dim"])
    saving.save(task_models.make(cond, **context), tmp_path / "runs" / "demo" / "ldm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_lines_of_the_readme_run_as_they_are(demo):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 10
    exec(code, {})
    assert np.asarray(Image.open(demo / "digits.png")).shape == (16 + 4, 10 * (16 + 2) + 2, 3)


@pytest.mark.slow
def test_the_notebook_runs_as_it_is(demo):
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        shown = tree.body.pop()
        assert isinstance(shown, ast.Expr)  # every cell ends in what it shows
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(shown.value), "cell", "eval"), names)
        kinds = {kind for each in cell["outputs"] for kind in each.get("data", ())}
        assert kinds == {"image/png" if isinstance(value, Image.Image) else "text/plain"}
    guided = (names["cond"], names["keys"], names["null"], 1.5)
    before, after = (names["sample"](p, *guided) for p in (names["model"].params, names["taught"]))
    moved = np.abs(after - before).mean(axis=(1, 2, 3))
    assert np.isfinite(moved).all()
    assert moved[0] > 1e-3
    assert names["losses"][-1] < names["losses"][0]


def test_the_config_of_super_resolution_fits_the_demo():
    config = script("superres_digits").get_config()
    stage = digits.get_config("first_stage").model
    bundle.check(bundle.model_config(config, stage), image_channels=1)


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(name):
    """Those of docs/ are checked by `make docs`."""
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s#]+)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.M)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


NAMES = re.compile(
    r"`(?:ldm_jax\.)?((?:train\.)?[a-z_]+(?:\.\w+)+)(?=[`(\[ ])"
)  # as in `diffusion.q_sample`
FILES = (".py", ".json", ".md", ".png", ".yaml", ".npy", ".npz")


def follow(value, parts) -> bool:
    """Tell whether attributes, modules or fields of a class lead from `value` along `parts`."""
    for part in parts:
        inner = f"{value.__name__}.{part}" if hasattr(value, "__path__") else ""
        if hasattr(value, part):
            value = getattr(value, part)
        elif inner and importlib.util.find_spec(inner):
            value = importlib.import_module(inner)
        else:
            return part in getattr(value, "__dataclass_fields__", {})
    return True


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_functions_and_fields_that_a_page_names_exist(page):
    configs = (folder.get_config("class"), tiny.get_config("gan"))
    for name in set(NAMES.findall((DOCS / page).read_text())):
        first, *rest = name.split(".")
        places = [f"ldm_jax.{p}{first}" for p in ("", "convert.", "large.", "runtime.", "models.")]
        places = [importlib.import_module(p) for p in places if importlib.util.find_spec(p)]
        places += [bundle.LatentDiffusion] if first == "model" else []
        places += [getattr(config, first) for config in configs if hasattr(config, first)]
        if places and not name.endswith(FILES):
            assert any(follow(place, rest) for place in places), f"{page}: {name} is not there"


TRAIN_OPTIONS = (
    *(main.Train, main.Encode, main.Pack, plan.PlanOptions),
    *(supervisor.Restart, flags.Process),
)


def commands(text: str) -> list[list[str]]:
    """Words of every command of ours that is a line of a block of code."""
    lines = re.findall(r"^(?:    )?(?:srun )?(ldm-\w+ .*)$", text.replace("\\\n", " "), re.M)
    return [shlex.split(line.split("&&")[0], comments=True) for line in lines]


def options_of(command: list[str]) -> tuple[list, set[str]]:
    """(configs whose fields are options, names of the other options) of a command."""
    program, first, *rest = command
    configs, kinds = [], TRAIN_OPTIONS
    if program == "ldm-train":
        name = rest[0] if first in main.SUBCOMMANDS else first
        known = ("imagenet", "folder:text", "first_stages:kl-f8") if name == "CONFIG" else (name,)
        configs = [main.load_config(str(ROOT / n) if "/" in n else n) for n in known]
    elif program == "ldm-convert":
        kinds = (convert.Options,)
    elif program == "ldm-web":
        kinds = (web.Options,)
    else:
        tasks = evaluate.TASKS if program == "ldm-eval" else {**sample.TASKS, "again": again}
        chosen = tasks.values() if first == "TASK" else [tasks[first]]
        kinds = tuple(task.Options for task in chosen)
    fields = (dataclasses.fields(kind) for kind in (*kinds, flags.Process))
    return configs, {field.name for each in fields for field in each}


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))]
)
def test_options_of_the_commands_of_a_page_exist(page):
    for command in commands((ROOT / page).read_text()):
        configs, names = options_of(command)
        for option in (word[2:] for word in command if word.startswith("--")):
            *path, last = option.replace("-", "_").split(".")
            places = [".".join([*path, end]) for end in (last, last.removeprefix("no_"))]
            known = [place for place in places if place in names]
            known += [p for p in places for c in configs if follow(c, p.split("."))]
            assert known, f"{page}: {' '.join(command)}: --{option} is no option"
