"""Imports go one way: checked on the syntax trees, so that imports inside functions count too."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module sees earlier levels and what stands before it in its own level; the files
# of a package see each other as long as there is no circle.
LEVELS = (
    "schema cost seeds noise resizing finite diffusion sharding runtime",
    "models solvers guidance denoising data metrics",
    "latents conditioning losses train_state bundle large convert shapes neighbours adapters",
    "sampling prompting loading saving compat export",
    "configs",
    "train sample",
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts.split()}
ORDER = {part: i for i, part in enumerate(" ".join(LEVELS).split())}
OUTSIDE = ("configs", "train", "sample")  # folders beside ldm_jax/ that are packages inside it
TEST_ONLY = ("torch", "diffusers", "tensorflow", "sklearn", "pytest")
LAZY = {"ldm_jax.data.digits": "sklearn"}  # the demo's data, of the extra [demo]


def modules_of(root: Path) -> dict[str, Path]:
    """{dotted name: file} as installed."""
    found = {}
    for folder in ("ldm_jax", *OUTSIDE):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts if folder == "ldm_jax" else ("ldm_jax", *parts))] = path
    return found


def imported_by(path: Path) -> set[str]:
    """Every dotted name that a file imports, also inside functions; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def part_of(module: str) -> str:
    """`data` of ldm_jax.data.rows; empty for ldm_jax itself."""
    return module.partition(".")[2].partition(".")[0]


def wrong(importer: str, imported: str) -> str | None:
    """Why `importer` may not see the module `imported`."""
    a, b = part_of(importer), part_of(imported)
    if a == b or not a or (not b and imported == "ldm_jax"):
        return None
    for part in (a, b):
        if part not in LEVEL:
            return f"{part} stands in no level of tests/test_imports.py"
    if a == "configs" and b != "schema":
        return "configs see schema only"
    if {a, b} == {"train", "sample"}:
        return "train and sample never see each other"
    return None if ORDER[b] < ORDER[a] else f"{b} stands above {a}"


def violations(root: Path) -> list[str]:
    """One line for every import that goes the wrong way."""
    modules, lines, graph = modules_of(root), [], {}
    for importer, path in modules.items():
        graph[importer] = set()
        for name in sorted(imported_by(path)):
            top = name.partition(".")[0]
            if name.startswith("."):
                lines.append(f"{importer} imports {name}: write it from ldm_jax on")
            elif top in OUTSIDE:
                lines.append(f"{importer} imports {name}: its name is ldm_jax.{name}")
            elif top in TEST_ONLY and LAZY.get(importer) != top:
                lines.append(f"{importer} imports {name}: not at run time")
            elif top == "ldm_jax":
                module = name if name in modules else name.rpartition(".")[0] or name
                reason = wrong(importer, module)
                if reason:
                    lines.append(f"{importer} imports {module}: {reason}")
                if module != importer and importer != "ldm_jax":
                    graph[importer].add(module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        lines.append(f"circle: {' <- '.join(error.args[1])}")
    return lines


def test_imports_go_one_way():
    assert violations(ROOT) == []


def test_every_file_is_looked_at():
    some = {"ldm_jax", "ldm_jax.schema", "ldm_jax.train.ldm", "ldm_jax.data.examples"}
    assert some <= modules_of(ROOT).keys()


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("ldm_jax/schema.py", "import jax\nfrom ldm_jax import diffusion", "stands above schema"),
        ("ldm_jax/models/unet.py", "from ldm_jax.bundle import bind", "bundle stands above models"),
        ("ldm_jax/latents.py", "def f():\n    import ldm_jax.sampling", "sampling stands above"),
        ("ldm_jax/data/rows.py", "from ldm_jax.latents import encode", "latents stands above data"),
        ("train/ldm.py", "from ldm_jax.sample import options", "never see each other"),
        ("sample/main.py", "import ldm_jax.train.main", "never see each other"),
        ("configs/tiny.py", "from ldm_jax import diffusion", "configs see schema only"),
        ("train/ldm.py", "from train import stop", "its name is ldm_jax.train.stop"),
        ("ldm_jax/bundle.py", "from . import latents", "write it from ldm_jax on"),
        ("ldm_jax/convert/pickle.py", "import torch", "not at run time"),
        ("ldm_jax/helpers.py", "from ldm_jax import schema", "helpers stands in no level"),
        ("ldm_jax/models/blocks.py", "from ldm_jax.models import unet", "circle: "),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line, complaint):
    good = {
        "ldm_jax/schema.py": "import json",
        "ldm_jax/diffusion.py": "from ldm_jax import schema",
        "ldm_jax/latents.py": "from ldm_jax import diffusion",
        "ldm_jax/bundle.py": "from ldm_jax import latents",
        "ldm_jax/sampling.py": "from ldm_jax.bundle import bind",
        "ldm_jax/models/blocks.py": "import jax",
        "ldm_jax/models/unet.py": "from ldm_jax.models.blocks import conv",
        "ldm_jax/data/rows.py": "from ldm_jax import schema",
        "train/main.py": "from ldm_jax import configs, schema",
        "sample/options.py": "from ldm_jax import bundle",
        "configs/__init__.py": "",
    }

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")

    write(good)
    assert violations(tmp_path) == []
    write({file: line})
    assert complaint in violations(tmp_path)[0]


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_the_levels_are_drawn_as_they_are(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    drawn = text[text.index("ldm_jax/   ") + len("ldm_jax/") : text.index("    configs/")]
    assert [line.split() for line in drawn.splitlines()] == [level.split() for level in LEVELS[:4]]
