"""Decoding, cropping, resizing, flipping and scaling of one record."""

import io

import numpy as np
import pytest
from PIL import Image

from ldm_jax import schema
from ldm_jax.data import transforms

RNG = np.random.default_rng(0)


def encoded(image, file_format="png", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def config(**fields):
    return schema.DataConfig(**{"size": 8, **fields})


class TestDecodeImage:
    def test_rgb_and_grey_are_as_stored(self):
        pixels = noise(4, 5)
        np.testing.assert_array_equal(
            transforms.decode_image(encoded(Image.fromarray(pixels)), 3), pixels
        )
        grey = pixels[..., 0]
        data = encoded(Image.fromarray(grey))
        np.testing.assert_array_equal(transforms.decode_image(data, 1), grey)
        np.testing.assert_array_equal(
            transforms.decode_image(data, 3), np.repeat(grey[..., None], 3, -1)
        )

    def test_arrays_pass_with_and_without_a_channel_axis(self):
        pixels = noise(4, 5, 1)
        np.testing.assert_array_equal(transforms.decode_image(pixels, 1), pixels[..., 0])
        assert transforms.decode_image(noise(4, 5), 1).mode == "L"

    def test_transparent_pixels_are_white(self):
        pixels = np.zeros((1, 3, 4), np.uint8)
        pixels[0, :, 3] = 0, 128, 255
        rgb = np.asarray(transforms.decode_image(encoded(Image.fromarray(pixels)), 3))
        assert rgb[0, :, 0].tolist() == [255, 127, 0]

    def test_transparent_palette_entry_is_white(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        rgb = np.asarray(transforms.decode_image(encoded(image, transparency=0), 3))
        assert rgb[0].tolist() == [[255, 255, 255], [40, 50, 60]]

    def test_16_bit_grey_keeps_its_brightness(self):
        image = Image.fromarray(np.array([[0, 257 * 200, 65535]], np.uint16))
        assert np.asarray(transforms.decode_image(encoded(image), 1)).tolist() == [[0, 200, 255]]

    def test_cmyk_becomes_rgb(self):
        data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg")
        rgb = np.asarray(transforms.decode_image(data, 3))[4, 4]
        assert rgb[0] > 200
        assert rgb[1:].max() < 50

    def test_exif_orientation_is_applied(self):
        pixels = noise(2, 4)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        data = encoded(Image.fromarray(pixels), exif=exif)
        np.testing.assert_array_equal(transforms.decode_image(data, 3), np.rot90(pixels, -1))

    @pytest.mark.parametrize("file_format", ["png", "jpeg", "webp", "bmp", "tiff"])
    def test_truncated_file_is_undecodable(self, file_format):
        data = encoded(Image.fromarray(noise(64, 64)), file_format)
        transforms.decode_image(data, 3)
        with pytest.raises(transforms.UndecodableError):
            transforms.decode_image(data[: len(data) // 2], 3)

    @pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
    def test_anything_else_is_undecodable(self, data):
        with pytest.raises(transforms.UndecodableError):
            transforms.decode_image(data, 3)

    def test_lack_of_memory_is_not_a_bad_image(self, monkeypatch):
        def out_of_memory(file, **options):
            raise MemoryError

        monkeypatch.setattr(Image, "open", out_of_memory)
        with pytest.raises(MemoryError):
            transforms.decode_image(b"", 3)


class TestDecodeMaps:
    def test_ids_are_grey_values_or_palette_indices(self):
        ids = np.array([[0, 7], [255, 2]], np.uint8)
        grey, palette = Image.fromarray(ids), Image.fromarray(ids)
        palette.putpalette(list(range(255, -1, -1)) * 3)
        wide = Image.fromarray(ids.astype(np.uint16) + 300)
        np.testing.assert_array_equal(transforms.decode_ids(encoded(grey)), ids)
        np.testing.assert_array_equal(transforms.decode_ids(encoded(palette)), ids)
        np.testing.assert_array_equal(transforms.decode_ids(encoded(wide)), ids.astype(int) + 300)
        np.testing.assert_array_equal(transforms.decode_ids(ids), ids)

    def test_a_colour_picture_is_no_segmentation_map(self):
        with pytest.raises(ValueError, match="one channel, this one is RGB"):
            transforms.decode_ids(encoded(Image.fromarray(noise(2, 2))))

    def test_bright_is_hole(self):
        image = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
        assert np.asarray(transforms.decode_mask(encoded(image))).tolist() == [[0, 0, 255, 255]]
        assert np.asarray(transforms.decode_mask(np.array([[0, 1]]))).tolist() == [[0, 255]]

    @pytest.mark.parametrize("colour", [0, 255, 90])
    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_strokes_on_a_transparent_layer_are_the_hole(self, mode, colour):
        """Whatever colour the transparent pixels hide."""
        for hidden in (0, 255):
            pixels = np.full((1, 3, 4), hidden, np.uint8)
            pixels[..., 3] = 0
            pixels[0, 1] = colour, colour, colour, 255
            data = encoded(Image.fromarray(pixels).convert(mode))
            assert np.asarray(transforms.decode_mask(data)).tolist() == [[0, 255, 0]]

    def test_a_stroke_fades_at_half_of_its_alpha(self):
        pixels = np.zeros((1, 4, 4), np.uint8)
        pixels[..., 3] = 0, 127, 128, 255
        data = encoded(Image.fromarray(pixels))
        assert np.asarray(transforms.decode_mask(data)).tolist() == [[0, 0, 255, 255]]

    @pytest.mark.parametrize("alpha", [128, 255])
    def test_bright_is_hole_where_nothing_is_transparent(self, alpha):
        pixels = np.full((1, 2, 4), alpha, np.uint8)
        pixels[0, :, :3] = [[0], [255]]
        data = encoded(Image.fromarray(pixels))
        assert np.asarray(transforms.decode_mask(data)).tolist() == [[0, 255]]

    def test_a_mask_that_can_be_read_in_two_ways_is_refused(self):
        pixels = np.full((1, 3, 4), 255, np.uint8)  # white, black, and erased, as of a photo
        pixels[0, 1, :3], pixels[0, 2, 3] = 0, 0
        with pytest.raises(ValueError, match="transparent pixels and both bright and dark ones"):
            transforms.decode_mask(encoded(Image.fromarray(pixels)))
        with pytest.raises(ValueError, match="holds 0 and 1, which are both black"):
            transforms.decode_mask(encoded(Image.fromarray(np.array([[0, 1]], np.uint8))))

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            ([[0.0, 0.5, 1.0]], "floats"),
            ([[0.0, np.nan, 255.0]], "floats"),
            ([[0, 2**30, 2**31 - 1]], "whole numbers"),
            ([[-5, 0, 255]], "whole numbers"),
        ],
    )
    def test_pixels_of_32_bits_have_no_black_and_white(self, values, kind):
        image = Image.fromarray(np.array(values, np.float32 if kind == "floats" else np.int32))
        for decode in (lambda d: transforms.decode_image(d, 3), transforms.decode_mask):
            with pytest.raises(ValueError, match=f"holds {kind} of 32 bits"):
                decode(encoded(image, "tiff"))
        if kind == "floats":
            with pytest.raises(ValueError, match="whole numbers, this one floats"):
                transforms.decode_ids(encoded(image, "tiff"))
        else:
            ids = transforms.decode_ids(encoded(image, "tiff"))
            np.testing.assert_array_equal(ids, np.array(values))

    def test_16_bits_of_a_netpbm_file_keep_their_brightness(self):
        data = b"P5 2 1 65535\n" + np.array([257 * 200, 65535], ">u2").tobytes()
        assert np.asarray(transforms.decode_image(data, 1)).tolist() == [[200, 255]]


class TestCropBox:
    def test_centre_is_the_largest_square(self):
        assert transforms.crop_box(20, 11, config(), None) == (4, 0, 15, 11)
        assert transforms.crop_box(11, 20, config(), np.random.default_rng(0)) == (0, 4, 11, 15)

    def test_random_crops_fill_the_range_and_the_image(self):
        crop = config(crop="random", crop_range=(0.5, 1.0))
        rng = np.random.default_rng(0)
        boxes = np.array([transforms.crop_box(40, 24, crop, rng) for _ in range(3000)])
        left, top, right, bottom = boxes.T
        side = right - left
        np.testing.assert_array_equal(side, bottom - top)
        assert set(side) == set(range(12, 24))
        assert (left.min(), right.max()) == (0, 40)
        assert (top.min(), bottom.max()) == (0, 24)
        chi_square = ((np.bincount(side)[12:] - 250) ** 2 / 250).sum()
        assert chi_square < 30  # 11 degrees of freedom: p = 0.002

    def test_random_without_a_generator_is_the_centre(self):
        assert transforms.crop_box(20, 10, config(crop="random"), None) == (5, 0, 15, 10)

    def test_image_smaller_than_the_crop_asks_for(self):
        with pytest.raises(ValueError, match=r"20x7 .* 7 pixels a side, less than size 8.*upscale"):
            transforms.crop_box(20, 7, config(), None)
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match=r"20x15 .* 7 pixels"):
            transforms.crop_box(20, 15, config(crop="random"), rng)
        transforms.crop_box(20, 15, config(crop="random"), None)
        assert transforms.crop_box(20, 7, config(allow_upscale=True), None) == (6, 0, 13, 7)

    def test_no_crop_asks_for_a_square(self):
        assert transforms.crop_box(9, 9, config(crop="none"), None) == (0, 0, 9, 9)
        with pytest.raises(ValueError, match="20x9, not square: set crop"):
            transforms.crop_box(20, 9, config(crop="none"), None)


def row_of(images, config, rng):
    settled = transforms.settle(images, config, train=rng is not None)
    return transforms.to_example(settled, config, rng)


class TestToRow:
    def images(self, pixels, **maps):
        return {"image": Image.fromarray(pixels)} | {k: Image.fromarray(v) for k, v in maps.items()}

    def test_scale(self):
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        row = row_of(self.images(pixels), config(size=16, channels=1), None)
        expected = (np.arange(256) / 127.5 - 1).reshape(16, 16, 1)
        np.testing.assert_allclose(row["image"], expected, atol=1e-7)
        assert row["image"].dtype == np.float32
        assert (row["image"].min(), row["image"].max()) == (-1, 1)

    def test_area_is_the_mean_of_each_cell(self):
        pixels = noise(32, 32)
        row = row_of(self.images(pixels), config(resize="area"), None)
        means = pixels.reshape(8, 4, 8, 4, 3).mean((1, 3))
        np.testing.assert_allclose((row["image"] + 1) * 127.5, means, atol=0.501)

    def test_area_counts_the_part_of_a_pixel_inside_a_cell(self):
        pixels = noise(12, 12, 1)[..., 0]
        area = np.asarray(transforms.resize_area(Image.fromarray(pixels), 8))  # factor 1.5
        fine = np.repeat(np.repeat(pixels, 2, 0), 2, 1)
        means = fine.reshape(8, 3, 8, 3).mean((1, 3))
        np.testing.assert_allclose(area, means, atol=0.501)

    def test_bicubic_sees_only_the_crop(self):
        pixels = noise(32, 48)
        row = row_of(self.images(pixels), config(), None)
        square = Image.fromarray(pixels[:, 8:40]).resize((8, 8), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(row["image"], np.asarray(square) / 127.5 - 1, atol=1e-6)

    def test_maps_are_cropped_and_flipped_with_the_image(self):
        pixels = noise(20, 24)
        images = self.images(pixels, segmentation=pixels[..., 0].astype(np.int32))
        images["mask"] = Image.fromarray((pixels[..., 0] >= 128).astype(np.uint8) * 255)
        cut = config(size=10, crop="random", crop_range=(0.5, 0.5), flip=True)
        for seed in range(20):
            row = row_of(images, cut, np.random.default_rng(seed))
            red = np.round((row["image"][..., 0] + 1) * 127.5)
            np.testing.assert_array_equal(row["segmentation"], red)
            np.testing.assert_array_equal(row["mask"][..., 0], red >= 128)
        assert row["segmentation"].dtype == np.int32
        assert row["mask"].dtype == np.float32
        assert row["mask"].shape == (10, 10, 1)

    def test_maps_are_resized_without_new_values(self):
        ids = RNG.choice([3, 90], (32, 32)).astype(np.int32)
        images = self.images(noise(32, 32), segmentation=ids)
        row = row_of(images, config(), None)
        np.testing.assert_array_equal(row["segmentation"], ids[2::4, 2::4])

    def test_half_of_the_rows_are_mirrored(self):
        pixels = noise(8, 8)
        plain = row_of(self.images(pixels), config(flip=True), None)["image"]
        mirrored = 0
        for seed in range(400):
            row = row_of(self.images(pixels), config(flip=True), np.random.default_rng(seed))
            if not np.array_equal(row["image"], plain):
                np.testing.assert_array_equal(row["image"], plain[:, ::-1])
                mirrored += 1
        assert 160 < mirrored < 240

    def test_map_of_another_size(self):
        images = self.images(noise(16, 16), segmentation=np.zeros((16, 12), np.int32))
        with pytest.raises(ValueError, match="segmentation is 12x16 but the image is 16x16"):
            row_of(images, config(), None)
