"""scikit-learn's handwritten digits as a TensorFlow Datasets builder: the data of the demo.

1797 grey digits of 8x8 pixels with 17 levels (UCI Optical Recognition of Handwritten Digits),
enlarged to 16x16 or 32x32. They ship inside scikit-learn, so nothing is downloaded.
"""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZES = (16, 32)
HELD_OUT = 5  # one digit in five


def split_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test) of a random split at a fixed seed, stratified by `labels` [N].

    Test is every fifth of the digits sorted by class and shuffled within it: a fifth of each class,
    to within one.
    """
    order = np.lexsort((np.random.default_rng(0).random(len(labels)), labels))
    test = np.zeros(len(labels), bool)
    test[order[::HELD_OUT]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def enlarge(digit: np.ndarray, size: int) -> Image.Image:
    """A [8, 8] digit with values 0..16 as a grey image of size x size pixels."""
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return grey.resize((size, size), Image.Resampling.BICUBIC)


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """Builder `sklearn_digits`, with one config per image size: "16" (the default) and "32"."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=str(size), description=f"{size}x{size} pixels")
        for size in SIZES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = int(self.builder_config.name)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://archive.ics.uci.edu/dataset/80",
            supervised_keys=("image", "label"),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "id": tfds.features.Scalar(np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "preparing sklearn_digits needs scikit-learn: pip install 'ldm-jax[demo]'"
            ) from error
        digits, labels = load_digits(return_X_y=True)
        digits = digits.reshape(-1, 8, 8)
        train, test = split_of(labels)
        return {
            "train": self._generate_examples(digits, labels, train),
            "test": self._generate_examples(digits, labels, test),
        }

    def _generate_examples(
        self, digits: np.ndarray, labels: np.ndarray, ids: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for i in ids.tolist():
            png = io.BytesIO()
            enlarge(digits[i], int(self.builder_config.name)).save(png, "png")
            png.seek(0)
            yield i, {"image": png, "label": int(labels[i]), "id": i}
