"""A run directory: opened, refused, moved; its plain files."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from ldm_jax import schema, seeds, sharding
from ldm_jax.runtime import rundir
from ldm_jax.schema import serialize

CONFIG = schema.LatentDiffusionTrainConfig()
PARAMS = {
    "encoder": {"kernel": np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)},
    "decoder": {"bias": np.arange(5, dtype=np.float32)},
}


def test_a_new_run_is_made_and_found_again(tmp_path):
    workdir = tmp_path / "deep" / "run"
    assert not rundir.is_run(workdir)
    workdir.mkdir(parents=True)
    (workdir / ".hidden").touch()  # else empty
    run, changed = rundir.open_run(str(workdir), CONFIG)
    assert changed == []
    assert rundir.is_run(workdir)
    assert rundir.read_config(run) == CONFIG
    assert sorted(p.name for p in workdir.iterdir()) == [".hidden", "config.json"]
    assert rundir.open_run(workdir, CONFIG) == (run, [])


def test_execution_fields_may_change_and_are_told(tmp_path):
    rundir.open_run(tmp_path, CONFIG)
    longer = dataclasses.replace(CONFIG, steps=7, mesh=schema.MeshConfig(fsdp=2))
    _, changed = rundir.open_run(tmp_path, longer)
    assert sorted(changed) == ["mesh.fsdp: 1 -> 2", "steps: 100000 -> 7"]
    assert rundir.read_config(tmp_path) == longer


def test_identity_fields_may_not_change(tmp_path):
    rundir.open_run(tmp_path, CONFIG)
    other = dataclasses.replace(CONFIG, batch_size=8, seed=1, steps=7)
    with pytest.raises(ValueError, match=r"batch_size: 64 -> 8; seed: 23 -> 1\. Use") as error:
        rundir.open_run(tmp_path, other)
    assert str(tmp_path) in str(error.value)
    assert "steps" not in str(error.value)
    assert rundir.read_config(tmp_path) == CONFIG  # untouched
    with pytest.raises(ValueError, match="LatentDiffusionTrainConfig"):
        rundir.open_run(tmp_path, schema.AutoencoderTrainConfig())


@pytest.mark.parametrize("seed", [5, 2**32 - 1, 2**32 + 5, 2**63 + 5, 2**64 - 1])
def test_all_bits_of_the_seed_of_a_new_run_count(tmp_path, seed):
    config = dataclasses.replace(CONFIG, seed=seed)
    for _ in range(3):  # before the run is there, at its start, at a resume
        assert (rundir.root_key(tmp_path, config) == seeds.root_key(seed)).all()
        rundir.open_run(tmp_path, config)
    assert ("seed_bits" in (tmp_path / "config.json").read_text()) == (seed >= 2**32)
    assert rundir.read_config(tmp_path) == config


def test_an_old_run_keeps_the_key_of_32_bits(tmp_path):
    config = dataclasses.replace(CONFIG, seed=2**32 + 5)
    (tmp_path / "config.json").write_text(serialize.to_json(config))  # as it was written
    for _ in range(3):
        assert (rundir.root_key(tmp_path, config) == jax.random.key(5)).all()
        rundir.open_run(tmp_path, config)


def test_a_seed_out_of_range_is_refused(tmp_path):
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed {seed} is not in 0\.\.2\*\*64 - 1"):
            rundir.root_key(tmp_path, dataclasses.replace(CONFIG, seed=seed))


def test_a_directory_with_something_else_is_not_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a run"):
        rundir.open_run(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        rundir.open_run(tmp_path / "thesis.tex", CONFIG)


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "UNet2DConditionModel"}'])
def test_a_foreign_config_json_is_no_run(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert not rundir.is_run(tmp_path)
    with pytest.raises(ValueError):
        rundir.open_run(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == text


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run: cannot be written .*another --workdir") as error:
        rundir.open_run(tmp_path / "file" / "run", CONFIG)
    assert "\n" not in str(error.value)


def test_meta_tells_configs_and_meshes_apart():
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=2))
    meta = rundir.meta(CONFIG, mesh)
    assert meta["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert json.loads(json.dumps(meta)) == meta
    assert rundir.meta(CONFIG, mesh) == meta
    other = dataclasses.replace(CONFIG, seed=1)
    assert rundir.meta(other, mesh)["config"] != meta["config"]


# --- latents and frozen parts -------------------------------------------------------------------


def test_latents_keep_every_bit_of_the_scale(tmp_path):
    assert rundir.read_latents(tmp_path) is None
    values = {"scale": 1 / math.pi, "how": "1 / std of 3 images"}
    rundir.write_latents(tmp_path, values)
    assert rundir.read_latents(tmp_path) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "scale": 1.0}', "latents.json: format 2 is newer than 1"),
        ('{"format": 1, "scale": 0}', "latents.json: scale 0 is not a finite number other than 0"),
        ('{"format": 1, "scale": NaN}', "latents.json: scale nan is not a finite number"),
        ('{"format": 1, "scale": -Infinity}', "latents.json: scale -inf is not a finite number"),
        ('{"format": 1, "scale": "1"}', "latents.json: scale '1' is not a finite number"),
        ('{"format": 1}', "latents.json: damaged .KeyError: 'scale'"),
        ('{"format": 1, "sca', "latents.json: is not JSON"),
        ("[1]", "latents.json: holds a list"),
        ('{"format": "1", "scale": 1}', "latents.json: format '1' is no number"),
    ],
)
def test_damaged_latents_are_refused(tmp_path, text, message):
    (tmp_path / "latents.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        rundir.read_latents(tmp_path)


def test_frozen_parts_survive_a_move(tmp_path):
    run = tmp_path / "run"
    assert rundir.read_frozen(run, "first_stage") is None
    config = schema.AutoencoderKLConfig(channels=32)
    rundir.write_frozen(run, "first_stage", PARAMS, config)
    shutil.move(run, tmp_path / "moved")
    params, kept = rundir.read_frozen(tmp_path / "moved", "first_stage")
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert kept == config
    assert rundir.read_frozen(tmp_path / "moved", "text_encoder") is None


def test_frozen_parts_are_written_once(tmp_path):
    config = schema.AutoencoderKLConfig(channels=32)
    rundir.write_frozen(tmp_path, "first_stage", PARAMS, config)
    rundir.write_frozen(tmp_path, "first_stage", PARAMS, config)
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    with pytest.raises(ValueError, match="frozen/first_stage: holds other weights"):
        rundir.write_frozen(tmp_path, "first_stage", other, config)
    jax.tree.map(
        np.testing.assert_array_equal, rundir.read_frozen(tmp_path, "first_stage")[0], PARAMS
    )


def test_a_kill_while_frozen_parts_are_written_leaves_none(tmp_path):
    rundir.write_frozen(tmp_path, "first_stage", PARAMS, None)
    folder = tmp_path / "frozen" / "first_stage"
    folder.rename(folder.with_name("first_stage.orbax-checkpoint-tmp"))
    assert rundir.read_frozen(tmp_path, "first_stage") is None
    rundir.write_frozen(tmp_path, "first_stage", PARAMS, None)
    jax.tree.map(
        np.testing.assert_array_equal, rundir.read_frozen(tmp_path, "first_stage")[0], PARAMS
    )


def test_damaged_frozen_weights_are_found(tmp_path):
    rundir.write_frozen(tmp_path, "first_stage", PARAMS, None)
    meta = tmp_path / "frozen" / "first_stage" / "meta" / "metadata"
    values = json.loads(meta.read_text())
    values |= {"checksums": {"params": 0}}
    meta.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"frozen/first_stage: .*the checksum of meta differs"):
        rundir.read_frozen(tmp_path, "first_stage")
    del values["seal"]  # as older versions wrote it
    meta.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"frozen/first_stage: .*the checksum of params differs"):
        rundir.read_frozen(tmp_path, "first_stage")


def test_hash_depends_on_names_values_and_types_not_on_order():
    base = rundir.params_hash(PARAMS)
    assert rundir.params_hash(dict(reversed(PARAMS.items()))) == base
    changed = [
        {**PARAMS, "decoder": {"bias": PARAMS["decoder"]["bias"].astype(np.float64)}},
        {**PARAMS, "decoder": {"scale": PARAMS["decoder"]["bias"]}},
        {**PARAMS, "decoder": {"bias": PARAMS["decoder"]["bias"][::-1]}},
        {**PARAMS, "decoder": {"bias": PARAMS["decoder"]["bias"].reshape(5, 1)}},
    ]
    assert len({base, *map(rundir.params_hash, changed)}) == 5


# --- metrics ------------------------------------------------------------------------------------


def test_metrics_are_numbered_parts(tmp_path):
    assert rundir.read_metrics(tmp_path) == []
    rundir.write_metrics(tmp_path, [])
    rundir.write_metrics(tmp_path, [{"step": 5, "loss": 0.5}, {"step": 10, "loss": math.nan}])
    rundir.write_metrics(tmp_path, [{"step": 1_000_010, "loss": 0.125, "note": "late"}])
    rundir.write_metrics(tmp_path, [{"step": 15, "loss": 0.25}])
    names = sorted(p.name for p in (tmp_path / "metrics").iterdir())
    assert names == ["000005.jsonl", "000015.jsonl", "1000010.jsonl"]
    assert rundir.read_metrics(tmp_path) == [
        {"step": 5, "loss": 0.5},
        {"step": 10, "loss": None},
        {"step": 15, "loss": 0.25},
        {"step": 1_000_010, "loss": 0.125, "note": "late"},
    ]


def test_resuming_drops_later_metrics(tmp_path):
    rundir.write_metrics(tmp_path, [{"step": s} for s in (5, 10)])
    rundir.write_metrics(tmp_path, [{"step": s} for s in (20, 15, 25)])  # a late line of step 15
    rundir.write_metrics(tmp_path, [{"step": s} for s in (30, 35)])
    rundir.drop_metrics_after(tmp_path, 15)
    assert [r["step"] for r in rundir.read_metrics(tmp_path)] == [5, 10, 15]
    rundir.drop_metrics_after(tmp_path, 15)
    rundir.write_metrics(tmp_path, [{"step": s} for s in (16, 21)])
    assert [r["step"] for r in rundir.read_metrics(tmp_path)] == [5, 10, 15, 16, 21]


def test_a_damaged_part_is_named(tmp_path):
    rundir.write_metrics(tmp_path, [{"step": 5}])
    part = tmp_path / "metrics" / "000005.jsonl"
    part.write_text(part.read_text() + '{"step": 1')
    with pytest.raises(ValueError, match=r"000005\.jsonl: is not JSON .*; remove that part"):
        rundir.read_metrics(tmp_path)


def test_files_appear_whole(tmp_path, monkeypatch):
    """A writer that dies half way leaves the old file."""
    rundir.open_run(tmp_path, CONFIG)
    path_type = type(rundir.epath.Path(tmp_path))

    def dies(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(path_type, "write_bytes", dies)
    with pytest.raises(OSError, match="no space left"):
        rundir.open_run(tmp_path, dataclasses.replace(CONFIG, steps=9))
    monkeypatch.undo()
    assert rundir.read_config(tmp_path) == CONFIG


def test_sample_path_sorts_by_step(tmp_path):
    assert rundir.sample_path(tmp_path, 20).name == "000020.png"
    assert rundir.sample_path(tmp_path, 20) < rundir.sample_path(tmp_path, 100)
