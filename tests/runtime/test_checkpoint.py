"""What is saved comes back bit for bit, or an error says what is wrong with it."""

import functools
import gc
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import schema, sharding, train_state
from ldm_jax.runtime import checkpoint, checksums
from ldm_jax.schema import EMAConfig, MeshConfig, OptimizerConfig, serialize

TX, _ = train_state.make_optimizer(OptimizerConfig(clip_norm=1.0, warmup_steps=2))
MIXED = MeshConfig(data=2, fsdp=2)


def init_params(key, width=8):
    normal = functools.partial(jax.random.normal, key)
    conv_in = {"kernel": normal((3, 3, 4, width)), "bias": jnp.ones(width)}
    attention = {"to_q": {"kernel": normal((8, width))}}
    return {
        "unet": {"conv_in": conv_in, "mid_block": {"attentions_0": attention}},
        "cond_stage": {"embedding": {"embedding": normal((11, 8))}},
    }


def init(key, ema=("unet", "cond_stage"), width=8):
    return train_state.create(init_params(key, width), TX, EMAConfig(parts=ema))


def abstract_on(mesh_config, init=init):
    mesh = sharding.make_mesh(mesh_config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return sharding.with_shardings(shapes, sharding.by_rules(shapes, sharding.RULES, mesh))


@functools.cache
def trained(steps, mesh_config=MIXED, init=init):
    """A state after some updates, so that nothing in it is a zero that any restore would give."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_on(mesh_config, init))
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    for _ in range(steps):
        state = update(state)
    return state


@jax.jit
def update(state):
    grads = jax.tree.map(lambda p: jnp.cos(7 * p + state.step), state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = train_state.update_ema(EMAConfig(), state.ema_params, params, state.step)
    return state.replace(step=state.step + 1, params=params, ema_params=ema, opt_state=opt_state)


def tree_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def saved(run, *states, **options):
    manager = checkpoint.manager(run, **options)
    for state in states:
        assert checkpoint.save(manager, state, {"mesh": {"data": 2, "fsdp": 2}})
    manager.close()
    return run


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """A run with one checkpoint of step 3; tests copy it before they damage it."""
    return saved(tmp_path_factory.mktemp("run"), trained(3))


@pytest.fixture
def run(one_run, tmp_path):
    return shutil.copytree(one_run, tmp_path / "moved")


@pytest.mark.parametrize(
    "mesh_config",
    [MeshConfig(data=2, fsdp=2), MeshConfig(data=1, fsdp=4), MeshConfig(fsdp=2, tensor=2)],
)
def test_restore_is_exact_on_any_mesh_and_after_a_move(run, mesh_config):
    abstract = abstract_on(mesh_config)
    fresh = trained(0, mesh_config)
    expected = trained(3)
    with pytest.raises(AssertionError):
        tree_equal(fresh.opt_state, expected.opt_state)
    restored = checkpoint.restore(run, abstract)
    tree_equal(restored, expected)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, abstract
    )
    tree_equal(checkpoint.restore(run, fresh), expected)  # a state of arrays describes one too


def test_each_part_restores_alone_on_the_host(run):
    for part in ("params", "ema_params"):
        kept = run / "checkpoints" / "3" / part
        others = {p.name for p in kept.parent.iterdir() if p.is_dir()} - {part, "meta"}
        assert len(others) == 2
        found = checkpoint.restore_parts(run, None, (part,))
        assert list(found) == [part]
        tree_equal(found[part], getattr(trained(3), part))
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    shutil.rmtree(run / "checkpoints" / "3" / "opt_state")
    checkpoint.restore_parts(run, 3, ("params",))
    with pytest.raises(ValueError, match="checkpoints/3: cannot be read"):
        checkpoint.restore(run, abstract_on(MeshConfig()))


def test_meta_says_where_it_comes_from(run):
    meta = json.loads((run / "checkpoints/3/meta/metadata").read_text())
    assert meta == checkpoint.read_meta(run / "checkpoints/3")
    assert meta["format"] == checkpoint.FORMAT
    assert (meta["step"], meta["bad_steps"]) == (3, 0)
    assert meta["mesh"] == {"data": 2, "fsdp": 2}
    assert set(meta["checksums"]) == {"ema_params", "opt_state", "params"}
    assert meta["versions"]["jax"] == jax.__version__


def test_a_first_stage_without_average_or_discriminator(tmp_path):
    def init_gan(key):
        return train_state.create_gan(init_params(key), TX, EMAConfig(parts=()))

    state = trained(0, init=init_gan)
    norms = {"mean": jnp.asarray([1 / 3, 1e-30]), "count": jnp.asarray([5, 2])}
    skips = {"count": state.skips["count"] + 4, "norms": norms}
    state = state.replace(step=state.step + 7, bad_steps=state.bad_steps + 2, skips=skips)
    saved(tmp_path, state)
    restored = checkpoint.restore(tmp_path, abstract_on(MeshConfig(), init_gan))
    tree_equal(restored, state)
    assert (int(restored.step), int(restored.bad_steps)) == (7, 2)
    assert restored.step.dtype == restored.skips["count"].dtype == jnp.int32
    assert checkpoint.restore_parts(tmp_path, 7, ("params", "ema_params"))["ema_params"] == {}


def test_saving_does_not_see_later_steps_of_a_donated_state(tmp_path):
    expected = trained(1)
    state = jax.tree.map(jnp.copy, expected)
    overwrite = jax.jit(update, donate_argnums=0)
    manager = checkpoint.manager(tmp_path)
    checkpoint.save(manager, state, {})
    for _ in range(4):
        state = overwrite(state)
    manager.close()
    assert not np.array_equal(state.params["cond_stage"]["embedding"]["embedding"],
                              expected.params["cond_stage"]["embedding"]["embedding"])  # fmt: skip
    tree_equal(checkpoint.restore(tmp_path, expected), expected)


def test_oldest_are_removed_and_a_step_is_saved_once(tmp_path):
    assert checkpoint.latest_step(tmp_path / "nothing") is None
    state, manager = trained(1), checkpoint.manager(tmp_path, max_to_keep=2)
    for step in (1, 2, 10):
        state = state.replace(step=jnp.asarray(step, jnp.int32))
        assert checkpoint.save(manager, state, {})
    assert not checkpoint.save(manager, state, {})
    manager.close()
    assert checkpoint.saved_steps(tmp_path) == [2, 10]
    assert checkpoint.latest_step(tmp_path) == 10
    assert int(checkpoint.restore(tmp_path, state, step=2).step) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_checkpoint_holds_what_is_not_finite(run, value):
    state = trained(4)
    moments = optax.tree.get(state.opt_state, "nu")
    moments = jax.tree.map(lambda x: x.at[-1, -1, -1, -1].set(value) if x.ndim == 4 else x, moments)
    manager = checkpoint.manager(run)
    poisoned = state.replace(opt_state=optax.tree.set(state.opt_state, nu=moments))
    message = r"checkpoints/4: not written.* opt_state/.*/nu/unet/conv_in/kernel; go on"
    with pytest.raises(ValueError, match=message):
        checkpoint.save(manager, poisoned, {})
    assert checkpoint.saved_steps(manager) == [3]
    assert checkpoint.save(manager, state, {})
    manager.close()
    assert checkpoint.saved_steps(run) == [3, 4]


# --- damaged and foreign checkpoints ------------------------------------------------------------


def test_no_checkpoint_is_an_error_that_names_the_place(run):
    abstract = abstract_on(MeshConfig())
    with pytest.raises(
        FileNotFoundError, match=r"checkpoints: nothing saved of step 5; it has \[3\]"
    ):
        checkpoint.restore(run, abstract, step=5)
    shutil.rmtree(run / "checkpoints" / "3")
    with pytest.raises(FileNotFoundError, match="checkpoints: nothing saved of any step"):
        checkpoint.restore(run, abstract)


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


# when one read fails Orbax abandons the others, and asyncio tells of each at some later time
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncate", pytest.param("remove", marks=pytest.mark.slow)])
def test_damage_to_any_file_is_found_or_harmless(one_run, run, damage):
    abstract, expected = abstract_on(MeshConfig()), trained(3)
    refused = {}
    for file in files_of(one_run / "checkpoints" / "3"):
        target = run / "checkpoints" / "3" / file
        if damage == "truncate":
            target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
        else:
            target.unlink()
        try:
            restored = checkpoint.restore(run, abstract)
        except ValueError as error:
            refused[file.as_posix()] = str(error)
        else:
            tree_equal(restored, expected)
        shutil.copyfile(one_run / "checkpoints" / "3" / file, target)
    for message in refused.values():
        assert "checkpoints/3: cannot be read" in message
        assert len(message) < 500
    assert "meta/metadata" in refused
    for part in ("params", "ema_params", "opt_state"):
        assert f"{part}/manifest.ocdbt" in refused
        assert any(name.startswith(f"{part}/d/") for name in refused)
    tree_equal(checkpoint.restore(run, abstract), expected)
    gc.collect()


def test_one_flipped_bit_of_a_weight_is_found(tmp_path):
    def noisy(key):
        return init(key, width=512)

    state = trained(1, init=noisy)
    folder = saved(tmp_path, state) / "checkpoints" / "1" / "params"
    largest = max(files_of(folder), key=lambda f: (folder / f).stat().st_size)
    content = (folder / largest).read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    (folder / largest).write_bytes(flipped)
    message = "checkpoints/1: cannot be read .the checksum of params differs"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, state)
    with pytest.raises(ValueError, match=message):
        checkpoint.restore_parts(tmp_path, 1, ("params",))
    assert checkpoint.restore_parts(tmp_path, 1, ("ema_params",))
    (folder / largest).write_bytes(content)
    tree_equal(checkpoint.restore(tmp_path, state), state)


def test_a_renamed_checkpoint_is_refused(run):
    (run / "checkpoints" / "3").rename(run / "checkpoints" / "4")
    with pytest.raises(ValueError, match=r"checkpoints/4: .*its meta is that of step 3"):
        checkpoint.restore(run, abstract_on(MIXED))


def test_an_older_checkpoint_restores_and_a_newer_one_is_refused(run):
    path = run / "checkpoints" / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["skips"], meta["seal"]  # counts of skipped steps
    path.write_text(json.dumps(meta))
    tree_equal(checkpoint.restore(run, abstract_on(MIXED)), trained(3))
    path.write_text(json.dumps(meta | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(ValueError, match="checkpoints/3: format 2 is newer than 1"):
        checkpoint.restore(run, abstract_on(MeshConfig()))


def half(key):
    state = init(key)
    return state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (half, r"saved float32\[.*\], expected bfloat16"),
        (functools.partial(init, width=16),
         r"of another model.*unet/conv_in/bias: saved float32\[8\], expected float32\[16\]"),
        (functools.partial(init, ema=()), r"holds ema_params, opt_state, params, but .* opt_state"),
        (functools.partial(init, ema=("unet",)), r"ema_params: .*\(cond_stage/.* expected not"),
    ],
)  # fmt: skip
def test_another_model_is_refused(run, other, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(run, abstract_on(MeshConfig(), other))


def test_paths_may_be_relative_or_in_a_bucket(tmp_path, monkeypatch):
    assert str(checkpoint.absolute("gs://bucket/run")) == "gs://bucket/run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("run", "~/run", tmp_path / "run"):
        assert checkpoint.absolute(name) == tmp_path / "run"
    saved("run", trained(1))
    assert checkpoint.latest_step("run") == checkpoint.latest_step(tmp_path / "run") == 1


# --- snapshots ----------------------------------------------------------------------------------


def test_snapshots(tmp_path):
    first, second = trained(1), trained(2)
    model = serialize.to_dict(schema.UNetConfig(model_channels=32))
    for state in (first, second):
        checkpoint.save_snapshot(tmp_path, int(state.step), state.ema_params, model)
    assert checkpoint.snapshot_steps(tmp_path) == [1, 2]
    params, meta = checkpoint.load_snapshot(tmp_path)
    tree_equal(params, second.ema_params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert (meta["step"], meta["format"]) == (2, checkpoint.FORMAT)
    assert serialize.from_dict(meta["model"]) == schema.UNetConfig(model_channels=32)
    tree_equal(checkpoint.load_snapshot(tmp_path, 1)[0], first.ema_params)
    checkpoint.save_snapshot(tmp_path, 1, second.params, model)  # stays as it is
    tree_equal(checkpoint.load_snapshot(tmp_path, 1)[0], first.ema_params)
    with pytest.raises(FileNotFoundError, match=r"snapshots: .* step 3; it has \[1, 2\]"):
        checkpoint.load_snapshot(tmp_path, 3)


def test_a_snapshot_that_is_not_finite_is_refused(tmp_path):
    params = {"unet": {"bias": jnp.asarray([1.0, -jnp.inf])}}
    with pytest.raises(ValueError, match=r"snapshots/4: not written.* params/unet/bias"):
        checkpoint.save_snapshot(tmp_path, 4, params, {})
    assert checkpoint.snapshot_steps(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_a_checksum_is_the_same_on_device_and_host(dtype):
    x = jnp.asarray([0, 1, 1, 0, 1], dtype)
    assert checksums.tree_checksum({"a": x}) == checksums.tree_checksum({"a": np.asarray(x)})
    assert checksums.tree_checksum({"a": x}) != checksums.tree_checksum({"a": x[:-1]})
