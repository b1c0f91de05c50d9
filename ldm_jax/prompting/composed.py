"""From prompts in a syntax to the arrays of `conditioning.composed`."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ldm_jax import schema
from ldm_jax.bundle import LatentDiffusion
from ldm_jax.data.tokens import FileTokenizer
from ldm_jax.prompting import chunks, emphasis, schedules

Syntax = Literal["plain", "webui"]
Emphasis = Literal["original", "no-norm", "ignore", "none"]
LONGEST = 20_000  # characters of a prompt
MOST_CHUNKS = 64  # of a text
MOST_READ = 256  # chunks of all parts and all their texts
COMMENT = re.compile(r"#.*")


class _Prompt(NamedTuple):
    """One of the prompts that AND joins."""

    weight: float
    texts: list[list[chunks.Chunk]]
    counts: list[int]
    """How often each text is in the schedule."""
    steps: list[int]
    """The text that each step reads."""


def batch(
    model: LatentDiffusion,
    texts: Sequence[str],
    negative: Sequence[str],
    *,
    steps: int,
    before: int = 0,
    syntax: Syntax = "plain",
    mode: Emphasis = "original",
) -> dict[str, np.ndarray]:
    """The batch of `model.encode` for prompts and as many negative ones, of any length.

    steps: how many a schedule covers; shares of it are of this number.
    before: steps of a pass before this one, see `schedules.schedule`.
    syntax: "plain" reads every character as it is, "webui" as `emphasis` and `schedules` tell.
    mode: what weights do. "original" keeps the mean of a chunk as it was without them, "no-norm"
        does not, "ignore" leaves them out, "none" reads their brackets as text.
    ValueError for a model whose text encoder cannot read chunks, and for a prompt that is too long.
    """
    vocabulary, over = _Vocabulary(model), (steps, before)
    wanted = [_read(text, vocabulary, over, syntax, mode, True) for text in texts]
    away = [_read(text, vocabulary, over, syntax, mode, False) for text in negative]
    every = [prompt for row in (*wanted, *away) for prompt in row]
    longest = max(len(text) for prompt in every for text in prompt.texts)
    _check_size([*wanted, *away], longest)
    made = _arrays(wanted, vocabulary, steps, longest, mode)
    null = _arrays(away, vocabulary, steps, longest, mode)
    return made | {f"null_{name}": array for name, array in null.items()}


def needs_guidance(batch: dict[str, np.ndarray]) -> bool:
    """True for prompts joined by AND, or weighted as its parts, which are guided at any scale."""
    weights = batch.get("weights")
    return weights is not None and (weights.shape[1] > 1 or bool(np.any(weights != 1)))


def reads_chunks(model: LatentDiffusion) -> bool:
    """True for a text encoder that can read a long text in chunks: CLIP."""
    text = schema.text_of(model.config.cond)
    return (
        text is not None
        and isinstance(text.encoder, schema.CLIPTextConfig)
        and isinstance(model.tokenizer, FileTokenizer)
    )


def _check_size(rows: list[list[_Prompt]], longest: int) -> None:
    """ValueError for prompts of too many chunks in all their parts and texts."""
    parts = max(len(row) for row in rows)
    texts = max(len(prompt.texts) for row in rows for prompt in row)
    if parts * texts * longest > MOST_READ:
        raise ValueError(
            f"the prompt has {parts * texts * longest} chunks in its {parts} parts of up to {texts}"
            f" texts, {MOST_READ} at most"
        )


class _Vocabulary:
    """Ids that the tokenizer of a model gives: of texts, of start, end and padding."""

    def __init__(self, model: LatentDiffusion) -> None:
        tokenizer = model.tokenizer
        if not isinstance(tokenizer, FileTokenizer):
            raise ValueError(
                "the model's text encoder has no start and end tokens: prompts in webui's syntax,"
                " or in chunks, need the tokenizer of CLIP or BERT"
            )
        self.length = tokenizer.max_length
        self.start, self.end, self.pad = tokenizer.encode([""])[0, :3].tolist()
        named = tokenizer.names
        first = tokenizer.vocab_size - sum(named.values())
        comma = tokenizer.ids(",")[-1]
        self.ids = chunks.Ids(tokenizer.ids, comma, first)
        bare = {name.strip("<>").casefold(): name for name in named}
        words = "|".join(map(re.escape, sorted(bare, key=len, reverse=True)))
        self._bare, self._word = bare, re.compile(rf"(?<![\w<])(?:{words})(?![\w>])", re.IGNORECASE)

    def bracketed(self, text: str) -> str:
        """The text with learned words by their names in the model: cat as <cat>."""
        if not self._bare:
            return text
        return self._word.sub(lambda match: self._bare[match.group().casefold()], text)

    def row(self, ids: Sequence[int]) -> list[int]:
        """Ids of a chunk between start and end."""
        rest = self.length - 2 - len(ids)
        return [self.start, *ids, self.end, *[self.pad] * rest]


def _read(
    prompt: str,
    vocabulary: _Vocabulary,
    over: tuple[int, int],
    syntax: Syntax,
    mode: Emphasis,
    joins: bool,
) -> list[_Prompt]:
    """The prompts that AND joins; a negative prompt knows no AND. over: steps, and those before."""
    steps = over[0]
    if len(prompt) > LONGEST:
        raise ValueError(
            f"prompt {prompt[:24]!r}... has {len(prompt)} characters, {LONGEST} at most"
        )
    if syntax == "plain":
        return [_Prompt(1.0, [_chunks([(prompt, 1.0)], vocabulary)], [1], [0] * steps)]
    prompt = vocabulary.bracketed(COMMENT.sub("", prompt))
    found = []
    for text, weight in schedules.parts(prompt) if joins else [(prompt, 1.0)]:
        entries = schedules.schedule(text, *over)
        different = list(dict.fromkeys(each for _, each in entries))
        # a step, counted from 0, reads the first entry whose last step is not before it
        at, read = 0, []
        for step in range(steps):
            at += step > entries[at][0]
            read.append(different.index(entries[at][1]))
        counts = [sum(each == one for _, each in entries) for one in different]
        pieces = [[(one, 1.0)] if mode == "none" else emphasis.parse(one) for one in different]
        found.append(_Prompt(weight, [_chunks(p, vocabulary) for p in pieces], counts, read))
    return found


def _chunks(pieces: Sequence[emphasis.Piece], vocabulary: _Vocabulary) -> list[chunks.Chunk]:
    made = chunks.split(pieces, vocabulary.ids, vocabulary.length - 2)
    if len(made) > MOST_CHUNKS:
        raise ValueError(
            f"prompt {pieces[0][0][:24]!r}... has {len(made)} chunks of {vocabulary.length - 2}"
            f" tokens, {MOST_CHUNKS} at most"
        )
    return made


def _arrays(
    rows: list[list[_Prompt]], vocabulary: _Vocabulary, steps: int, longest: int, mode: Emphasis
) -> dict[str, np.ndarray]:
    """See `conditioning.composed`: prompts, texts and chunks that a row lacks are filled up."""
    most = max(len(row) for row in rows)
    texts = max(len(prompt.texts) for row in rows for prompt in row)
    texts = 1 << (texts - 1).bit_length()  # few programs for many schedules
    lead = (len(rows), most, texts)
    empty = vocabulary.row([])
    made = {
        "tokens": np.tile(np.asarray(empty, np.int32), (*lead, longest, 1)),
        "token_weights": np.ones((*lead, longest, vocabulary.length), np.float32),
        "text_counts": np.zeros(lead, np.float32),
        "chunk_counts": np.ones(lead, np.int32),
        "steps": np.zeros((*lead[:2], steps), np.int32),
        "weights": np.zeros(lead[:2], np.float32),
        "keep_mean": np.full(len(rows), mode == "original", np.float32),
    }
    made["text_counts"][..., 0] = 1.0
    for b, row in enumerate(rows):
        for p, prompt in enumerate(row):
            made["weights"][b, p] = prompt.weight
            made["steps"][b, p] = prompt.steps
            for v, text in enumerate(prompt.texts):
                made["text_counts"][b, p, v] = prompt.counts[v]
                made["chunk_counts"][b, p, v] = len(text)
                for n, chunk in enumerate(text):
                    made["tokens"][b, p, v, n] = vocabulary.row(chunk.ids)
                    if mode != "ignore":
                        made["token_weights"][b, p, v, n, 1 : 1 + len(chunk.ids)] = chunk.weights
    return made
