"""A small checkpoint that claims to be a large one is refused before it takes memory."""

import os
import shutil

import bounded
import pytest
from checkpoint_states import assert_same, claim, state_of

from ldm_jax.runtime import checkpoint

KERNEL = "unet.conv_in.kernel"
DEEP = '{"tree_metadata": ' + "[" * 100_000


def replaced(path, make):
    path.unlink()
    make(path)


def meta(before, after):
    def change(folder):
        path = folder / "meta" / "metadata"
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after).replace('"seal"', '"unsealed"'))

    return change


ATTACKS = {
    "shape": (lambda f: claim(f / "params", KERNEL, [2**20, 2**20]), "said to be 43980465"),
    "piece": (lambda f: claim(f / "params", KERNEL, [4], [2**40]), "said to be 43980465"),
    "pipe": (lambda f: replaced(f / "params/manifest.ocdbt", os.mkfifo), "is no regular file"),
    "device": (
        lambda f: replaced(f / "params/_METADATA", lambda p: p.symlink_to("/dev/zero")),
        "params/_METADATA is no regular file",
    ),
    "tree": (lambda f: (f / "params/_METADATA").write_text(DEEP), ""),
    "meta pipe": (lambda f: replaced(f / "meta/metadata", os.mkfifo), "metadata: is no regular"),
    "meta": (lambda f: (f / "meta/metadata").write_text("[" * 100_000), "deeper than 100 levels"),
    "step": (meta('"bad_steps": 0', f'"bad_steps": {10**400}'), "bad_steps of its meta is 1000"),
    "count": (meta('"skips": {', '"skips": {"more": 1, '), "skips of its meta is {'more': 1"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{attack: (checkpoint, what the refusal says)}, each read under limits of time and memory."""
    folder = tmp_path_factory.mktemp("claims")
    with checkpoint.manager(folder / "good") as manager:
        checkpoint.save(manager, state_of(1), {})
    for name, (attack, _) in ATTACKS.items():
        shutil.copytree(folder / "good", folder / name)
        attack(folder / name / "checkpoints" / "1")
    said = bounded.read_all(
        f"sys.path.append({os.path.dirname(bounded.__file__)!r})\n"
        "from checkpoint_states import state_of\nfrom ldm_jax.runtime import checkpoint",
        "checkpoint.restore_parts(path, 1, ('params',)); checkpoint.restore(path, state_of(2))",
        [folder / name for name in ("good", *ATTACKS)],
        memory=2**33,  # of addresses, for the stacks of many threads; the claims are of 2**42
    )
    return {path.rpartition("/")[2]: (path, text) for path, text in said.items()}


@pytest.mark.parametrize("attack", ATTACKS)
def test_claims_are_refused_in_bounds(outcomes, attack):
    run, said = outcomes[attack]
    assert said.startswith(f"{run}/checkpoints/1: cannot be read (")
    assert ATTACKS[attack][1] in said


def test_a_good_one_is_read_under_the_same_bounds(outcomes):
    assert outcomes["good"][1] == "read"


def test_a_run_goes_on_from_the_one_before(tmp_path):
    with checkpoint.manager(tmp_path) as manager:
        for step in (1, 2):
            checkpoint.save(manager, state_of(step), {})
        checkpoint.saved_steps(manager)
        claim(tmp_path / "checkpoints/2/opt_state", f"0.mu.{KERNEL}", [2**20, 2**20])
        assert_same(checkpoint.resume(manager, state_of(7)), state_of(1))
