"""Text into token ids, as text encoders take them: CLIP's and BERT's tokenizers, or plain bytes."""

import json
import os
import tempfile
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


class FileTokenizer:
    """CLIP's or BERT's tokenizer with fixed length; `load_tokenizer` makes it.

    Holds the files' contents: it can be pickled, and outlives the folder.
    """

    def __init__(self, files: dict[str, bytes], max_length: int):
        self._files = files
        self.max_length = max_length
        tokenizer = _transformers(files)
        self.vocab_size = len(tokenizer)
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
        ids = [self._backend.encode(text).ids for text in texts]
        return np.asarray(ids, np.int32).reshape(len(texts), self.max_length)

    def lost(self, text: str) -> str:
        """The end of `text` that `encode` cuts off, from its first incomplete word; "" if none."""
        return self.cut(text)[1]

    def cut(self, text: str) -> tuple[np.ndarray, str]:
        """(the ids that `encode` gives, the end of `text` that is `lost`)."""
        encoding = self._backend.encode(text)
        ids = np.asarray(encoding.ids, np.int32)
        return ids, _overflow(text, encoding) if encoding.overflowing else ""

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
    """UTF-8 bytes, which need no files: byte b is id b + 1, and id 0 pads."""

    vocab_size = 257

    def __init__(self, max_length: int):
        self.max_length = max_length

    def encode(self, texts: list[str]) -> np.ndarray:
        """int32 [N, max_length]: cut off or padded with 0."""
        ids = np.zeros((len(texts), self.max_length), np.int32)
        for row, text in zip(ids, texts):
            codes = np.frombuffer(text.encode()[: self.max_length], np.uint8)
            row[: len(codes)] = codes.astype(np.int32) + 1
        return ids

    def lost(self, text: str) -> str:
        """The end of `text` that `encode` cuts off; "" if none."""
        whole = text.encode()[: self.max_length].decode(errors="ignore")
        return text[len(whole) :]

    def cut(self, text: str) -> tuple[np.ndarray, str]:
        """(the ids that `encode` gives, the end of `text` that is `lost`)."""
        return self.encode([text])[0], self.lost(text)

    def save(self, folder: epath.PathLike) -> None:
        """Write to `folder` the files from which `load_tokenizer` makes the same tokenizer."""
        _write({CONFIG: json.dumps({"tokenizer_class": BYTES}).encode()}, folder)


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
        if _json(files, CONFIG).get("tokenizer_class") == BYTES:
            return ByteTokenizer(max_length)
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
