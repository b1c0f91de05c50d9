"""Embeddings of a folder's images, the index kept of them, and the exact nearest of it."""

import os

import clip_model
import numpy as np
import pytest
import reference
import task_models

from ldm_jax import neighbours, schema, sharding
from ldm_jax.convert import clip_folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return clip_folder.load(clip_model.save(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def photos(tmp_path):
    """Five images, one of them below, and one that is broken."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "c.png", "more/d.png", "more/e.png")):
        values = np.random.default_rng(i).integers(0, 256, (12 + i, 16, 3))
        task_models.write_png(folder / name, values)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def exact(queries, embeddings, k):
    """In float64, by sorting everything."""
    a, b = (x.astype(np.float64) for x in (queries, embeddings))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    cosines = np.round(a @ b.T, 12)  # a product's last bit depends on the place of its row
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize("block", [2**16, 7, 3])
def test_nearest_is_exact(monkeypatch, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    queries, embeddings = reference.draw(3, 8), 10 * reference.draw(23, 8, seed=2)
    embeddings[20] = 2 * embeddings[5]  # as near: the first stands first
    for k in (1, 4, 23):
        found, cosines = neighbours.nearest(queries, embeddings, k)
        order, expected = exact(queries, embeddings, k)
        np.testing.assert_allclose(cosines, expected, atol=1e-6)
        np.testing.assert_array_equal(found, order)
    for k in (0, 24):
        with pytest.raises(ValueError, match=f"{k} neighbours of 23 images: give 1..23"):
            neighbours.nearest(queries, embeddings, k)


def test_batches_give_what_one_image_gives(towers, photos):
    paths = [photos / "a.png", photos / "broken.jpg", photos / "b.png", photos / "c.png"]
    found, broken = neighbours.embed_images(towers, paths, batch_size=3)
    assert [i for i, _ in broken] == [1]
    assert not found[1].any()
    for i in (0, 2, 3):
        alone, _ = neighbours.embed_images(towers, paths[i : i + 1])
        np.testing.assert_allclose(found[i], alone[0], atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.01

    mesh = sharding.make_mesh(schema.MeshConfig())
    split, _ = neighbours.embed_images(towers, paths, batch_size=3, mesh=mesh)
    np.testing.assert_allclose(split, found, atol=1e-5)


def test_an_index_is_built_once(towers, photos, capsys, shown, monkeypatch):
    path = photos.parent / "kept" / "index.npz"
    made = neighbours.open_index(str(photos), path, towers)
    assert made.files.tolist() == ["a.png", "b.png", "c.png", "more/d.png", "more/e.png"]
    assert made.embeddings.shape == (5, 32)
    assert "broken.jpg: is not an image, or a broken one" in capsys.readouterr().err
    expected, _ = neighbours.embed_images(towers, [photos / "more" / "d.png"])
    np.testing.assert_allclose(made.embeddings[3], expected[0], atol=1e-5)

    monkeypatch.setattr(neighbours, "embed_images", None)
    again = neighbours.open_index(str(photos), path, towers)
    np.testing.assert_array_equal(again.embeddings, made.embeddings)
    np.testing.assert_array_equal(again.files, made.files)
    assert not list(path.parent.glob("*.part"))


def test_a_stale_index_is_refused(towers, photos, tmp_path):
    path = tmp_path / "index.npz"
    neighbours.open_index(str(photos), path, towers)
    other = clip_folder.load(clip_model.save(tmp_path / "clip", seed=1))
    message = r"index\.npz: was built from other CLIP model than"
    with pytest.raises(ValueError, match=message):
        neighbours.open_index(str(photos), path, other)

    os.utime(photos / "a.png", (0, 0))
    message = r"index\.npz: was built from other images than .*photos now has; rebuild it"
    with pytest.raises(ValueError, match=message):
        neighbours.open_index(str(photos), path, towers)
    neighbours.open_index(str(photos), path, towers, rebuild=True)
    (photos / "c.png").unlink()
    with pytest.raises(ValueError, match="other images"):
        neighbours.open_index(str(photos), path, towers)
    assert len(neighbours.open_index(str(photos), path, towers, rebuild=True).files) == 4


def test_what_is_no_index(towers, photos, tmp_path):
    path = tmp_path / "index.npz"
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"index\.npz: is no index of images"):
        neighbours.open_index(str(photos), path, towers)
    np.savez(path, files=np.zeros(1))
    with pytest.raises(ValueError, match=r"index\.npz: is no index of images"):
        neighbours.open_index(str(photos), path, towers)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image in .*empty"):
        neighbours.open_index(str(tmp_path / "empty"), path, towers)
