"""The recipe of the LDM: one step on every mesh, every option trains, bad steps change nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from runs import ldm_config, ldm_flags

from ldm_jax import conditioning, data, schema, train_state
from ldm_jax.configs import tiny
from ldm_jax.runtime import checkpoint, cli, rundir
from ldm_jax.train import ldm, main

CONFIG = recipes.ldm_config(spikes=recipes.SPIKES)
TOLERANCE = 2e-6
"""On parameters of about 1 after five steps; a wrong mean or a wrong row costs 1e-4 and more."""


@pytest.fixture(scope="module")
def alone():
    """(state, metrics) after five steps on one device."""
    return recipes.steps(CONFIG, recipes.mesh_of(), 5)


# --- meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        pytest.param({"data": 4}, 1, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4}, 1, marks=pytest.mark.slow),  # as in the next
        ({"data": 2, "fsdp": 2}, 2),
        # across processes in test_multiprocess
        pytest.param({"fsdp": 2, "tensor": 2}, 1, marks=pytest.mark.slow),
        pytest.param({}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_five_steps_on_four_devices_equal_those_on_one(alone, mesh, accumulate, record_property):
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    state, metrics = recipes.steps(config, recipes.mesh_of(**mesh), 5)
    found = recipes.largest_difference(state, alone[0])
    record_property("largest_difference", found)
    assert found < TOLERANCE
    for a, b in zip(metrics, alone[1]):
        assert a == pytest.approx(b, rel=1e-5)
    kernel = state.params["unet"]["conv_in"]["kernel"]
    split = mesh.get("fsdp", 1)
    assert kernel.addressable_shards[0].data.size * split == kernel.size


def test_steps_move_every_parameter_and_the_average(alone):
    state, metrics = alone
    assert _still(state.params, CONFIG) == []
    assert sorted(state.ema_params) == ["cond_stage", "unet"]
    assert recipes.largest_difference(state.ema_params, state.params) > 1e-5
    assert [m["learning_rate"] for m in metrics] == pytest.approx([5e-4] + 4 * [1e-3])
    assert int(state.step) == 5


def test_the_first_steps_are_the_recorded_ones(ldm_run):
    """Update the numbers only with a change that is meant to alter init, data, loss or draws."""
    records = rundir.read_metrics(ldm_run)[:3]
    assert [r["loss"] for r in records] == pytest.approx([1.04569, 1.00063, 0.921063], rel=1e-3)
    norms = [r["grad_norm"] for r in records]
    assert norms == pytest.approx([0.942466, 1.12056, 0.750184], rel=2e-3)


def test_thirty_steps_lower_the_loss(alone):
    mesh = recipes.mesh_of()
    evaluate = ldm.make_eval_step(CONFIG, recipes.frozen(mesh), mesh)
    batch, key = recipes.batch_of(CONFIG, mesh, 0), jax.random.key(1)
    before = float(evaluate(recipes.start(CONFIG, mesh).params, batch, key))
    state, _ = recipes.steps(CONFIG, mesh, 30)
    after = float(evaluate(state.params, batch, key))
    assert after == float(evaluate(state.params, batch, key))  # the same t and noise each time
    assert after != float(evaluate(state.params, batch, jax.random.key(2)))
    assert after < 0.8 * before, (before, after)


@pytest.mark.slow
def test_bfloat16_stays_close_and_keeps_float32_parameters(alone):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    state, metrics = recipes.steps(config, recipes.mesh_of(), 3)
    for a, b in zip(metrics, alone[1]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
        assert a["loss"] != b["loss"]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_remat_gives_the_same_step(alone):
    state, _ = recipes.steps(dataclasses.replace(CONFIG, remat=True), recipes.mesh_of(), 5)
    assert recipes.largest_difference(state, alone[0]) < TOLERANCE


# --- options ------------------------------------------------------------------------------------


def _with(condition, unet=(), **diffusion):
    """tiny:CONDITION with two channels in a group: with one, GroupNorm takes out every bias."""
    unet = {"model_channels": 64, **dict(unet)}
    return recipes.ldm_config(condition, unet, diffusion=schema.DiffusionConfig(**diffusion))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            _with("unconditional", learn_logvar=True, elbo_weight=0.1, logvar_init=0.5),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            _with("label", prediction="v", zero_terminal_snr=True), marks=pytest.mark.slow
        ),
        pytest.param(_with("inpaint", offset_noise=0.1, loss="l1"), marks=pytest.mark.slow),
        pytest.param(_with("superres", prediction="x0", min_snr_gamma=5.0), marks=pytest.mark.slow),
        _with(
            "semantic",
            {"scale_shift_norm": False},
            schedule="cosine",
            beta_start=None,
            beta_end=None,
        ),
    ],
    ids=["unconditional", "label", "inpaint", "superres", "semantic"],
)
def test_every_option_trains_every_part(config):
    state, (metrics,) = recipes.steps(config, recipes.mesh_of(), 1)
    assert np.isfinite(metrics["loss"])
    assert metrics["bad_steps"] == 0
    assert _still(state.params, config, decay_moves=False) == []


def test_the_condition_is_dropped_by_row_at_the_rate_of_the_config(monkeypatch):
    def decisions(batch_size, step, rate=0.1, train=True):
        """(dropped [B], context [B, c], labels [B], table) of a step; XLA leaves out the rest."""
        config = dataclasses.replace(
            CONFIG, batch_size=batch_size, cond=dataclasses.replace(CONFIG.cond, dropout=rate)
        )
        mesh, seen = recipes.mesh_of(), {}
        fixed, params = recipes.frozen(mesh), recipes.start(config, mesh).params

        def spy(*arguments):
            seen["dropped"], seen["cond"] = arguments[-1], from_batch(*arguments)
            return seen["cond"]

        from_batch = conditioning.from_batch
        monkeypatch.setattr(conditioning, "from_batch", spy)
        loss = ldm.make_loss(config, fixed, mesh)
        labels = np.arange(batch_size, dtype=np.int32) % 4
        batch = {"image": jnp.zeros((batch_size, 8, 8, 3)), "label": labels}

        @jax.jit
        def run(params, batch):
            keys = train_state.step_keys(jax.random.key(0), step, ldm.DRAWS)
            keys = {n: train_state.example_keys(k, batch_size) for n, k in keys.items()}
            rows = {"batch": batch, "keys": keys}
            loss({"first_stage": fixed.params}, params, rows, train)
            dropped = jnp.broadcast_to(jnp.asarray(seen["dropped"]), (batch_size,))
            return dropped, seen["cond"].context[:, 0]

        dropped, context = jax.device_get(run(params, batch))
        monkeypatch.undo()
        table = np.asarray(params["cond_stage"]["embedding"]["embedding"])
        np.testing.assert_allclose(context, table[np.where(dropped, 4, labels)], rtol=1e-6)
        return dropped

    many = decisions(8192, 0)
    assert abs(many.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 8192)
    np.testing.assert_array_equal(decisions(256, 0), many[:256])
    assert not np.array_equal(decisions(256, 1), many[:256])
    assert not decisions(256, 0, train=False).any()
    assert decisions(16, 0, rate=1.0).all()


def _still(params, config, decay_moves=True):
    """Paths of parameters that the steps so far did not move beyond what weight decay does."""
    before = jax.tree.leaves(recipes.start(config, recipes.mesh_of()).params)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    rate = config.optimizer.learning_rate / config.optimizer.warmup_steps
    shrink = 0.0 if decay_moves else rate * config.optimizer.weight_decay
    return [
        jax.tree_util.keystr(p)
        for (p, a), b in zip(flat, before)
        if np.max(np.abs(a - (1 - shrink) * b)) < 1e-9
    ]


# --- steps that are not finite ------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): training batches of these steps get one NaN."""

    def spoil(steps):
        real = data.prefetch

        class Poisoned:
            def __init__(self, *arguments):
                self.batches = real(*arguments)

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                self.batches.close()

            def __iter__(self):
                return self

            def __next__(self):
                step, batch = next(self.batches)
                if step in steps:
                    image = batch["image"]
                    batch["image"] = jax.device_put(_spoiled(image), image.sharding)
                return step, batch

        monkeypatch.setattr(data, "prefetch", Poisoned)

    return spoil


def _spoiled(image):
    image = np.array(image)
    image[5, 3, 3, 1] = np.nan
    return image


def test_a_poisoned_batch_between_two_saves_changes_nothing(tmp_path, poison, first_stage_run):
    poison({2})
    flags = ["--steps", "4", "--intervals.save", "1", "--intervals.snapshot", "0"]
    assert ldm.train(ldm_config(first_stage_run, *flags), tmp_path / "run") == 0
    parts = ("params", "ema_params", "opt_state")
    saved = {s: checkpoint.restore_parts(tmp_path / "run", s, parts) for s in (2, 3, 4)}
    recipes.assert_same_bits(saved[3], saved[2])
    assert recipes.largest_difference(saved[4]["params"], saved[3]["params"]) > 1e-5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved))
    records = rundir.read_metrics(tmp_path / "run")
    assert [r["bad_steps"] for r in records] == [0, 0, 1, 0]
    assert [r["loss"] is None for r in records] == [False, False, True, False]
    metas = [
        checkpoint.read_meta(rundir.epath.Path(tmp_path / "run/checkpoints" / str(s)))
        for s in (2, 3, 4)
    ]
    assert [(m["step"], m["bad_steps"]) for m in metas] == [(2, 0), (3, 1), (4, 0)]


def test_a_skipped_step_leaves_every_device_as_it_was():
    mesh = recipes.mesh_of(data=4)
    state, _ = recipes.steps(CONFIG, mesh, 1)
    kept = lambda s: [  # noqa: E731
        jax.device_get([shard.data for shard in x.addressable_shards])
        for x in jax.tree.leaves((s.params, s.ema_params, s.opt_state))
    ]
    before, batch = kept(state), recipes.batch_of(CONFIG, mesh, 1)
    batch["image"] = jax.device_put(_spoiled(batch["image"]), batch["image"].sharding)
    state, _ = recipes.step_of(CONFIG, mesh)(state, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, kept(state), before)
    for scalar, value in ((state.step, 2), (state.bad_steps, 1)):
        assert [int(shard.data) for shard in scalar.addressable_shards] == 4 * [value]
    spiked, _ = recipes.steps(CONFIG, mesh, 1, recipes.with_usual_norm(state, 0, 1e-9))
    jax.tree.map(np.testing.assert_array_equal, kept(spiked), before)
    assert (int(spiked.bad_steps), int(spiked.skips["count"])) == (2, 2)


def test_the_logged_rate_is_that_of_the_update():
    """Which a skipped step does not bring on: the warm-up goes on where it stood."""
    mesh = recipes.mesh_of()
    state, _ = recipes.steps(CONFIG, mesh, 0)
    batch = recipes.batch_of(CONFIG, mesh, 0)
    spoiled = {**batch, "image": _spoiled(batch["image"])}
    rates = []
    for given in (spoiled, spoiled, batch, batch):
        state, metrics = recipes.step_of(CONFIG, mesh)(state, given, jax.random.key(0))
        rates.append(float(metrics["learning_rate"]))
    assert rates == pytest.approx([5e-4, 5e-4, 5e-4, 1e-3])


def test_too_many_bad_steps_stop_with_one_line(tmp_path, poison, first_stage_run, capsys):
    poison(range(5, 100))
    flags = ldm_flags(first_stage_run, "--workdir", str(tmp_path / "run"), "--max-bad-steps", "3")
    assert cli.run("ldm-train", main.train, ["tiny:class", *flags]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert "not finite at step 9 and for 4 steps in a row (batches 5 to 8;" in error[0]
    assert "the last good checkpoint is step 8 in" in error[0]
    assert str(tmp_path / "run") in error[0]
    assert checkpoint.saved_steps(tmp_path / "run")[-1] == 8


# --- configs that do not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "change", "message"),
    [
        ("class", {"cond.num_classes": 3}, "the data have 4 classes, but cond.num_classes is 3"),
        ("inpaint", {"unet.in_channels": 4}, "set it to 9"),
        ("class", {"unet.context_dim": 16}, "context_dim is 16, but cond.embed_dim is 32"),
        ("class", {"data.channels": 1}, "data.channels is 1, but the first stage takes 3"),
        ("semantic", {"cond.stages": 2}, "the first stage downsamples by 2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(condition, change, message):
    config = recipes.ldm_config(condition)
    ((path, value),) = change.items()
    section, field = path.split(".")
    part = dataclasses.replace(getattr(config, section), **{field: value})
    config = dataclasses.replace(config, **{section: part})
    first_stage = tiny.first_stage().model
    mesh = recipes.mesh_of()
    with pytest.raises(ValueError, match=message):
        ldm.check(config, first_stage, recipes.stream_of(config), mesh)


def test_no_first_stage_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, first_stage=schema.FirstStageConfig())
    with pytest.raises(ValueError, match=r"no first stage: give --first-stage\.path"):
        ldm.train(config, tmp_path / "run")


def test_the_scale_is_one_over_the_deviation_of_sampled_latents(ldm_run):
    known = json.loads((ldm_run / "latents.json").read_text())
    assert "16 training images" in known["how"]
    params, config = rundir.read_frozen(ldm_run, "first_stage")
    mesh = recipes.mesh_of()
    stage = dataclasses.replace(recipes.frozen(mesh), params=params, config=config)
    training = rundir.read_config(ldm_run)
    stream = recipes.stream_of(training)
    image = np.stack([stream[i]["image"] for i in range(16)])
    mean, logvar = stage.module.apply({"params": params}, image, method="encode")
    expected = np.sqrt(np.mean(np.exp(logvar)) + np.var(mean))  # of mean + deviation * noise
    assert 1 / known["scale"] == pytest.approx(expected, rel=0.03)
