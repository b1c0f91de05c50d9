"""Costs read from texts of real TPU compiles, against counts by hand."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tpu_programs

from ldm_jax.cost import flops, hlo, tpu_cost

GOLDEN = Path(__file__).parents[1] / "golden"
CHIP = tpu_cost.CHIPS["v5e"]
LOOP = """HloModule m

%body (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %s = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %y = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%f, backend_config={CYCLES}
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (s.1: (s32[], f32[8,128])) -> pred[] {
  %s.1 = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %end = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

%f (x.1: f32[8,128]) -> f32[8,128] {
  ROOT %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} START
  %state = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%start, %p)
  %while = (s32[], f32[8,128]{1,0:T(8,128)}) while(%state), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def loop(start="constant(1)", cycles=3000):
    return LOOP.replace("START", start).replace("CYCLES", f'"estimated_cycles":"{cycles}"')


def golden(name: str) -> str:
    return (GOLDEN / f"tpu_{name}.txt").read_text()


def charged(name: str, **given) -> tpu_cost.Estimate:
    return tpu_cost.estimate(golden(name), CHIP, **given)


def only(estimate: tpu_cost.Estimate, source: str) -> tpu_cost.Charge:
    found = [charge for charge in estimate.charges if charge.source == source]
    assert len(found) == 1, found
    return found[0]


def kernels():
    function, shapes = tpu_programs.PROGRAMS["kernel"][0], tpu_programs.shapes("kernel")
    return flops.kernels(jax.make_jaxpr(function)(*shapes))


def test_matmul_costs_its_cycles():
    estimate = charged("matmul")
    charge = only(estimate, "cycles")
    cycles = int(golden("matmul").split('"estimated_cycles":"')[1].split('"')[0])
    assert charge.seconds == cycles / 1.5e9
    assert charge.op.scope == "jit(matmul)/dot_general"
    operations = 2 * 1024**3
    assert estimate.utilization(operations, CHIP) == pytest.approx(
        operations / 197e12 / estimate.seconds
    )
    assert 0.3 < estimate.utilization(operations, CHIP) < 1
    assert not estimate.collectives


def test_a_scan_counts_every_turn():
    estimate = charged("scan")
    products = [c for c in estimate.charges if "dot_general" in c.op.scope]
    assert [c.runs for c in products] == [tpu_programs.TURNS]
    cycles = hlo_cycles(products[0].op)
    assert products[0].seconds == pytest.approx(10 * cycles / 1.5e9)
    assert estimate.unknown_loops == []


def hlo_cycles(op: hlo.Op) -> int:
    return int(op.attributes.split('"estimated_cycles":"')[1].split('"')[0])


def test_a_kernel_costs_its_bytes_or_its_operations_with_padding():
    moved = 2 * 8192 * 1024  # its input; weights and output lie in on-chip memory
    charge = only(charged("kernel", kernels=kernels()), "kernels")
    assert charge.op.opcode == "custom-call"
    assert charge.seconds == pytest.approx(moved / 819e9 / 0.6)
    ((name, calls),) = kernels().items()
    ((shapes, operations),) = calls.items()
    dearer = {name: {shapes: 4 * operations}}
    assert operations == 2 * 8192 * 1024 * 128  # 40 columns take a whole tile
    charge = only(charged("kernel", kernels=dearer), "kernels")
    assert charge.seconds == pytest.approx(4 * operations / 197e12 / 0.6)


def test_a_kernel_that_is_not_known_is_named():
    estimate = charged("kernel")
    assert estimate.unknown_kernels == ["jit(kernel)/product/pallas_call"]
    assert only(estimate, "kernels").seconds > 0


def test_an_all_reduce_costs_a_ring_over_one_link():
    estimate = charged("all_reduce")
    size = 256 * 512 * 2
    charge = only(estimate, "collectives")
    assert charge.seconds == pytest.approx(size * 2 * 15 / 16 / 45e9)
    assert estimate.collectives == {
        "all-reduce": tpu_cost.Traffic(count=1, bytes=size, moved=size * 2 * 15 / 16)
    }
    assert sum(estimate.shares().values()) == pytest.approx(1)


def test_slices_talk_over_their_network_and_a_fused_collective_counts_once():
    """Three fusions hold the gather of `v`, from its start to its end beside the first product."""
    text, estimate = golden("slices"), charged("slices")
    size = 1024 * 4096
    gathers = [t for t in estimate.transfers if t.kind == "all-gather"]
    assert text.count(" all-gather(") == 4
    assert {t.arrays[0].dims for t in gathers} == {(1024, 4096), (4096, 1024)}
    assert [(t.bytes, t.moved, t.group) for t in gathers] == [
        (2 * size, 2 * size * 15 / 16, 16)
    ] * 2
    reduced = estimate.collectives["all-reduce"]
    assert (reduced.count, reduced.bytes) == (1, 2 * 4 * size)
    assert reduced.moved == 2 * 4 * size * 2 * 15 / 16
    part = 4 * size / 16  # each chip sends its part of a gradient to the other slice
    assert estimate.across_slices == {"all-reduce": tpu_cost.Traffic(2, 2 * part, 2 * part)}
    network = sum(c.seconds for c in estimate.charges if c.source == "network")
    assert network == pytest.approx(2 * part / 3.125e9)


@pytest.mark.parametrize(
    ("shape", "opcode", "size"),
    [
        ("bf16[256,512]{1,0}", "reduce-scatter", 16),
        ("(bf16[16,512]{1,0}, bf16[256,512]{1,0})", "all-gather-start", 1),
        ("(bf16[256,512]{1,0}, bf16[256,512]{1,0}, u32[], u32[])", "collective-permute-start", 1),
    ],
)
def test_the_larger_side_of_a_collective_is_its_size(shape, opcode, size):
    text = f"""HloModule m

ENTRY %main (p: bf16[{256 * size},512]) -> bf16[256,512] {{
  %p = bf16[{256 * size},512]{{1,0}} parameter(0)
  ROOT %x = {shape} {opcode}(%p), replica_groups=[1,16]<=[16], dimensions={{0}}
}}
"""
    (transfer,) = tpu_cost.estimate(text, CHIP).transfers
    assert transfer.kind == opcode.removesuffix("-start")
    assert transfer.bytes == 256 * size * 512 * 2


def test_trips_follow_start_and_step():
    assert only(tpu_cost.estimate(loop(), CHIP), "cycles").runs == 4  # 1, 3, 5, 7
    estimate = tpu_cost.estimate(loop("parameter(1)"), CHIP)
    assert estimate.unknown_loops == ["while"]
    assert only(estimate, "cycles").runs == 1


def test_a_sentinel_costs_its_bytes():
    charge = only(tpu_cost.estimate(loop(cycles=2**63 - 1), CHIP), "sentinels")
    assert charge.seconds == pytest.approx(4 * 2 * 8 * 128 * 4 / 819e9 / 0.6)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[2,40]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("bf16[300,40]{0,1:T(8,128)(2,1)}", 384 * 40 * 2),
        ("f32[3,9,130]{2,1,0:T(8,128)}", 3 * 16 * 256 * 4),
        ("s32[]{:T(128)}", 4),
        ("pred[5]", 5),
    ],
)
def test_bytes_have_the_padding_of_the_layout(text, size):
    array = hlo.Array(*_parts(text))
    assert array.bytes == size


def _parts(text):
    dtype, dims, layout = hlo.ARRAY.findall(text)[0]
    return dtype, tuple(int(n) for n in dims.split(",") if n), layout


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("mesh['a'=2,'b'=8] {'b'}", 8),
        ("mesh['a'=2,'b'=8] {'a','b'}", 16),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}", 4),
        ("mesh['a'=2,'b'=8] {'a','b':(2)4}", 8),
    ],
)
def test_group_sizes(groups, size):
    text = golden("all_reduce").replace("mesh['axis_0'=1,'axis_1'=16] {'axis_1'}", groups)
    assert groups in text
    traffic = tpu_cost.estimate(text, CHIP).collectives["all-reduce"]
    assert traffic.moved == pytest.approx(traffic.bytes * 2 * (size - 1) / size)


def test_no_hlo_is_refused():
    with pytest.raises(ValueError, match=r"no ENTRY; take compiled.as_text\(\)"):
        tpu_cost.estimate("module @jit_f {}", CHIP)


@pytest.mark.slow
def test_fresh_compiles_cost_what_the_committed_ones_do(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it compiles for TPUs")
    command = [sys.executable, tpu_programs.__file__, str(tmp_path)]
    subprocess.run(command, env=os.environ | tpu_programs.ENVIRONMENT, check=True)
    for name in (*tpu_programs.PROGRAMS, "slices"):
        text = (tmp_path / f"tpu_{name}.txt").read_text()
        fresh = tpu_cost.estimate(text, CHIP, kernels())
        assert fresh.seconds == pytest.approx(charged(name, kernels=kernels()).seconds, rel=0.2)
