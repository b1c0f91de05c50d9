"""What lives at once in a program, on texts whose sums are known by hand."""

from pathlib import Path

from ldm_jax.cost import hlo, hlo_memory

MIB = 2**20
TEXT = """HloModule m

%body (s: (s32[], f32[1024,256])) -> (s32[], f32[1024,256]) {
  %s = (s32[], f32[1024,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[1024,256]{1,0} get-tuple-element(%s), index=1
  %wide = f32[1024,1024]{1,0} fusion(%x), kind=kLoop, calls=%f
  %y = f32[1024,256]{1,0} fusion(%wide), kind=kLoop, calls=%f
  ROOT %t = (s32[], f32[1024,256]{1,0}) tuple(%i, %y)
}

ENTRY %main (p: f32[1024,256]) -> f32[1024,256] {
  %p = f32[1024,256]{1,0} parameter(0)
  %a = f32[1024,512]{1,0} fusion(%p), kind=kLoop, calls=%f
  %chip = f32[1024,1024]{1,0:S(1)} fusion(%a), kind=kLoop, calls=%f
  %b = f32[1024,768]{1,0} fusion(%a, %chip), kind=kLoop, calls=%f
  %zero = s32[] constant(0)
  %c = f32[1024,256]{1,0} fusion(%b), kind=kLoop, calls=%f
  %state = (s32[], f32[1024,256]{1,0}) tuple(%zero, %c)
  %while = (s32[], f32[1024,256]{1,0}) while(%state), condition=%condition, body=%body
  %out = f32[1024,256]{1,0} get-tuple-element(%while), index=1
  ROOT %r = f32[1024,256]{1,0} fusion(%out), kind=kLoop, calls=%f
}
"""


def names(text: str) -> list[tuple[str, float]]:
    found = hlo_memory.at_peak(hlo.parse(text))
    return [(b.op.name, b.bytes / MIB) for b in found if b.bytes > 4]


def test_the_most_is_inside_a_loop_beside_what_lives_around_it():
    assert names(TEXT) == [("wide", 4), ("c", 1)]  # 5 MiB; a and b together are 5 with nothing else


def test_an_array_lives_until_its_last_reader():
    longer = TEXT.replace("fusion(%out)", "fusion(%out, %b)")
    assert names(longer) == [("wide", 4), ("b", 3), ("c", 1)]


def test_what_an_op_updates_in_place_counts_once():
    split = TEXT.replace("%wide = f32[1024,1024]", "%wide = f32[1,1]")
    assert names(split) == [("b", 3), ("a", 2)]
    line = "%b = f32[1024,768]{1,0} fusion(%a, %chip), kind=kLoop"
    one = split.replace("%a = f32[1024,512]", "%a = f32[1024,768]")
    assert names(one) == [("a", 3), ("b", 3)]
    same = one.replace(line, line + ", output_to_operand_aliasing={{}: (0, {})}")
    assert names(same) == [("a", 3), ("c", 1)]


def test_a_real_program_names_its_arrays():
    text = (Path(__file__).parents[1] / "golden" / "tpu_slices.txt").read_text()
    found = hlo_memory.at_peak(hlo.parse(text))
    assert found
    assert all(buffer.array.in_hbm for buffer in found)
    assert [b.bytes for b in found] == sorted((b.bytes for b in found), reverse=True)
