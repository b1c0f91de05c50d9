"""The endless stream of training examples: example i is a function of (seed, i) alone.

Epochs reshuffle, every example has its own random generator, and a record that cannot be used is
replaced by the next one that can: nothing depends on the examples read before, on the process, or
on how far it reads ahead.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np

from ldm_jax import schema, seeds
from ldm_jax.data import cache, tokens, transforms
from ldm_jax.data.record_cache import RecordCache
from ldm_jax.data.sources import Captioned, Source, open_source
from ldm_jax.runtime import processes, storage
from ldm_jax.runtime.log import LOG

Example = dict[str, np.ndarray]
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]


class BadDataError(ValueError, RuntimeError):
    """Too many records that cannot be used: another start would end in the same way."""


class Made(NamedTuple):
    """An example, its record, (index, reason) of records before it that cannot be used, and the
    end of its caption that the text encoder has no room for."""

    example: Example
    bad: tuple[tuple[int, str], ...]
    record: int
    lost: str = ""


class Stream:
    """Training examples by index, without end. Made by `stream`; stays in the main process.

    batch_size   examples in a global batch
    source       the records
    spec         {name: (shape, dtype)} of the arrays of an example
    made         Grain dataset of `Made`, for reading ahead; its elements go through `accept`
    """

    def __init__(
        self,
        source: Source,
        config: schema.DataConfig,
        batch_size: int,
        seed: int,
        train: bool,
        tokenizer: Any = None,
        num_ids: int | None = None,
    ):
        self.source, self.config, self.batch_size = source, config, batch_size
        # encoded once, before threads start: a fast tokenizer's first call sets its padding
        null = None if tokenizer is None else tokenizer.encode([""])[0]
        self.spec = _spec(source, config, null)
        # Two seeds, hashed: Grain shuffles epoch e with seed + e, so runs with neighbouring seeds
        # would otherwise share their orders.
        shuffle_seed, example_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
        records = grain.MapDataset.range(len(source))
        if train and config.shuffle:
            records = records.shuffle(seed=shuffle_seed)  # `repeat` reshuffles in every epoch
        make = MakeExample(source, config, train, tokenizer, null, num_ids)
        self.made = records.repeat().random_map(make, seed=example_seed)
        self._bad: set[int] = set()
        self._agreed: set[int] = set()
        self._cut: set[int] = set()
        self._lock = threading.Lock()

    @property
    def num_records(self) -> int:
        """Records in an epoch."""
        return len(self.source)

    @property
    def bad_records(self) -> int:
        """Records that cannot be used, each counted once, since the process started.

        With several processes those known to all at the last `agree`: the same number on each.
        """
        return len(self._bad if jax.process_count() == 1 else self._agreed)

    def agree(self) -> None:
        """Exchange the records that each process could not decode; all processes call this.

        BadDataError, in every process, if together they are more than `max_bad_records`.
        """
        with self._lock:
            mine = set(self._bad)
        self._agreed = processes.union(mine)
        if self._agreed:
            name = name_of(self.source, max(self._agreed))
            check_limit(len(self._agreed), name, self.config)

    def __getitem__(self, index: int) -> Example:
        """Example `index` >= 0, decoded now.

        BadDataError after more than `max_bad_records` bad records; ValueError for an image
        that is too small, a map of another size, a label out of range. All name the record.
        """
        return self.accept(self.made[index])

    def caption(self, index: int) -> str:
        """The caption, or the first of several, of the record behind example `index`."""
        return caption_of(self.source[self.made[index].record], None)

    def accept(self, made: Made) -> Example:
        """The example; bad records met on the way are reported and counted, once each.

        Counted here, in the main process, so that threads and worker processes count alike.
        """
        for index, reason in made.bad:
            with self._lock:
                known = index in self._bad
                self._bad.add(index)
            if not known:
                name = name_of(self.source, index)
                LOG.warning("%s cannot be used; the next one replaces it (%s)", name, reason)
                check_limit(len(self._bad), f"{name} ({reason})", self.config)
        if made.lost:
            self._say_lost(made)
        return made.example

    def _say_lost(self, made: Made) -> None:
        """Warns of the first caption that the text encoder cuts, and of the 10th, the 100th, ..."""
        with self._lock:
            before = len(self._cut)
            self._cut.add(made.record)
            count = len(self._cut)
        if count > before and count in (10**n for n in range(10)):
            name = self.source.describe(made.record)
            LOG.warning(
                "%s: the caption is longer than the text encoder's tokens; left out: %r%s",
                *(name, made.lost, f" ({count} captions so far)" if count > 1 else ""),
            )


def stream(
    config: schema.DataConfig,
    *,
    batch_size: int,
    seed: int,
    split: Literal["train", "eval"] = "train",
    tokenizer: Any = None,
    cached: str = "",
    num_ids: int | None = None,
    captions: Sequence[str] = (),
) -> Stream:
    """The examples of a split: "train" shuffled and augmented, "eval" in order and centre-cropped.

    With a `tokenizer` (`tokens.load_tokenizer`) captions become `tokens` int32 [L], and every
    example has `null_tokens` int32 [L], those of the empty text. With `cached`, the path of a
    latent cache of the same data, examples have `mean` and `logvar` [h, w, z] instead of `image`;
    order, mirroring and all else stay. `num_ids` is the number of classes of segmentation maps: a
    pixel of another is a ValueError. `captions` take the place of the records' own: each example
    draws one. Errors as from `sources.open_source`; ValueError also for a
    value out of range, for a tokenizer without captions, and for a cache of other data.
    """
    check(config, batch_size, seed)
    if cached:
        cache.check(cached, config)
    source = cache.CacheSource(cached, split) if cached else open_source(config, split)
    source = Captioned(source, captions) if captions else source
    if tokenizer is not None and "caption" not in source.features:
        raise ValueError(
            "text conditioning needs captions, but the data have none: set"
            " data.source.captions of a folder, or data.source.caption_key of a TFDS dataset"
        )
    return Stream(source, config, batch_size, seed, split == "train", tokenizer, num_ids)


def check(config: schema.DataConfig, batch_size: int, seed: int) -> None:
    """ValueError for a number that is out of range."""
    seeds.checked(seed)
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("data.size", config.size, 1),
        ("data.threads", config.threads, 0),
        ("data.workers", config.workers, 0),
        ("data.read_ahead", config.read_ahead, 1),
        ("data.max_bad_records", config.max_bad_records, 0),
        ("data.keep_mib", config.keep_mib, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}")
    low, high = config.crop_range
    if not 0 < low <= high <= 1:
        raise ValueError(f"data.crop_range is {low} {high}, but 0 < low <= high <= 1 is needed")


class Decoded(NamedTuple):
    """A record before any random augmentation.

    Its images as from `transforms.settle` (None for a record of a latent cache), its other fields,
    its number, and `Made.bad`.
    """

    images: transforms.Images | None
    rest: dict[str, Any]
    record: int
    bad: tuple[tuple[int, str], ...] = ()

    def size(self) -> int:
        """Bytes in memory."""
        arrays = sum(a.nbytes for a in self.rest.values() if isinstance(a, np.ndarray))
        return arrays + (0 if self.images is None else transforms.size_in_memory(self.images))


class MakeExample:
    """Record -> example; pickled into worker processes, which keep a part of `keep_mib` each."""

    def __init__(
        self,
        source: Source,
        config: schema.DataConfig,
        train: bool,
        tokenizer: Any = None,
        null_tokens: np.ndarray | None = None,
        num_ids: int | None = None,
    ):
        self.source, self.config, self.train = source, config, train
        self.tokenizer, self.null_tokens, self.num_ids = tokenizer, null_tokens, num_ids
        self.kept = RecordCache(config.keep_mib * 2**20 // max(1, config.workers))

    def __call__(self, index: int, rng: np.random.Generator) -> Made:
        """`rng` augments, if this trains."""
        rng = rng if self.train else None
        decoded = self.kept.get(index)
        if decoded is None:
            decoded = self._decode(index)
            if not decoded.bad:
                self.kept.put(index, decoded, decoded.size())
        with self._naming(decoded.record):
            if decoded.images is None:
                example = cache.to_example(decoded.rest, self.config.flip, rng)
            else:
                example = transforms.to_example(decoded.images, self.config, rng)
            if self.source.num_classes is not None:
                example["label"] = _label(decoded.rest["label"], self.source.num_classes)
            if self.num_ids is not None:
                check_ids(example["segmentation"], self.num_ids)
            lost = ""
            if self.tokenizer is not None:
                text = caption_of(decoded.rest, rng)
                example["tokens"], lost = _tokens(self.tokenizer, text)
                example["null_tokens"] = self.null_tokens
        return Made(example, decoded.bad, decoded.record, lost)

    def _decode(self, index: int) -> Decoded:
        """Record `index`, or the next one in the source's order that can be used."""
        if "mean" in self.source.features:
            return Decoded(None, read(self.source, index), index)
        bad: list[tuple[int, str]] = []
        while True:
            try:
                images, rest = self.usable(index)
            except ValueError as error:
                bad.append((index, str(error)))
                said = f"{name_of(self.source, index)} ({error})"
                check_limit(len(bad), said, self.config)
                if len(bad) == len(self.source):
                    raise BadDataError(f"not one record can be used; the last: {said}") from error
                index = (index + 1) % len(self.source)
            else:
                return Decoded(images, rest, index, tuple(bad))

    def usable(self, index: int) -> tuple[transforms.Images, dict[str, Any]]:
        """(images as `transforms.settle` leaves them, all else) of record `index`.

        ValueError for whatever is wrong with the record: `transforms.UndecodableError` and
        `TooSmallError` are kinds of it. OSError if it cannot be read.
        """
        record = read(self.source, index)
        images = transforms.decode(record, self.config.channels)
        images = transforms.settle(images, self.config, self.train)
        if self.source.num_classes is not None:
            _label(record["label"], self.source.num_classes)
        if self.tokenizer is not None:
            caption_of(record, None)
        return images, {name: value for name, value in record.items() if name not in images}

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Put the record's name before the message of an error."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{name_of(self.source, index)}: {error}") from error


def caption_of(record: dict[str, Any], rng: np.random.Generator | None) -> str:
    """The caption of a record; one of several is drawn by `rng`, or the first without it."""
    texts = record["caption"]
    if isinstance(texts, str):
        return texts
    if not texts:
        raise ValueError("has no caption")
    return texts[0 if rng is None else int(rng.integers(len(texts)))]


def name_of(source: Source, index: int) -> str:
    """Path or name of a record, for messages, where the record may be damaged."""
    try:
        return source.describe(index)
    except ValueError:
        return f"record {index}"


def read(source: Source, index: int) -> dict[str, Any]:
    """Record `index`, with retries after transient errors of the storage."""
    return storage.retried(lambda: source.describe(index), lambda: source[index])


def _label(label: int, num_classes: int) -> np.ndarray:
    if not 0 <= label < num_classes:
        raise ValueError(
            f"label {label} is not in 0..{num_classes - 1}: does the split have labels?"
        )
    return np.int32(label)


def _tokens(tokenizer: Any, caption: str) -> tuple[np.ndarray, str]:
    """(tokens, the end of the caption that is cut off); other tokenizers than ours do not tell."""
    if isinstance(tokenizer, tokens.Tokenizer):
        return tokenizer.cut(caption)
    return tokenizer.encode([caption])[0], ""


def check_ids(segmentation: np.ndarray, num_ids: int) -> None:
    """ValueError for a pixel of another class than 0..num_ids - 1."""
    odd = segmentation[(segmentation < 0) | (segmentation >= num_ids)]
    if odd.size:
        raise ValueError(
            f"the segmentation holds class {odd[0]}, but cond.num_classes is {num_ids}: its classes"
            f" are 0..{num_ids - 1}; set it to more, or give such pixels another class"
        )


def _spec(source: Source, config: schema.DataConfig, null_tokens: np.ndarray | None) -> Spec:
    side = (config.size, config.size)
    latent = getattr(source, "latent_shape", None)  # of a cache
    spec = {
        "image": ((*side, config.channels), np.dtype(np.float32)),
        **{name: (latent, np.dtype(np.float32)) for name in cache.MOMENTS},
        "label": ((), np.dtype(np.int32)),
        "segmentation": (side, np.dtype(np.int32)),
        "mask": ((*side, 1), np.dtype(np.float32)),
    }
    spec = {name: value for name, value in spec.items() if name in source.features}
    if null_tokens is not None:
        for name in ("tokens", "null_tokens"):
            spec[name] = (null_tokens.shape, null_tokens.dtype)
    return spec


def check_limit(count: int, name: str, config: schema.DataConfig) -> None:
    """BadDataError if `count` bad records are too many; `name` is the last of them."""
    if count > config.max_bad_records:
        limit = config.max_bad_records
        more = f", or raise data.max_bad_records ({limit})" if limit else ""
        raise BadDataError(
            f"{count} records cannot be used, the last: {name}; repair or remove them{more}"
            " (`ldm-train check` lists them all)"
        )
