"""Pictures enlarged: by resampling, or by a model of super-resolution."""

import tempfile
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from ldm_jax.runtime import images
from ldm_jax.sample import superres
from ldm_jax.sample.web import pictures
from ldm_jax.sample.web.asked import Extra
from ldm_jax.sample.web.catalog import Entry
from ldm_jax.sample.web.engine import Engine
from ldm_jax.sample.web.jobs import Watch

RESIZES = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
LDSR = "LDSR"
# --- enlarging --------------------------------------------------------------------------------


class Enlarger(NamedTuple):
    """What enlarges."""

    engine: Engine
    entry: Entry | None
    """Model of super-resolution, if there is one."""
    dtype: str

    def names(self) -> list[str]:
        """Names of the ways."""
        return ["None", *RESIZES, *([] if self.entry is None else [LDSR])]

    def enlarged(self, asked: Extra, data: bytes, watch: Watch) -> np.ndarray:
        """uint8 [H, W, c]: a picture by the first way, with a share of the second."""
        small, size = pictures.opened(data), wanted(asked, data)
        large = self._by(asked.upscaler_1, small, size, watch)
        share = asked.extras_upscaler_2_visibility
        if share and asked.upscaler_2 != "None":
            other = self._by(asked.upscaler_2, small, size, watch)
            large = Image.blend(large.resize(other.size), other, share)
        return _array(large)

    def super_resolved(self, image: np.ndarray, size: tuple[int, int], watch: Watch) -> np.ndarray:
        """[B, H, W, c] in about [-1, 1], enlarged by the model to cover (width, height)."""
        small = [pictures.of_array(one) for one in images.to_uint8(image)]
        large = [_array(self._super_resolved(one, size, watch)) for one in small]
        return np.stack(large).astype(np.float32) / 127.5 - 1

    def _by(self, name: str, small: Image.Image, size: tuple[int, int], watch: Watch) -> Any:
        if name == "None":
            return small
        if name == LDSR:
            small = self._super_resolved(small, size, watch)
        return small.resize(size, RESIZES.get(name, Image.Resampling.LANCZOS))

    def _super_resolved(self, small: Image.Image, size: tuple[int, int], watch: Watch) -> Any:
        """Enlarged by the model as often as it takes to cover a size."""
        entry = self.entry
        while entry is not None and (small.width < size[0] or small.height < size[1]):
            with tempfile.TemporaryDirectory() as folder:
                path = epath.Path(folder, "small.png")
                path.write_bytes(images.png(_array(small.convert("RGB"))))
                options = superres.Options(
                    model=entry.path, out="", step=entry.step, dtype=self.dtype,
                    images=(str(path),), batch_size=self.engine.split, progress="none",
                )  # fmt: skip
                what = superres.request(options, self.engine.load)
            (drawn,) = self.engine.draw(what, watch)
            small = pictures.of_array(drawn.image[0])
        return small


def wanted(asked: Extra, data: bytes) -> tuple[int, int]:
    """(width, height) of a picture that is enlarged."""
    if asked.resize_mode == 1:
        return asked.upscaling_resize_w, asked.upscaling_resize_h
    width, height = pictures.opened(data).size
    return round(width * asked.upscaling_resize), round(height * asked.upscaling_resize)


def _array(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture)
    return array if array.ndim == 3 else array[..., None]
