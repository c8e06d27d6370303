"""Specs: what is derived from one declaration, and initial values that depend on nothing but their own path."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import spec
from minllm.models.llama import llama3
from minllm.sharding import ALL, make_mesh, shardings
from minllm.spec import Constant, FanIn, Normal, Ones, Spec, TruncatedNormal, Zeros

KEY = jax.random.key(0)


def draw(shape, axes, init, **more):
    return np.asarray(spec.init({"w": Spec(shape, axes, init, **more)}, KEY)["w"], np.float64)


@pytest.mark.parametrize("shape, axes, init, std", [
    ((300, 400), "embed -> mlp", Normal(), 0.02),
    ((300, 400), "embed -> mlp", Normal(0.7), 0.7),
    ((300, 400), "embed -> mlp", TruncatedNormal(), 0.02),
    ((300, 400), "embed -> mlp", TruncatedNormal(3.0), 3.0),
    ((300, 400), "embed -> mlp", FanIn(), 300**-0.5),
    ((300, 400), "embed -> mlp", FanIn(0.25), 0.25 * 300**-0.5),
    ((300, 8, 50), "embed -> heads head", FanIn(), 300**-0.5),
    ((8, 50, 300), "heads head -> embed", FanIn(), 400**-0.5),
    ((6, 100, 200), "experts embed -> mlp", FanIn(), 100**-0.5),
    ((3, 100, 400), "layers embed -> mlp", FanIn(), 100**-0.5),
    ((3, 4, 100, 100), "layers experts embed -> mlp", FanIn(), 100**-0.5),
], ids=lambda x: str(x))  # fmt: skip
def test_standard_deviations(shape, axes, init, std):
    """2 %: the inventory's bar; 120,000 numbers have a spread of 0.2 %."""
    x = draw(shape, axes, init)
    assert abs(x.std() / std - 1) <= 0.02 and abs(x.mean()) <= 4 * std / math.sqrt(x.size)
    if isinstance(init, TruncatedNormal | FanIn):
        assert 1.9 * std < np.abs(x).max() <= 2 * std / 0.8796


def test_constants():
    assert (draw((3, 4), "embed -> mlp", Zeros()) == 0).all() and (draw((3,), "_", Ones()) == 1).all()
    assert (draw((2, 5), "layers _", Constant(-1), dtype=jnp.int32) == -1).all()


def test_a_leaf_depends_on_no_other_leaf():
    w, other = Spec((4, 5), "embed -> mlp", FanIn()), Spec((3,), "_", Normal())
    alone = spec.init({"block": {"w": w}}, KEY)["block"]["w"]
    among = spec.init({"a": other, "block": {"v": w, "w": w, "x": (other, w)}, "z": w}, KEY)
    assert (among["block"]["w"] == alone).all()
    leaves = [among["block"]["w"], among["block"]["v"], among["block"]["x"][1], among["z"]]
    assert all((a != b).all() for i, a in enumerate(leaves) for b in leaves[:i])  # the same declaration elsewhere is another draw
    assert (spec.init({"block": {"w": w}}, jax.random.key(1))["block"]["w"] != alone).all()


def test_a_layer_depends_on_no_depth():
    one = {"w": Spec((4, 5), "embed -> mlp", FanIn()), "gain": Spec((4,), "_", Normal()), "scalar": Spec((), "", Normal())}
    two, five = (spec.init(spec.stack(one, n), KEY) for n in (2, 5))
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(five)):
        assert a.shape[0] == 2 and (a == b[:2]).all() and len(np.unique(np.asarray(b))) == b.size


def test_a_deeper_model_begins_with_the_shallower_ones_layers():
    shape = dict(D=16, heads=2, kv_heads=1, hidden=24, vocab=11)
    small, large = (llama3(layers=n, **shape) for n in (2, 5))
    a, b = (spec.init(m.params(), KEY) for m in (small, large))
    assert (a["embed"] == b["embed"]).all() and (a["head"] == b["head"]).all()
    x, y = a["trunk"][0].pattern, b["trunk"][0].pattern
    assert (x[0]["inner"]["q"] == y[0]["inner"]["q"][:2]).all() and (x[1]["inner"]["up"] == y[1]["inner"]["up"][:2]).all()
    # only the scale of what is added to the residual stream follows the depth
    assert jnp.abs(x[1]["inner"]["down"] * (2 / 5) ** 0.5 - y[1]["inner"]["down"][:2]).max() <= 1e-6


def test_a_mesh_changes_no_initial_value():
    specs, mesh = llama3(D=16, layers=2, heads=4, kv_heads=2, hidden=32, vocab=24).params(), make_mesh(fsdp=2, tensor=4)
    sharded = jax.jit(lambda key: spec.init(specs, key), out_shardings=shardings(specs, mesh, ALL))(KEY)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(spec.init(specs, KEY))):
        assert jnp.abs(a - b).max() <= 1e-6 * jnp.abs(b).max()  # the same bits, compiled with and without fused multiply-adds
    assert len(sharded["embed"].sharding.device_set) == 8


def test_abstract_is_what_init_gives():
    specs = {"w": Spec((4, 5), "embed -> mlp", FanIn()), "pos": Spec((2, 3), "batch kv_seq", Constant(-1), role="buffer", dtype=jnp.int32)}
    for dtype in (jnp.float32, jnp.bfloat16):
        real, declared = spec.init(specs, KEY, dtype), spec.abstract(specs, dtype)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), real) == jax.tree.map(lambda a: (a.shape, a.dtype), declared)
        assert real["w"].dtype == dtype and real["pos"].dtype == jnp.int32


def test_the_matrix_of_a_spec():
    moe = Spec((2, 6, 10, 4, 5), "layers experts embed -> heads head")
    assert moe.names == ("layers", "experts", "embed", "heads", "head")
    assert moe.matrix == ((0, 1), (2,), (3, 4)) and moe.fan_in == 10 and moe.size == 2400
    assert Spec((4, 5, 10), "heads head -> embed").fan_in == 20
    with pytest.raises(ValueError, match="write an arrow from its inputs to its outputs"):
        _ = Spec((4, 5), "vocab embed").fan_in


def test_a_spec_is_a_value():
    a, b = (Spec((4, 5), "embed -> mlp", FanIn(0.5)) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != replace(a, init=FanIn(0.4)) and Zeros() == Constant(0.0)
    assert a.matrix == b.matrix and a == b  # what is cached is no part of it


def test_axes_must_name_each_dim():
    with pytest.raises(ValueError, match=r"name 2 dims, the shape \(4, 5, 6\) has 3"):
        Spec((4, 5, 6), "embed -> mlp")


def test_count_leaves_out_buffers():
    specs = {"w": Spec((4, 5), "embed -> mlp"), "state": Spec((100,), "_", role="buffer")}
    assert spec.count(specs) == 20 and spec.count(spec.stack(specs, 3)) == 60


def test_part_and_join_are_inverse():
    specs = {"w": Spec((4, 5), "embed -> mlp", FanIn()), "b": (Spec((3,), "_", Normal(), role="buffer"), Spec((2,), "_", Ones()))}
    p = spec.init(specs, KEY)
    trained, kept = spec.part(specs, p)
    assert trained["b"][0] is None and kept["w"] is None and kept["b"][0] is p["b"][0]
    joined = spec.join(trained, kept)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, joined, p))


def test_names_of_leaves():
    specs = llama3(D=16, layers=2, heads=2, kv_heads=1, hidden=24, vocab=11, tied=True).params()
    names = [spec.path_name(path) for path, _ in jax.tree.leaves_with_path(specs, is_leaf=spec.is_spec)]
    assert "embed" in names and "norm/scale" in names and "trunk/0/pattern/1/inner/gate" in names and len(set(names)) == len(names)
