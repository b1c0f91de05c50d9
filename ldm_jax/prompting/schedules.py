r"""Prompts that change while an image is drawn, as stable-diffusion-webui reads them.

    [a:b:0.5]   a, then b from half of the steps on (a number with a point is a share of the steps)
    [a:b:10]    a, then b after step 10
    [b:0.5]     nothing, then b         [a::0.5]   a, then nothing
    [a|b]       a and b in turns
    a AND b:0.5 both at once: guidance towards each, by its weight

Brackets nest. What has another form is text, as `(x:1.2)` and `[x]` are, which `emphasis` reads.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ldm_jax.prompting.emphasis import BLANKS, NUMBER, clamped

Part = tuple[str, float]
"""A prompt of those that AND joins, and its weight."""
Entry = tuple[int, str]
"""The last step, counted from 1, of a text."""

DEEPEST = 64  # brackets in brackets; those beyond are text
TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(rf"(.*):{BLANKS}({NUMBER}){BLANKS}", re.DOTALL)
MOST_PARTS, MOST_TEXTS = 16, 128
"""Prompts that AND joins, and different texts that one is in turn."""


class _Change(NamedTuple):
    """`before` up to and with step `last`, then `after`."""

    before: "_Tree"
    after: "_Tree"
    last: int


class _Turns(NamedTuple):
    """One of `options` after the other, a step each."""

    options: tuple["_Tree", ...]


_Tree = list["str | _Change | _Turns"]


def parts(prompt: str) -> list[Part]:
    """The prompts that AND joins, each with its weight: `a AND b:0.5`. ValueError for too many."""
    found = []
    for text in AND.split(prompt):
        match = WEIGHT.fullmatch(text)
        found.append((match.group(1), clamped(float(match.group(2)))) if match else (text, 1.0))
    if len(found) > MOST_PARTS:
        raise ValueError(
            f"prompt {prompt[:24]!r}... joins {len(found)} by AND, {MOST_PARTS} at most"
        )
    return found


def schedule(prompt: str, steps: int, before: int = 0) -> list[Entry]:
    """Texts of a prompt over `steps` steps, each with its last step; the last one is `steps`.

    before: steps of a pass before this one, as the first of a hires fix: shares then count from 1
    on, and step numbers from the last of that pass on.
    ValueError for a prompt that is too many different texts.
    """
    tree, ends = _parse(prompt, steps, before)
    entries, different = [], set()
    for end in sorted(ends | {steps}):
        text = _text(tree, end)
        entries.append((end, text))
        different.add(text)
        if len(different) > MOST_TEXTS:
            raise ValueError(
                f"prompt {prompt[:24]!r}... is more than {MOST_TEXTS} different texts in turn"
            )
    return entries


def _text(tree: _Tree, step: int) -> str:
    """The text at a step, counted from 1."""
    texts = []
    for node in tree:
        if isinstance(node, _Change):
            texts.append(_text(node.before if step <= node.last else node.after, step))
        elif isinstance(node, _Turns):
            texts.append(_text(node.options[(step - 1) % len(node.options)], step))
        else:
            texts.append(node)
    return "".join(texts)


class _Frame:
    """An open bracket: the trees between its separators."""

    def __init__(self, bracket: str) -> None:
        self.bracket, self.separators = bracket, ""
        self.trees: list[_Tree] = [[]]

    def literal(self, end: str) -> _Tree:
        """All of it as text, up to `end`."""
        tree: _Tree = [self.bracket, *self.trees[0]]
        for separator, more in zip(self.separators, self.trees[1:], strict=True):
            tree += [separator, *more]
        return [*tree, end]


def _parse(prompt: str, steps: int, before: int) -> tuple[_Tree, set[int]]:
    """(the prompt as a tree, the steps after which its text changes)."""
    frames, ends = [_Frame("")], set()
    for token in TOKEN.findall(prompt):
        top = frames[-1]
        if token in "[(" and len(frames) <= DEEPEST:
            frames.append(_Frame(token))
        elif token in ":|" and top.bracket == "[":
            top.separators += token
            top.trees.append([])
        elif token == "]" and top.bracket == "[":
            frames.pop()
            node = _node(top, steps, before)
            if isinstance(node, _Change) and 1 <= node.last < steps:
                ends.add(node.last)
            elif isinstance(node, _Turns):
                ends |= set(range(1, steps))
            frames[-1].trees[-1] += [node] if node is not None else top.literal("]")
        elif token == ")" and top.bracket == "(":
            frames.pop()
            frames[-1].trees[-1] += top.literal(")")
        else:
            top.trees[-1].append(token)
    while len(frames) > 1:
        top = frames.pop()
        frames[-1].trees[-1] += top.literal("")
    return frames[0].trees[0], ends


def _node(frame: _Frame, steps: int, before: int) -> _Change | _Turns | None:
    """What square brackets mean; None for text."""
    trees, separators = frame.trees, set(frame.separators)
    if separators == {"|"}:
        return _Turns(tuple(trees))
    if separators != {":"} or len(trees) > 3:
        return None
    last = _last(trees[-1], steps, before)
    if last is None:
        return None
    return _Change(trees[0] if len(trees) == 3 else [], trees[-2], last)


def _last(tree: Sequence, steps: int, before: int) -> int | None:
    """The step that a number names; None for anything but a number."""
    text = "".join(tree) if all(isinstance(node, str) for node in tree) else ""
    if not re.fullmatch(rf"\s*{NUMBER}\s*", text):
        return None
    value = float(text)
    if "." in text:
        value = (value - (before > 0)) * steps
    else:
        value -= before
    return max(0, min(steps, int(value)))
