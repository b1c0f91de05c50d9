"""Records of a TensorFlow Datasets builder, read from array_record files without TensorFlow."""

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from ldm_jax import schema

# builders defined in this package, prepared on first use
OURS = re.compile(r"sklearn_digits(/|:|$)")


class TFDSSource:
    """One split; images stay encoded, as the bytes in the file."""

    def __init__(self, config: schema.TFDSConfig, split: str):
        builder = prepared(config.name, config.data_dir)
        features = builder.info.features
        keys = {
            "image": config.image_key,
            "label": config.label_key,
            "caption": config.caption_key,
            "segmentation": config.segmentation_key,
        }
        self._keys = {name: key for name, key in keys.items() if key is not None}
        for name, key in self._keys.items():
            if key not in features:
                raise ValueError(
                    f"{config.name} has no feature {key!r} (it has {', '.join(sorted(features))}): "
                    f"set {name}_key" + ("" if name == "image" else ", to None if there is none")
                )
        text = config.caption_key and features[config.caption_key]
        if text is not None and not isinstance(text, tfds.features.Text):
            raise ValueError(
                f"{config.name}: feature {config.caption_key!r} is no text"
                f" ({type(text).__name__}): set caption_key"
            )
        self.features = frozenset(self._keys)
        self.num_classes = self.classes = None
        if config.label_key is not None:
            self.num_classes = getattr(features[config.label_key], "num_classes", None)
            if self.num_classes is None:
                raise ValueError(
                    f"{config.name}: feature {config.label_key!r} holds no class: set label_key"
                )
            self.classes = tuple(features[config.label_key].names)
        still_encoded = {
            key: tfds.decode.SkipDecoding()
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        with quiet():
            try:
                self._records = builder.as_data_source(split=split, decoders=still_encoded)
            except (NotImplementedError, ValueError) as error:  # file format; unknown split
                raise ValueError(_one_line(config.name, split, builder, error)) from error
        self._name = f"{builder.info.full_name} {split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        record = {name: record[key] for name, key in self._keys.items()}
        if "caption" in record:
            text = record["caption"]  # or a sequence of several
            record["caption"] = text.decode() if isinstance(text, bytes) else _decoded(text)
        if "label" in record:
            record["label"] = int(record["label"])
        return record

    def describe(self, index: int) -> str:
        """`name/config/version split record 17`, for messages."""
        return f"{self._name} record {index}"


def _decoded(texts: Any) -> list[str]:
    return [text.decode() for text in texts]


def prepared(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The builder `name[/config][:version]` with its files on disk.

    Builders of this package write theirs on first use, in about a second; FileNotFoundError tells
    how to prepare any other.
    """
    if OURS.match(name):
        from ldm_jax.data import digits  # noqa: F401  importing it registers the builder
    with quiet():
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except tfds.core.DatasetNotFoundError as error:
            raise FileNotFoundError(
                f"TFDS knows no dataset {name!r} and {data_dir or 'its data folder'} holds none: "
                "check source.name and source.data_dir"
            ) from error
        if builder.is_prepared():
            return builder
        if not OURS.match(name):
            raise FileNotFoundError(
                f"{name} is not prepared in {builder.data_path}: set source.data_dir, or run once "
                f"(needs tensorflow): tfds build {name} --file_format=array_record"
                + (f" --data_dir={data_dir}" if data_dir else "")
            )
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the builder prints its progress
                builder.download_and_prepare()
        except OSError:
            # Another process may have finished first: its folder is as good, and ours cannot
            # replace it.
            if not tfds.builder(name, data_dir=data_dir).is_prepared():
                raise
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS's progress bars and remarks on folders that are not there yet off the screen."""
    log = logging.getLogger("absl")
    level = log.level
    tfds.disable_progress_bar()
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _one_line(name: str, split: str, builder: tfds.core.DatasetBuilder, error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return (
            f"{builder.data_path} holds {builder.info.file_format.value} files, which cannot be "
            f"read by index: prepare {name} with --file_format=array_record"
        )
    known = ", ".join(sorted(builder.info.splits))
    return f"{name} has no split {split!r} (it has {known}): set split and eval_split"
