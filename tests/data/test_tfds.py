"""TFDS builders read without TensorFlow."""

import io
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm_jax import schema
from ldm_jax.data import sources, transforms
from ldm_jax.data.tfds import TFDSSource, prepared, quiet

pytest.importorskip("sklearn", reason="the digits come from scikit-learn, in the extra [demo]")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    prepared("sklearn_digits", path)
    return path


def open_digits(data_dir, split="train", **fields):
    return TFDSSource(schema.TFDSConfig(data_dir=data_dir, **fields), split)


def test_digits(data_dir):
    from sklearn.datasets import load_digits

    from ldm_jax.data import digits

    everything = load_digits()
    for split, ids, length in zip(
        ("train", "test"), digits.split_of(everything.target), (1437, 360)
    ):
        source = open_digits(data_dir, split)
        assert len(source) == length
        assert source.num_classes == 10
        assert source.features == {"image", "label"}
        counts = np.bincount([source[i]["label"] for i in range(length)])
        np.testing.assert_array_equal(counts, np.bincount(everything.target[ids]))
    record = source[5]
    assert isinstance(record["image"], bytes)
    assert transforms.decode_image(record["image"], 1).size == (16, 16)
    assert source.describe(5) == "sklearn_digits/16/1.0.0 test record 5"


def test_images_and_labels_belong_together(data_dir):
    from sklearn.datasets import load_digits

    everything = load_digits()
    images, labels = sources.arrays(open_digits(data_dir, "test"), channels=1)
    assert images.shape == (360, 16, 16, 1)
    assert images.dtype == np.uint8
    small = images.reshape(360, 8, 2, 8, 2).mean((2, 4)).reshape(360, 64) / 255 * 16
    distance = ((small[:, None] - everything.data[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(everything.target[distance.argmin(1)], labels)
    assert distance.min(1).max() < distance.mean() / 10


def test_size_is_the_builders_config(data_dir):
    assert pickle.loads(pickle.dumps(open_digits(data_dir)))[17] == open_digits(data_dir)[17]
    source = open_digits(data_dir, "test", name="sklearn_digits/32:1.0.0")
    assert transforms.decode_image(source[0]["image"], 1).size == (32, 32)


def test_part_of_a_split(data_dir):
    first, rest = open_digits(data_dir, "train[:100]"), open_digits(data_dir, "train[100:]")
    assert (len(first), len(rest)) == (100, 1337)
    assert rest[0] == open_digits(data_dir, "train")[100]


def test_open_source_takes_the_split_of_the_config(data_dir):
    config = schema.DataConfig(source=schema.TFDSConfig(data_dir=data_dir, eval_split="test[:7]"))
    assert len(sources.open_source(config, "train")) == 1437
    assert len(sources.open_source(config, "eval")) == 7


def test_unlabelled(data_dir):
    source = open_digits(data_dir, label_key=None)
    assert source.num_classes is None
    assert set(source[0]) == {"image"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_key": "img"}, r"no feature 'img' \(it has id, image, label\): set image_key$"),
        ({"caption_key": "text"}, r"no feature 'text' .*: set caption_key, to None if there is"),
        ({"label_key": "id"}, r"feature 'id' holds no class: set label_key"),
        ({"caption_key": "image"}, r"feature 'image' is no text \(Image\): set caption_key"),
    ],
)
def test_wrong_feature(data_dir, fields, message):
    with pytest.raises(ValueError, match=message):
        open_digits(data_dir, **fields)


def test_captions_are_text(tmp_path):
    import tensorflow_datasets as tfds

    texts = ["a red disc", "größer als 5"]

    class Captioned(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 4, 3)), "text": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(texts):
                png = io.BytesIO()
                Image.new("RGB", (4, 4)).save(png, "png")
                png.seek(0)
                yield i, {"image": png, "text": text}

    with quiet():
        Captioned(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = open_digits(str(tmp_path), name="captioned", label_key=None, caption_key="text")
    assert sorted(source[i]["caption"] for i in range(2)) == texts


def test_wrong_split(data_dir):
    with pytest.raises(ValueError, match=r"no split 'dev' \(it has test, train\): set split"):
        open_digits(data_dir, "dev")


def test_dataset_that_is_not_prepared_or_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not prepared in .*: tfds build cifar"):
        open_digits(str(tmp_path), name="cifar10")
    with pytest.raises(FileNotFoundError, match=r"knows no dataset 'nonesuch' and .* holds none"):
        open_digits(str(tmp_path), name="nonesuch")


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-jax\[demo\]'"):
        prepared("sklearn_digits", str(tmp_path))


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    prepare = tfds.core.DatasetBuilder.download_and_prepare

    def beaten(builder):
        prepare(builder)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", beaten)
    assert len(open_digits(str(tmp_path))) == 1437


def test_failure_to_write_is_raised(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def full(builder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", full)
    with pytest.raises(OSError, match="No space left"):
        open_digits(str(tmp_path))


def test_says_nothing_and_imports_no_tensorflow(tmp_path):
    code = (
        "import sys; from ldm_jax import schema; from ldm_jax.data import open_source, stream;"
        f"c = schema.DataConfig(source=schema.TFDSConfig(data_dir={str(tmp_path)!r}), size=16);"
        "stream(c, batch_size=4, seed=0)[3]; assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_log_is_as_loud_as_before(data_dir, caplog):
    with caplog.at_level(logging.INFO, "absl"):
        open_digits(data_dir)
        assert logging.getLogger("absl").level == logging.INFO
