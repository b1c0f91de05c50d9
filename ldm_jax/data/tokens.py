"""Text into token ids, as text encoders take them: CLIP's and BERT's tokenizers, or plain bytes."""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_jax.runtime import reading

CONFIG = "tokenizer_config.json"
# Files of both tokenizers, as transformers writes them; a folder is complete with one of SETS.
FILES = (
    CONFIG,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
SETS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
BYTES = "ByteTokenizer"  # our own entry for `tokenizer_class`
Name = tuple[str, int]
"""A word that is added to a tokenizer, and the number of its ids."""
ADDED = "ldm_jax_added"  # and for the ids of added names, where they are not the next ones


class FileTokenizer:
    """CLIP's or BERT's tokenizer with fixed length; `load_tokenizer` makes it.

    Holds the files' contents: it can be pickled, and outlives the folder.
    """

    def __init__(self, files: dict[str, bytes], max_length: int):
        self._files = files
        self.max_length = max_length
        tokenizer = _transformers(files)
        # (first id of added names in the files, how much higher it is in the text encoder's table)
        self._moved = tuple(_json(files, CONFIG).get(ADDED, (len(tokenizer), 0)))
        self.vocab_size = len(tokenizer) + self._moved[1]
        self._names = _Names(_names_of(tokenizer))
        # used directly: transformers' own call changes the padding, which is not thread-safe
        self._backend = tokenizer.backend_tokenizer
        self._backend.enable_truncation(max_length)
        self._backend.enable_padding(
            length=max_length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
        )

    def __reduce__(self):
        return FileTokenizer, (self._files, self.max_length)

    def encode(self, texts: list[str]) -> np.ndarray:
        """int32 [N, max_length]: with start and end tokens, cut off or padded."""
        ids = [self._backend.encode(self._names.spelled(text)).ids for text in texts]
        return self._in_table(ids).reshape(len(texts), self.max_length)

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone, however long: without start, end and padding."""
        encoding = self._backend.encode(self._names.spelled(text), add_special_tokens=False)
        every = (encoding, *encoding.overflowing)
        ids = [i for part in every for i, real in zip(part.ids, part.attention_mask) if real]
        return self._in_table(ids).tolist()

    def _in_table(self, ids: list) -> np.ndarray:
        first, distance = self._moved
        ids = np.asarray(ids, np.int32)
        return np.where(ids < first, ids, ids + np.int32(distance))

    def lost(self, text: str) -> str:
        """The end of `text` that `encode` cuts off, from its first incomplete word; "" if none."""
        return self.cut(text)[1]

    def cut(self, text: str) -> tuple[np.ndarray, str]:
        """(the ids that `encode` gives, the end of `text` that is `lost`)."""
        spelled = self._names.spelled(text)
        encoding = self._backend.encode(spelled)
        lost = _overflow(spelled, encoding) if encoding.overflowing else ""
        return self._in_table(encoding.ids), self._names.shortened(lost)

    @property
    def names(self) -> dict[str, int]:
        """{name: number of its ids} of the words that were added; they have the last ids."""
        return self._names.counts

    def check_names(self, names: Iterable[Name]) -> None:
        """ValueError for a name that the tokenizer has, or that is given twice."""
        _refuse_known(names, self._backend.get_vocab())

    def with_names(self, names: Sequence[Name], first_id: int) -> "FileTokenizer":
        """A tokenizer that also has `names`, whose ids follow each other from `first_id` on.

        In its files they are the tokens NAME, NAME_1, ..., as diffusers has them. ValueError as of
        `check_names`.
        """
        import transformers

        self.check_names(names)
        tokenizer = _transformers(self._files)
        tokens = [token for name in names for token in _tokens_of(name)]
        tokenizer.add_tokens([transformers.AddedToken(t, single_word=True) for t in tokens])
        (first, *_) = ids = tokenizer.convert_tokens_to_ids(tokens)
        if ids != list(range(first, first + len(ids))) or len(tokenizer) != first + len(ids):
            raise ValueError(f"the tokenizer does not give {tokens} the next {len(ids)} ids")
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = _read(epath.Path(folder))
        moved = min(first, self._moved[0]), first_id - first
        if moved[1]:
            files[CONFIG] = json.dumps(_json(files, CONFIG) | {ADDED: moved}, indent=2).encode()
        return FileTokenizer(files, self.max_length)

    def save(self, folder: epath.PathLike) -> None:
        """Writes the tokenizer's files to `folder`, for transformers and `load_tokenizer`."""
        _write(self._files, folder)


def _overflow(text: str, encoding: Any) -> str:
    """The end of `text` from the first word that is not whole in `encoding`."""
    rest = encoding.overflowing[0]
    first = rest.special_tokens_mask.index(0)
    word, offsets = rest.word_ids[first], rest.offsets[first]
    kept = zip(encoding.word_ids, encoding.offsets)
    start, _ = next((o for w, o in kept if w == word), offsets)
    return text[start:]


class ByteTokenizer:
    """UTF-8 bytes, which need no files: byte b is id b + 1, and id 0 pads.

    added: {name: its ids}, of names that stand for ids of their own.
    """

    def __init__(self, max_length: int, added: dict[str, list[int]] | None = None):
        self.max_length = max_length
        self._added = added or {}
        self._names = _Names({name: len(ids) for name, ids in self._added.items()})
        self.vocab_size = 1 + max([256, *(i for ids in self._added.values() for i in ids)])

    def encode(self, texts: list[str]) -> np.ndarray:
        """int32 [N, max_length]: cut off or padded with 0."""
        ids = np.zeros((len(texts), self.max_length), np.int32)
        for row, text in zip(ids, texts):
            codes = self.ids(text)[: self.max_length]
            row[: len(codes)] = codes
        return ids

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone, without padding."""
        return [i for _, codes in self._pieces(text) for i in codes]

    def _pieces(self, text: str) -> Iterator[tuple[int, list[int]]]:
        """(start in the text, ids) of each added name, and of what stands between them."""
        start = 0
        for begin, end, name in self._names.found(text):
            yield start, [byte + 1 for byte in text[start:begin].encode()]
            yield begin, self._added[name]
            start = end
        yield start, [byte + 1 for byte in text[start:].encode()]

    def lost(self, text: str) -> str:
        """The end of `text` that `encode` cuts off; "" if none."""
        room = self.max_length
        for start, ids in self._pieces(text):
            if len(ids) > room:
                named = ids[0] > 256
                fits = bytes(i - 1 for i in ids[:room]) if not named else b""
                return text[start + len(fits.decode(errors="ignore")) :]
            room -= len(ids)
        return ""

    def cut(self, text: str) -> tuple[np.ndarray, str]:
        """(the ids that `encode` gives, the end of `text` that is `lost`)."""
        return self.encode([text])[0], self.lost(text)

    def check_names(self, names: Iterable[Name]) -> None:
        """ValueError for a name that the tokenizer has, or that is given twice."""
        _refuse_known(names, self._added)

    def with_names(self, names: Sequence[Name], first_id: int) -> "ByteTokenizer":
        """A tokenizer that also has `names`, whose ids follow each other from `first_id` on.

        ValueError as of `check_names`.
        """
        self.check_names(names)
        added = dict(self._added)
        for name, count in names:
            added[name] = list(range(first_id, first_id + count))
            first_id += count
        return ByteTokenizer(self.max_length, added)

    def save(self, folder: epath.PathLike) -> None:
        """Write to `folder` the files from which `load_tokenizer` makes the same tokenizer."""
        added = {ADDED: self._added} if self._added else {}
        _write({CONFIG: json.dumps({"tokenizer_class": BYTES, **added}).encode()}, folder)


Tokenizer = FileTokenizer | ByteTokenizer


def load_tokenizer(
    path: epath.PathLike, max_length: int, *, pad_id: int | None = None
) -> Tokenizer:
    """Tokenizer to `max_length` ids for each text: that of the folder `path`, or of bytes.

    path: a folder with files of CLIPTokenizer or BertTokenizer as transformers writes them (the
        `tokenizer/` of a diffusers model) or as `save` does; "bytes" for UTF-8 bytes.
    pad_id: the id that pads, where the files do not have that of training: OpenCLIP's
        models, and so Stable Diffusion 2, were trained with 0. `save` writes it.
    FileNotFoundError if there is no tokenizer; ValueError for one of another kind or a wrong file.
    """
    if max_length < 3:
        raise ValueError(f"max_length {max_length} leaves no room for text: at least 3")
    if str(path) == "bytes":
        return ByteTokenizer(max_length)
    files = _read(epath.Path(path))
    try:
        config = _json(files, CONFIG)
        if config.get("tokenizer_class") == BYTES:
            return ByteTokenizer(max_length, config.get(ADDED))
        if pad_id is not None:
            files = _padded_with(files, pad_id)
        return FileTokenizer(files, max_length)
    except (
        Exception
    ) as error:  # transformers and tokenizers raise errors of many classes for a bad file
        raise ValueError(f"tokenizer in {path}: {error}") from error


def _read(folder: epath.Path) -> dict[str, bytes]:
    files = {name: reading.read_bytes(folder / name) for name in FILES if (folder / name).is_file()}
    bytes_only = BYTES.encode() in files.get(CONFIG, b"")
    if not bytes_only and not any(files.keys() >= set(names) for names in SETS):
        raise FileNotFoundError(
            f"no tokenizer in {folder}: it needs {', or '.join(' and '.join(s) for s in SETS)}."
            " Give the folder `tokenizer` of a diffusers model, or bytes"
        )
    return files


def _write(files: dict[str, bytes], folder: epath.PathLike) -> None:
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _transformers(files: dict[str, bytes]):
    """The tokenizer of `transformers`; its import takes seconds, so only where it is needed."""
    # transformers would print at every start that torch is missing
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    kind = getattr(transformers, _kind(files))
    with tempfile.TemporaryDirectory() as folder:
        _write(files, folder)
        return kind.from_pretrained(folder, local_files_only=True)


def _kind(files: dict[str, bytes]) -> str:
    """CLIPTokenizer or BertTokenizer; ValueError for anything else."""
    named = _json(files, CONFIG).get("tokenizer_class", "").removesuffix("Fast")
    if named in ("CLIPTokenizer", "BertTokenizer"):
        return named
    if named not in ("", "PreTrainedTokenizer", "TokenizersBackend"):
        raise ValueError(f"{named} is not supported, CLIPTokenizer and BertTokenizer are")
    if "tokenizer.json" not in files:
        return "BertTokenizer" if "vocab.txt" in files else "CLIPTokenizer"
    model = _json(files, "tokenizer.json").get("model", {}).get("type")
    if model not in ("BPE", "WordPiece"):
        raise ValueError(f"a {model} model is not supported, BPE (CLIP) and WordPiece (BERT) are")
    return "CLIPTokenizer" if model == "BPE" else "BertTokenizer"


def _padded_with(files: dict[str, bytes], pad_id: int) -> dict[str, bytes]:
    """The files, changed so that the token with id `pad_id` pads."""
    token = _transformers(files).convert_ids_to_tokens(pad_id)
    if token is None:
        raise ValueError(f"there is no token with id {pad_id} to pad with")
    files = {CONFIG: b"{}", **files}
    for name in (CONFIG, "special_tokens_map.json"):
        if name in files:
            files[name] = json.dumps(_json(files, name) | {"pad_token": token}, indent=2).encode()
    return files


def _json(files: dict[str, bytes], name: str) -> dict:
    values = reading.parse_json(files.get(name, b"{}"), name)
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds no object of names and values")
    return values


# --- names that stand for learned vectors --------------------------------------------------------


class _Names:
    """Names that stand for several tokens each: NAME, NAME_1, NAME_2, ... as in diffusers.

    They are found as whole words, in capitals or small letters. counts: {name: number of tokens}.
    """

    def __init__(self, counts: dict[str, int]):
        self.counts, self._spelling = counts, {name.casefold(): name for name in counts}
        longest_first = sorted(map(re.escape, counts), key=len, reverse=True)
        self._word = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)

    def found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, name) of each name in a text."""
        for match in self._word.finditer(text) if self.counts else ():
            yield *match.span(), self._spelling[match.group().casefold()]

    def spelled(self, text: str) -> str:
        """The text with every token of each name."""
        parts, start = [], 0
        for begin, end, name in self.found(text):
            parts += [text[start:begin], " ".join(_tokens_of((name, self.counts[name])))]
            start = end
        return "".join([*parts, text[start:]])

    def shortened(self, text: str) -> str:
        """Inverse of `spelled`, also of a text that begins within a name."""
        for name in self.counts:
            word = re.escape(name)
            text = re.sub(rf"{word}(_\d+)?( {word}_\d+)*", lambda _, name=name: name, text)
        return text


def _names_of(tokenizer: Any) -> dict[str, int]:
    """{name: number of its tokens} of the words that were added to a tokenizer of transformers."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if not t.special}
    counts = {}
    for name in added:
        if re.sub(r"_\d+$", "", name) not in added - {name}:
            more = (i for i in itertools.count(1) if f"{name}_{i}" not in added)
            counts[name] = next(more)
    return counts


def _tokens_of(name: Name) -> list[str]:
    text, count = name
    return [text, *(f"{text}_{i}" for i in range(1, count))]


def _refuse_known(names: Iterable[Name], vocabulary: Iterable[str]) -> None:
    """ValueError for a name of which a token is in the vocabulary, or in another name."""
    known = {token.casefold() for token in vocabulary}
    for name in names:
        tokens = {token.casefold() for token in _tokens_of(name)}
        if tokens & known:
            raise ValueError(f"{name[0]} is a token of the model already: give it another name")
        known |= tokens
