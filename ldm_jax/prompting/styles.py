"""Styles: texts that go around or behind a prompt, in the table of stable-diffusion-webui.

name,prompt,negative_prompt
photo,"a photo of {prompt}, 35mm",blurry
"""

import csv
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

from ldm_jax.runtime import reading

PLACE = "{prompt}"


class Style(NamedTuple):
    """A style by its name."""

    name: str
    prompt: str
    negative_prompt: str

    def around(self, prompt: str, negative: str) -> tuple[str, str]:
        """(prompt, negative prompt) in this style."""
        return _joined(self.prompt, prompt), _joined(self.negative_prompt, negative)


def read(path: Any) -> dict[str, Style]:
    """{name: style} of a CSV file. ValueError if it is none, or has no column of names."""
    with reading.refusals(path, "it is no table of styles"):
        text = reading.read_bytes(path).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            names = rows.fieldnames or []
            if not {"name", "prompt"} <= {*names}:
                raise ValueError(f"has the columns {names}, and not name, prompt, negative_prompt")
            fields = [[row.get(n) or "" for n in Style._fields] for row in rows]
        except csv.Error as error:
            raise ValueError(f"is not CSV ({error})") from error
    return {name: Style(name, *texts) for name, *texts in fields if name}


def chosen(known: dict[str, Style], names: Iterable[str], where: str) -> list[Style]:
    """Styles by name. ValueError, beginning with `where`, for one that there is not."""
    found = []
    for name in names:
        if name not in known:
            shown = ", ".join([*known][:20]) or "none"
            raise ValueError(f"{where} {name!r:.60}: there is no such style, but {shown}")
        found.append(known[name])
    return found


def _joined(style: str, text: str) -> str:
    if PLACE in style:
        return style.replace(PLACE, text)
    return ", ".join(part for part in (text.strip(), style.strip()) if part)
