"""Names of machines, and what is known of them."""

import pytest

from minllm import chips


@pytest.mark.parametrize(
    ("name", "shape", "chips_", "size", "wrap"),
    [
        ("v5e-1", (1, 1), 1, 1, (False, False)),
        ("v5e-256", (16, 16), 256, 256, (True, True)),
        ("v6e-8", (2, 4), 8, 8, (False, False)),  # counts chips
        ("v6e-128", (8, 16), 128, 128, (False, True)),
        ("v6e-256x2", (16, 16), 512, 512, (True, True)),
        ("v5p-8", (2, 2, 1), 4, 4, (False, False, False)),  # counts cores, two a chip, of which jax makes one device
        ("v5p-64", (2, 4, 4), 32, 32, (False, False, False)),
        ("v5p-1024", (8, 8, 8), 512, 512, (True, True, True)),
        ("tpu7x-8", (2, 2, 1), 4, 8, (False, False, False)),  # two jax devices a chip
    ],
)
def test_names(name, shape, chips_, size, wrap):
    top = chips.topology(name)
    assert (top.shape, top.chips, top.size, top.wrap) == (shape, chips_, size, wrap)


@pytest.mark.parametrize("name", ["v5e-4", "v5p-16", "v6e-16x2", "tpu7x-16"])
def test_the_compiler_knows_the_devices(name):
    top = chips.topology(name)
    devices = top.devices()
    assert len(devices) == top.size and {d.device_kind for d in devices} == {top.chip.kind}
    assert {tuple(d.coords)[: len(top.shape)] for d in devices} == set(_places(top.shape))
    assert chips.chip_of(devices[0].device_kind) == top.chip


def _places(shape):
    if not shape:
        return [()]
    return [(n, *rest) for n in range(shape[0]) for rest in _places(shape[1:])]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v6e-7", "there are v6e-1, v6e-4, v6e-8, v6e-16, v6e-32, v6e-64, v6e-128, v6e-256"),
        ("v5p-4", "v5p counts cores, two a chip.*there are v5p-8"),
        ("v5p-9", "there are v5p-8"),
        ("v6e-8x0", "xN behind one"),
        ("v7e-8", "none of v5e, v5p, v6e, tpu7x; did you mean .*Known: v5e-1"),
        ("h100", "none of v5e"),
    ],
)
def test_an_unknown_name_lists_the_known(name, said):
    with pytest.raises(ValueError, match=said):
        chips.topology(name)


def test_every_listed_name_is_one():
    assert all(chips.topology(name).name == name for name in chips.known())


def test_facts_agree_with_jax():
    from jax.experimental.pallas import tpu as pltpu

    for name, version in (("v5e", "TPU_V5E"), ("v6e", "TPU_V6E")):
        info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], 1)
        chip = chips.CHIPS[name]
        assert chip.hbm_speed == pytest.approx(info.mem_bw_bytes_per_second, rel=0.01)
        assert chip.hbm == pytest.approx(info.hbm_capacity_bytes, rel=0.08)
