"""Hooks of mkdocs: files from outside docs/, the notebook as a page, formulas as MathML."""

import json
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SITE = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/notebook.ipynb": "notebook.md",
}
LINK = re.compile(r"(?<!\w)(!?\[([^]]*)\])\(([^)\s#:]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the changelog, the guide for contributors, the benchmarks' pages and the notebook."""
    outside = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("benchmarks/**/*.md")]
    for path in outside:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, SITE.get(name, name), content=path.read_text("utf-8")))
    for path in ROOT.glob("docs/*.ipynb"):
        page = f"{path.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository, which work there, into the site's.

    A link to a file that the site does not hold, such as a source file, becomes its text.
    """
    here = page.file.src_uri
    outside = {site: name for name, site in SITE.items() if site != "index.md"}
    of_repository = here.startswith("benchmarks/") or here in outside
    folder = posixpath.dirname(outside.get(here, here) if of_repository else f"docs/{here}")

    def to_site(match: re.Match) -> str:
        text, label, link, anchor = match.groups()
        name = posixpath.normpath(posixpath.join(folder, link))
        if not (ROOT / name).exists():
            return match[0]
        if not (name in SITE or name.startswith("docs/") or name.endswith(".md")):
            return label
        target = SITE.get(name, name.removeprefix("docs/"))
        return f"{text}({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(to_site, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas become MathML, which browsers show without a script or a font of ours."""

    def to_mathml(match: re.Match) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(unescape(match[2]).strip(), display=display)

    return FORMULA.sub(to_mathml, html)


def notebook_page(path: Path) -> str:
    """Markdown of a notebook with the outputs that it holds."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [output(each) for each in cell.get("outputs", [])]
    return "\n\n".join(parts)


def output(given: dict) -> str:
    """Markdown of a cell's output: a picture, or text."""
    data = given.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="output" class="pixels" src="data:image/png;base64,{png}">'
    return "```text\n" + "".join(given.get("text") or data.get("text/plain", "")).rstrip() + "\n```"
