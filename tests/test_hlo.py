"""The compiler's text, read: shapes, loops, groups, and what calls what."""

import pytest

from minllm import hlo

TEXT = """
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%inner, metadata={op_name="jit(step)/while/body/mul"}, BACKEND
  ROOT %t = (s32[], f32[8,128], s32[]) tuple(%next, %fusion.1, %n)
}

%inner (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %m = f32[8,128]{1,0} multiply(%a, %a)
}

%condition (p: (s32[], f32[8,128], s32[])) -> pred[] {
  %p.1 = (s32[], f32[8,128], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=2
  ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %zero = s32[] constant(0)
  %twelve = s32[] constant(12)
  %init = (s32[], f32[8,128], s32[]) tuple(%zero, %x.1, %twelve)
  %loop = (s32[], f32[8,128], s32[]) while(%init), condition=%condition, body=%body
  %kernel = f32[8,128]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"blocks": 512
}}, metadata={op_name="jit(step)/flash_attention"}
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
""".replace("BACKEND", 'backend_config={"window_config":{"estimated_cycles":"1500"}}')


def test_the_tree_and_its_parts():
    module = hlo.parse(TEXT)
    assert module.entry == "main" and set(module.computations) == {"main", "body", "inner", "condition"}
    fusion = module["body"].by_name["fusion.1"]
    assert (fusion.opcode, fusion.calls, fusion.cycles, fusion.op_name) == ("fusion", ("inner",), 1500, "jit(step)/while/body/mul")
    assert fusion.backend["window_config"] == {"estimated_cycles": "1500"}
    assert module["body"].by_name["p"].out[1] == hlo.Shape("f32", (8, 128))
    assert module["main"].by_name["x.1"].out == (hlo.Shape("f32", (8, 128), space=1),)
    assert [i.opcode for i in module.inside("body")].count("multiply") == 1
    assert module["main"].root.name == "out"


def test_a_line_that_is_broken_is_one_instruction():
    kernel = hlo.parse(TEXT)["main"].by_name["kernel"]
    assert kernel.op_name == "jit(step)/flash_attention" and kernel.attribute("custom_call_target") == "tpu_custom_call"


def test_trips_of_a_counter_that_steps_by_two_to_a_limit_carried_along():
    module = hlo.parse(TEXT)
    main = module["main"]
    assert module.trips(main.by_name["loop"], main) == 6


@pytest.mark.parametrize(
    ("written", "trips"),
    [("LT", 6), ("LE", 7)],  # 0, 2, ... 10, and 12 too
)
def test_trips_by_direction(written, trips):
    module = hlo.parse(TEXT.replace("direction=LT", f"direction={written}"))
    main = module["main"]
    assert module.trips(main.by_name["loop"], main) == trips


def test_a_loop_without_a_counter_has_no_known_trips():
    text = TEXT.replace("ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT", "ROOT %lt = pred[] parameter(1)")
    module = hlo.parse(text)
    assert module.trips(module["main"].by_name["loop"], module["main"]) is None


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
    ],
)
def test_groups_in_every_notation(written, groups):
    line = f"  %g = f32[8]{{0}} all-gather(%x), channel_id=1, {written}, dimensions={{0}}"
    instruction = hlo.parse("ENTRY %main (x: f32[2]) -> f32[8] {\n" + line + "\n}")["main"].by_name["g"]
    assert hlo.groups(instruction, 4) == groups


@pytest.mark.parametrize(
    ("type_", "size"), [("bf16[2,3]{1,0}", 12), ("(f32[4], s4[8]{0})", 20), ("pred[]", 1), ("f8e4m3fn[5]", 5), ("token[]", 0)]
)
def test_bytes(type_, size):
    assert sum(s.bytes for s in hlo.shapes(type_)) == size


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing")
