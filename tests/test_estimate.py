"""The estimator on programs small enough to be timed by hand."""

import pytest

from minllm import chips, hlo
from minllm.estimate import HOP, LINK_SHARE, MATRIX_SHARE, Estimator, _matmul

V6E = chips.CHIPS["v6e"]
LINK = V6E.link * LINK_SHARE


def cost(body: str, topology="v6e-16", extra=""):
    top = chips.topology(topology)
    shape = (*top.shape, 1)[:3]
    coords = [(s, x, y, z) for s in range(top.slices) for x in range(shape[0]) for y in range(shape[1]) for z in range(shape[2])]
    text = f"{extra}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}"
    return Estimator(hlo.parse(text), top, coords).step()


def fusion(name, cycles, operand="x"):
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"  %{name} = f32[8]{{0}} fusion(%{operand}), kind=kLoop, calls=%inner, {config}"


INNER = "%inner (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n  ROOT %m = f32[8]{0} multiply(%a, %a)\n}"
X = "  %x = f32[8]{0} parameter(0)"


def gather(groups, size=10**6, kind="all-gather"):
    return f"{X}\n  ROOT %g = bf16[{size}]{{0}} {kind}(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"


def test_cycles_over_the_clock_times_the_trips():
    loop = """%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[8]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
""" + fusion("f", 1750, "y") + """
  ROOT %t = (s32[], f32[8]) tuple(%j, %f)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(32)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}"""  # fmt: skip
    body = f"{X}\n  %z = s32[] constant(0)\n  %init = (s32[], f32[8]) tuple(%z, %x)\n"
    body += "  ROOT %w = (s32[], f32[8]) while(%init), condition=%cond, body=%body"
    found = cost(body, extra=f"{INNER}\n{loop}")
    assert found.seconds == pytest.approx(32 * 1e-6) == found.busy["vector"]
    assert [(trips, one.seconds) for _, trips, one in found.loops] == [(32, pytest.approx(1e-6))]


@pytest.mark.parametrize("vector", [0.1, 3.0])
def test_the_matrix_and_the_vector_unit_work_at_the_same_time(vector):
    """A fused matmul for which the compiler adds up both: 1024 x 512 x 2048, and so many times that on the vector unit."""
    matrix = 2 * 1024 * 512 * 2048 / 918e12  # at the peak
    inner = """%inner (a: bf16[1024,512], b: bf16[512,2048]) -> bf16[1024,2048] {
  %a = bf16[1024,512]{1,0} parameter(0)
  %b = bf16[512,2048]{1,0} parameter(1)
  ROOT %c = bf16[1024,2048]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}"""
    found = cost("\n".join([X, fusion("f", round(matrix * (1 + vector) * V6E.clock))]), extra=inner)
    assert found.busy["matmul"] == pytest.approx(matrix * max(1 / MATRIX_SHARE, vector), rel=1e-3)


@pytest.mark.parametrize(
    ("sides", "labels", "flops"),
    [
        (((64, 32), (32, 128), (64, 128)), "bf_io->bf", 2 * 64 * 32 * 128),
        (((4, 64, 32), (1, 32, 128), (4, 64, 128)), "0bf_0io->0bf", 2 * 4 * 64 * 32 * 128),  # more rows
        (((4, 64, 32), (4, 32, 128), (4, 64, 128)), "0bf_0io->0bf", 2 * 4 * 64 * 32 * 128),  # a batch of four
        (((4, 32, 64), (4, 32, 128), (1, 64, 128)), "0fb_0io->0bf", 2 * 4 * 64 * 32 * 128),  # summed over both
    ],
)
def test_flops_of_matmuls_as_the_compiler_writes_them(sides, labels, flops):
    assert _matmul(*sides, f", window={{size=4}}, dim_labels={labels}") == flops


def test_work_between_start_and_done_hides_a_collective():
    """1 MB gathered over 4 x 4 open chips: 15/16 of it through two links, and six hops."""
    seconds = 1e6 * 15 / 16 / (2 * LINK) + 6 * HOP
    start = "  %s = (f32[8]{0}, bf16[500000]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}"
    done = "  ROOT %d = bf16[500000]{0} all-gather-done(%s)"
    for cycles in (1750, 17_500):
        found = cost("\n".join([X, start, fusion("f", cycles), done]), extra=INNER)
        work = cycles / V6E.clock
        assert found.seconds == pytest.approx(max(work, seconds))
        assert found.busy["wait"] == pytest.approx(max(0.0, seconds - work))
        assert found.hidden["collective"] == pytest.approx(min(work, seconds))


def test_two_collectives_share_the_links():
    one = "  %{0} = (f32[8]{{0}}, bf16[500000]{{0}}) all-gather-start(%x), channel_id={1}, replica_groups=[1,16]<=[16], dimensions={{0}}"
    ends = "  %d = bf16[500000]{0} all-gather-done(%s)\n  ROOT %e = bf16[500000]{0} all-gather-done(%t)"
    found = cost("\n".join([X, one.format("s", 1), one.format("t", 2), ends]))
    assert found.seconds == pytest.approx(2 * (1e6 * 15 / 16 / (2 * LINK) + 6 * HOP))


@pytest.mark.parametrize(
    ("topology", "groups", "expected"),
    [
        # bytes x 15/16 over the links of one chip: two of an open square, four of a torus
        ("v6e-16", "[1,16]<=[16]", 2e6 * 15 / 16 / (2 * LINK) + 6 * HOP),
        ("v6e-256", "[1,256]<=[256]", 2e6 * 255 / 256 / (4 * LINK) + 16 * HOP),
        ("v6e-256", "[16,16]<=[256]", 2e6 * 15 / 16 / (2 * LINK) + 8 * HOP),  # one ring
        ("v6e-16", "[4,4]<=[16]", 2e6 * 3 / 4 / LINK + 3 * HOP),  # one open line
        ("v6e-16", "[16,1]<=[16]", 0.0),  # nobody to talk to
    ],
)
def test_all_gather_over_lines_rings_and_tori(topology, groups, expected):
    assert cost(gather(groups), topology).seconds == pytest.approx(expected)


def test_kinds_of_collectives():
    whole = "[1,256]<=[256]"
    once = cost(gather(whole), "v6e-256").seconds
    assert cost(gather(whole, kind="all-reduce"), "v6e-256").seconds == pytest.approx(2 * once)
    assert cost(gather(whole, 10**6 // 256, "reduce-scatter"), "v6e-256").seconds == pytest.approx(once, rel=1e-3)
    # 256 pieces of 1/256 each: a quarter of what an all-gather of 256 such arrays takes, both dims at the same time
    assert cost(gather(whole, kind="all-to-all"), "v6e-256").seconds == pytest.approx(2e6 * 16 / (4 * 2 * LINK) + 16 * HOP)


def test_a_step_to_the_neighbour_goes_one_way():
    pairs = ",".join(f"{{{n},{(n + 1) % 4 + n // 4 * 4}}}" for n in range(4))
    body = f"{X}\n  ROOT %g = bf16[1000000]{{0}} collective-permute(%x), channel_id=1, source_target_pairs={{{pairs}}}"
    found = cost(body, "v6e-16")
    assert found.seconds == pytest.approx(3 * 2e6 / LINK + 3 * HOP)  # an open line: the last goes back over three links
    assert found.exchanges[0][0].kind == "collective-permute"


def test_slices_talk_over_the_network():
    """Each chip sends and receives its 256th part to the other slice's; inside, the torus."""
    found = cost(gather("[1,512]<=[512]", kind="all-reduce"), "v6e-256x2")
    near = 2 * (2e6 * 255 / 256 / (4 * LINK) + 16 * HOP)
    assert found.seconds == pytest.approx(near + 2 * (2e6 / 256) * 0.5 / V6E.network)
    assert found.busy["network"] == found.seconds


def test_host_and_memory_copies_run_beside_the_core():
    start = "  %c = (f32[8000000]{0:S(5)}, f32[8000000]{0}, u32[]) copy-start(%x)"
    found = cost("\n".join([X, start, fusion("f", 175_000), "  ROOT %d = f32[8000000]{0:S(5)} copy-done(%c)"]), extra=INNER)
    assert found.seconds == pytest.approx(32e6 / V6E.host_speed)
    assert found.hidden["host"] == pytest.approx(1e-4)


def kernel(name, blocks=4, outs="bf16[1,8,8192,128]{3,2,1,0}"):
    operands = f"  %b = s8[1,{blocks},{blocks}]{{2,1,0}} parameter(1)\n  %q = bf16[1,8,8192,128]{{3,2,1,0}} parameter(0)"
    target = f'custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{name}"}}'
    return f"{operands}\n  ROOT %k = {outs} custom-call(%b, %q, %q, %q), {target}"


def test_attention_kernels_go_at_measured_rates():
    """Causal tiles: (n + 1) / 2n of the square, and a third more for each of the n on the diagonal. Backward: 5 products for 2."""
    flops = 4.0 * 8 * 8192**2 * 128
    ahead = cost(kernel("splash_mha_fwd"))
    assert ahead.seconds == pytest.approx(flops * (5 / 8 + 1 / 12) / 330e12) == ahead.busy["attention"]
    assert cost(kernel("splash_mha_fwd", blocks=16)).seconds == pytest.approx(flops * (17 / 32 + 1 / 48) / 330e12)
    three = "(bf16[1,8,8192,128]{3,2,1,0}, bf16[1,8,8192,128]{3,2,1,0}, bf16[1,8,8192,128]{3,2,1,0})"
    assert cost(kernel("splash_mha_dkv", outs=three)).seconds == pytest.approx(ahead.seconds * 2.5 / 1.15)


def test_another_kernel_takes_its_bytes_or_its_flops():
    said = 'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/scan"}'
    body = f"  %q = f32[41000000]{{0}} parameter(0)\n  ROOT %k = f32[8]{{0}} custom-call(%q), {said}"
    assert cost(body).seconds == pytest.approx(164e6 / V6E.hbm_speed, rel=1e-6)
    flops = body + ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000000000000"}}}'
    assert cost(flops).seconds == pytest.approx(1e12 / (0.8 * 918e12))


def test_marks_for_the_compiler_cost_nothing():
    assert cost(f'{X}\n  ROOT %k = f32[8000000]{{0}} custom-call(%x), custom_call_target="AllocateBuffer"').seconds == 0.0
