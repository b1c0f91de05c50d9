"""Lists of prompts: lines of text, or tables with settings for each prompt.

    a.txt      one prompt per line
    a.csv      columns of prompt, negative_prompt, seed, guidance_scale, num_images
    a.jsonl    one object per line with these names

Columns left out or empty are as on the command line. A bad line is named, the others are read.
"""

import csv
import decimal
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from ldm_jax import seeds
from ldm_jax.runtime import reading

COLUMNS = ("prompt", "negative_prompt", "seed", "guidance_scale", "num_images")
LARGEST = {int: 10**30, float: decimal.Decimal(sys.float_info.max)}
NAMES = {int: "a whole number", float: "a number"}


class Prompt(NamedTuple):
    """A prompt and its settings."""

    prompt: str
    negative_prompt: str
    seed: int | None
    """Its images are numbers 0, 1, ... of this seed; None: they count on under that of the list."""
    guidance_scale: float
    num_images: int


def read(path: str, default: Prompt) -> tuple[list[Prompt], list[str]]:
    """(prompts, faults of the other lines, each with its file and line).

    ValueError if no line can be read, or the file is none of prompts.
    """
    kind = epath.Path(path).suffix.lower()
    if kind in (".json", ".tsv"):
        raise ValueError(f"--prompt-file {path}: give .csv, .jsonl, or text with a prompt per line")
    lines, problems = lines_of(path)
    reader = {".csv": read_csv, ".jsonl": read_jsonl, ".ndjson": read_jsonl}.get(kind, read_text)
    prompts = []
    for number, values in reader(path, lines):
        try:
            if isinstance(values, ValueError):
                raise values
            prompts.append(prompt_of(values, default))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if not prompts and problems:
        raise ValueError(f"--prompt-file: {'; '.join(problems)}")
    if not prompts:
        raise ValueError(f"--prompt-file {path}: holds no prompt")
    return prompts, problems


def lines_of(path: str) -> tuple[list[str], list[str]]:
    """(lines, problems): a line that is not UTF-8 is empty, and among the problems."""
    lines, problems = [], []
    data = reading.read_bytes(path).removeprefix(b"\xef\xbb\xbf")  # byte-order mark of Excel
    for number, line in enumerate(data.splitlines(), 1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            lines.append("")
            problems.append(f"{path}:{number}: is not UTF-8 text")
    return lines, problems


def read_text(path: str, lines: list[str]) -> Iterator[tuple[int, Any]]:
    """(line, values) of lines of text."""
    del path
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def read_jsonl(path: str, lines: list[str]) -> Iterator[tuple[int, Any]]:
    """(line, values or ValueError) of lines of JSON."""
    del path
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_int=_whole, parse_float=decimal.Decimal)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"is not JSON ({error.msg} at column {error.colno})")
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; too deep
            yield number, ValueError(f"is not JSON ({error})")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            yield number, ValueError(f'is {line.strip()[:40]}, not {{"prompt": ...}}')


def _whole(digits: str) -> int | decimal.Decimal:
    """A whole number of JSON; Python makes no int of more than 4300 digits."""
    return int(digits) if len(digits) < 100 else decimal.Decimal(digits)


def read_csv(path: str, lines: list[str]) -> Iterator[tuple[int, Any]]:
    """(line, values or ValueError) of a table; ValueError for a header without prompts."""
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    header, number = None, 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, ValueError(f"is not CSV ({error})")
            number = reader.line_num + 1
            continue
        if any(cell.strip() for cell in cells):
            if header is None:
                header = header_of(path, number, cells)
            elif len(cells) > len(header):
                yield number, ValueError(f"has {len(cells)} cells, the header {len(header)}")
            else:
                yield number, dict(zip(header, (cell.strip() for cell in cells), strict=False))
        number = reader.line_num + 1


def header_of(path: str, number: int, cells: list[str]) -> list[str]:
    """Names of the columns. ValueError for one that is unknown, duplicate, or missing."""
    names = [cell.strip() for cell in cells]
    wrong = [name for i, name in enumerate(names) if name not in COLUMNS or name in names[:i]]
    if wrong or "prompt" not in names:
        raise ValueError(
            f"{path}:{number}: the first line names columns of {', '.join(COLUMNS)}, prompt among"
            f" them; here it is {', '.join(names)[:80]!r}"
        )
    return names


def prompt_of(values: dict[str, Any], default: Prompt) -> Prompt:
    """The prompt of a line's values. ValueError names their fault."""
    unknown = [name for name in values if name not in COLUMNS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(COLUMNS)}")
    given = {name: value for name, value in values.items() if value not in ("", None)}
    for name in ("prompt", "negative_prompt"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{name} {given[name]!r} is not text")
    if not given.get("prompt", "").strip():
        raise ValueError("has no prompt")
    for name, kind in (("seed", int), ("guidance_scale", float), ("num_images", int)):
        if name in given:
            given[name] = number_of(name, given[name], kind)
    prompt = default._replace(**given)
    if prompt.num_images < 1:
        raise ValueError(f"num_images {prompt.num_images}: give at least 1")
    if prompt.seed is not None:
        seeds.checked(prompt.seed)
    return prompt


def number_of(name: str, value: Any, kind: type) -> Any:
    """`value`, a number or the text of one, as an int or a float; ValueError if it is none.

    An int is exact, however many digits it has: a float would lose those above 2**53.
    """
    try:
        number = None if isinstance(value, bool) else decimal.Decimal(value)
    except (decimal.InvalidOperation, TypeError, ValueError):
        number = None
    # bounded before int(), which would write out all digits of 1e999999
    if number is None or not number.is_finite() or number.copy_abs() >= LARGEST[kind]:
        fits = False
    else:
        fits = kind is float or number == int(number)
    if not fits:
        shown = repr(value) if isinstance(value, str) else str(value)
        raise ValueError(f"{name} {shown:.60} is not {NAMES[kind]}")
    return kind(number)
