"""Sources of records, and the preparation of training images."""

from dataclasses import dataclass, field
from typing import Literal

from ldm_jax.schema.mark import OptionalPath, Path, execution


@dataclass(frozen=True)
class TFDSConfig:
    """A TensorFlow Datasets builder, read without TensorFlow from array_record files."""

    name: str = "sklearn_digits"
    """Builder name, with config and version if wanted (`name/config:1.0.0`)."""
    data_dir: OptionalPath = execution(None)
    """Folder of the prepared data; default: ~/tensorflow_datasets (or TFDS_DATA_DIR)."""
    split: str = "train"
    """Split that trains."""
    eval_split: str = "test"
    """Split held out for the reported losses and reconstructions."""
    image_key: str = "image"
    """Feature that holds the image."""
    label_key: str | None = "label"
    """Feature that holds the class id; None if there is none."""
    caption_key: str | None = None
    """Text feature with the caption."""
    segmentation_key: str | None = None
    """Image feature whose pixel values are class ids."""


@dataclass(frozen=True)
class FolderConfig:
    """Images in a folder, found recursively, in sorted order."""

    path: Path = ""
    """The folder. Its images train."""
    eval_path: OptionalPath = None
    """Folder of held-out images; default: every `eval_every`-th image of `path`."""
    eval_every: int = 20
    """Without eval_path, image number i is held out when i % eval_every == 0; 0 holds none out:
    what is held-out elsewhere are the training images then."""
    class_from_folder: bool = False
    """The name of the image's folder is its class (sorted names give ids)."""
    captions: Literal["none", "sidecar", "metadata"] = "none"
    """`sidecar`: NAME.txt beside NAME.png; `metadata`: metadata.jsonl (`file_name`, `text`)."""
    segmentation_suffix: str | None = None
    """`_seg`: the class map of cat.jpg is cat_seg.png; maps are not counted as images."""
    mask_suffix: str | None = None
    """`_mask`: the inpainting mask of cat.jpg is cat_mask.png (white = masked; on a transparent
    layer, the strokes)."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Coloured shapes drawn from the record's index: for tests and for timing without input."""

    num_images: int = 256
    """Records in the training split; a quarter as many are held out."""
    size: int = 32
    """Side of a drawn image in pixels."""
    num_classes: int = 4
    """Shapes: the label says which one was drawn."""


@dataclass(frozen=True)
class PhotosConfig:
    """Crops of ten photos that come with scikit-learn and scikit-image."""

    crop: int = 64
    """Side of a crop in pixels, at most 128."""
    stride: int = 8
    """Pixels between two training crops; held-out ones lie side by side."""


@dataclass(frozen=True)
class EmojiConfig:
    """Scenes of one or two named icons, with captions, drawn from the record's index."""

    font: Path = execution("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    """Noto Color Emoji; the default is where Debian's fonts-noto-color-emoji puts it."""
    num_images: int = 12_000
    """Scenes in the training split."""
    size: int = 32
    """Side of a scene in pixels; an icon takes half of it."""


SourceConfig = TFDSConfig | FolderConfig | SyntheticConfig | PhotosConfig | EmojiConfig


@dataclass(frozen=True)
class DataConfig:
    """Source of the records, and how a training image is made of one."""

    source: SourceConfig = field(default_factory=SyntheticConfig)
    size: int = 256
    """Side of a training image in pixels."""
    channels: Literal[1, 3] = 3
    """1 reads images as grey."""
    crop: Literal["center", "random", "none"] = "center"
    """The largest centred square; a random square (see crop_range); or the image as it is."""
    crop_range: tuple[float, float] = (0.5, 1.0)
    """Side of a random crop as a share of the short side (the reference's ImageNet: 0.5 to 1)."""
    resize: Literal["area", "bicubic"] = "bicubic"
    """Filter from crop to size: `area` as the reference's ImageNet, `bicubic` as its LSUN."""
    flip: bool = False
    """Mirror half of the training images."""
    allow_upscale: bool = False
    """Accept images smaller than the crop asks for."""
    shuffle: bool = True
    """Reshuffle every epoch."""
    max_bad_records: int = 100
    """Unreadable records after which training stops; each is replaced by the next readable one."""
    threads: int = execution(8)
    """Threads that decode ahead in each process."""
    workers: int = execution(0)
    """Worker processes that decode ahead in each process; 0 uses the threads only."""
    read_ahead: int = execution(4)
    """Batches decoded ahead."""
    keep_mib: int = execution(256)
    """MiB of decoded records that each process keeps of a split: small data are decoded once."""


@dataclass(frozen=True)
class ImageFacts:
    """Facts of a folder of images that a config may follow: `get_config(stage, facts)`."""

    channels: Literal[1, 3] = 3
    """1 if every image that was looked at is grey."""
    num_classes: int = 2
    """Names of the folders that images lie in."""
