"""Mixtures of experts against a dense loop over experts in float64, and against Hugging Face's blocks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from minllm import spec
from minllm.layer import Context
from minllm.layers.mlp import GLU, MLP, Swish
from minllm.layers.moe import MoE, Router, utilisation

B, T, D, F = 2, 12, 16, 24


def parameters(layer, dtype=jnp.float32, seed=0):
    """Random ones, biases and corrections included."""
    keys = iter(jax.random.split(jax.random.key(seed), 40))
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape, a.dtype), spec.init(layer.params(D), next(keys), dtype))


def inputs(dtype=jnp.float32, seed=5):
    return jax.random.normal(jax.random.key(seed), (B, T, D), dtype)


def apply(layer, p, x, **ctx):
    return jax.jit(lambda p, x, ctx: layer.apply(p, x, ctx))(p, x, Context(**ctx))


# --- the dense loop -------------------------------------------------------------------------------------------------------------------


def loop(layer, p, x, room=None):
    """y of each token, one expert after the other, in plain NumPy; `room` an expert for each group of rows, first come first served."""
    r, p, x = layer.router, jax.tree.map(np.asarray, p), np.asarray(x)
    logits = x @ p["router"]["weight"] + p["router"].get("bias", 0.0)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    scores = e / e.sum(-1, keepdims=True) if r.score == "softmax" else 1 / (1 + np.exp(-logits))
    wanted = scores + p["router"].get("correction", 0.0)
    y, used = np.zeros_like(x), {}
    for t in range(T):
        for b in range(B):
            size = r.experts // r.groups
            worth = [np.sort(wanted[b, t, g * size : (g + 1) * size])[-r.group_top :].sum() for g in range(r.groups)]
            open_ = np.argsort(worth)[-r.active_groups :]
            order = sorted((i for i in range(r.experts) if i // size in open_), key=lambda i: -wanted[b, t, i])[: r.active]
            total = scores[b, t, order].sum() if r.renormalize else 1.0
            for i in order:
                place = used[b // layer.group, i] = used.get((b // layer.group, i), 0) + 1
                if room is None or place <= room:
                    own = jax.tree.map(lambda w: jnp.asarray(w[i]), p["experts"])
                    out = layer.expert.apply(own, jnp.asarray(x[b, t])[None, None], Context()).x[0, 0]
                    y[b, t] += r.scale * scores[b, t, i] / total * np.asarray(out)
    if layer.shared:
        z = np.asarray(layer.shared.apply(jax.tree.map(jnp.asarray, p["shared"]), jnp.asarray(x), Context()).x)
        y += z / (1 + np.exp(-(x @ p["shared_gate"]))) if layer.shared_gate else z
    return y


LAYERS = {
    "softmax": MoE(Router(4, 2), GLU(F)),
    "every expert": MoE(Router(4, 4, renormalize=False), MLP(F, bias=True)),
    "one, shared": MoE(Router(4, 1, renormalize=False, scale=1.7), GLU(F), shared=GLU(8), shared_gate=True),
    "sigmoid, groups": MoE(Router(8, 3, "sigmoid", scale=2.5, groups=4, active_groups=2, group_top=2, correction=True), GLU(F)),
    "biases": MoE(Router(4, 2, bias=True), GLU(F, Swish(1.702), bias=True, limit=0.5, shift=1.0)),
    "capacity": MoE(Router(4, 2), GLU(F, bias=True), capacity=0.5),
    "capacity of two rows": MoE(Router(4, 2), GLU(F), capacity=0.75, group=2),
    "more room than rows": MoE(Router(4, 2), GLU(F), capacity=4.0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_against_a_dense_loop_in_float64(name):
    """1e-10: both sides are float64."""
    layer = LAYERS[name]
    with jax.enable_x64(True):
        p, x = parameters(layer, jnp.float64), inputs(jnp.float64)
        share = layer.group * T * layer.router.active / layer.router.experts
        room = None if layer.capacity is None else int(np.ceil(share * layer.capacity))
        out = apply(layer, p, x)
        np.testing.assert_allclose(np.asarray(out.x), loop(layer, p, x, room), rtol=0, atol=1e-10)
        assert (float(out.stats["dropped"]) > 0) == (room is not None and layer.capacity < 1)
        assert float(out.stats["load"].sum()) == B * T * layer.router.active


def test_gradients_against_finite_differences():
    """In float64, along random directions, of a dropless and of a dropping layer: 1e-6 of central differences with steps of 1e-5."""
    for name in ("biases", "capacity"):
        layer = LAYERS[name]
        with jax.enable_x64(True):
            p, x = parameters(layer, jnp.float64), inputs(jnp.float64)
            f = jax.jit(lambda p, x: jnp.sin(layer.apply(p, x, Context()).x).sum())
            dp, dx = parameters(layer, jnp.float64, seed=1), inputs(jnp.float64, seed=6)
            step = lambda h: f(jax.tree.map(lambda a, d: a + h * d, p, dp), x + h * dx)
            grads = jax.grad(f, (0, 1))(p, x)
            slope = sum((g * d).sum() for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves((dp, dx))))
            assert abs((step(1e-5) - step(-1e-5)) / 2e-5 - slope) <= 1e-6 * max(1.0, abs(slope))


# --- Hugging Face ---------------------------------------------------------------------------------------------------------------------


def experts_of(module, interleaved=False):
    """(gate, up, down) of fused expert weights."""
    both = module.gate_up_proj.detach().numpy()
    if interleaved:  # gpt-oss keeps (in, out), gate and up taking turns
        return both[..., ::2], both[..., 1::2], module.down_proj.detach().numpy()
    gate, up = np.split(both, 2, 1)
    return gate.swapaxes(1, 2), up.swapaxes(1, 2), module.down_proj.detach().numpy().swapaxes(1, 2)


def glu_of(module):
    return {w: getattr(module, f"{w}_proj").weight.detach().numpy().T for w in ("gate", "up", "down")}


def hugging_face(name):
    """(their block, our layer, our parameters from theirs)."""
    eager = dict(experts_implementation="eager")
    sizes = dict(hidden_size=D, intermediate_size=F, moe_intermediate_size=F, hidden_act="silu", num_attention_heads=4)
    deep = dict(n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    few = dict(num_experts=4, num_experts_per_tok=2)
    block, layer = {
        "mixtral": lambda: (MixtralSparseMoeBlock(MixtralConfig(**sizes, **eager, num_local_experts=4)), MoE(Router(4, 2), GLU(F))),
        "qwen2": lambda: (Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**sizes, **eager, **few, shared_expert_intermediate_size=20)),
                          MoE(Router(4, 2, renormalize=False), GLU(F), shared=GLU(20), shared_gate=True)),
        "qwen3": lambda: (Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, **eager, **few, norm_topk_prob=True)), MoE(Router(4, 2), GLU(F))),
        "deepseek_v2": lambda: (DeepseekV2Moe(DeepseekV2Config(**sizes, **eager, **deep, topk_method="group_limited_greedy")),
                                MoE(Router(8, 3, renormalize=False, scale=2.5, groups=4, active_groups=2), GLU(F), shared=GLU(2 * F))),
        "deepseek_v3": lambda: (DeepseekV3MoE(DeepseekV3Config(**sizes, **eager, **deep, norm_topk_prob=True)),
                                MoE(Router(8, 3, "sigmoid", scale=2.5, groups=4, active_groups=2, group_top=2, correction=True), GLU(F),
                                    shared=GLU(2 * F))),
        "gpt_oss": lambda: (GptOssMLP(GptOssConfig(**sizes, **eager, num_local_experts=4, num_experts_per_tok=2)),
                            MoE(Router(4, 2, bias=True), GLU(F, Swish(1.702), bias=True, limit=7.0, shift=1.0))),
    }[name]()  # fmt: skip
    torch.manual_seed(0)
    for tensor in [*block.parameters(), *block.buffers()]:
        torch.nn.init.normal_(tensor, std=0.3)
    route = block.router if name == "gpt_oss" else block.gate
    p = {"router": {"weight": route.weight.detach().numpy().T}, "experts": dict(zip(("gate", "up", "down"), experts_of(block.experts)))}
    if name == "gpt_oss":
        bias = block.experts.gate_up_proj_bias.detach().numpy()
        p["experts"] = dict(zip(("gate", "up", "down"), experts_of(block.experts, interleaved=True)))
        p["experts"] |= {"gate_bias": bias[:, ::2], "up_bias": bias[:, 1::2], "down_bias": block.experts.down_proj_bias.detach().numpy()}
        p["router"] |= {"bias": route.bias.detach().numpy()}
    if name == "deepseek_v3":
        p["router"] |= {"correction": route.e_score_correction_bias.numpy()}
    if layer.shared:
        p["shared"] = glu_of(block.shared_expert if name == "qwen2" else block.shared_experts)
    if layer.shared_gate:
        p["shared_gate"] = block.shared_expert_gate.weight.detach().numpy().T
    return block, layer, jax.tree.map(jnp.asarray, p)


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_against_hugging_face(name):
    """Values to 1e-5 of the largest and the input's and router's gradients to 1e-4 in relative L2: the inventory's bars in float32."""
    block, layer, p = hugging_face(name)
    assert jax.tree.map(jnp.shape, p) == jax.tree.map(lambda s: s.shape, layer.params(D), is_leaf=spec.is_spec)
    x = np.array(inputs())
    t = torch.tensor(x, requires_grad=True)
    y = block(t)
    y = y[0] if isinstance(y, tuple) else y
    direction = np.random.default_rng(9).standard_normal(y.shape).astype(np.float32)
    route = block.router if name == "gpt_oss" else block.gate
    dx, dr = torch.autograd.grad(y, [t, route.weight], torch.tensor(direction))
    ours, vjp = jax.vjp(jax.jit(lambda p, x: layer.apply(p, x, Context()).x), p, jnp.asarray(x))
    dp, ours_dx = vjp(jnp.asarray(direction))
    y = y.detach().numpy()
    assert np.abs(np.asarray(ours) - y).max() <= 1e-5 * max(1.0, np.abs(y).max())
    for a, b in ((ours_dx, dx.numpy()), (dp["router"]["weight"].T, dr.numpy())):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-4 * np.linalg.norm(b)
    if name == "deepseek_v3":
        assert not np.asarray(dp["router"]["correction"]).any()


@pytest.mark.parametrize("padded", [False, True])
def test_balance_and_z_losses_are_those_of_hugging_face(padded):
    """Theirs counts every choice, so it is k times ours; padding counts for neither."""
    layer = MoE(Router(4, 2), GLU(F), balance=1.0, z_loss=1.0)
    p, x = parameters(layer), inputs()
    mask = np.ones((B, T), bool)
    if padded:
        mask[1, 7:] = False
    out = apply(layer, p, x, segments=jnp.asarray(mask, jnp.int32))
    logits = torch.tensor(np.asarray(layer.router.choose(p["router"], x)[0])).reshape(B * T, -1)
    theirs = load_balancing_loss_func((logits,), 4, 2, torch.tensor(mask) if padded else None)
    value, weight = out.losses["balance_loss"]
    np.testing.assert_allclose(2 * value / weight, theirs, rtol=1e-6)
    if not padded:
        value, weight = out.losses["router_z_loss"]
        np.testing.assert_allclose(value / weight, router_z_loss_func(logits.reshape(B, T, -1)), rtol=1e-6)


# --- balancing ------------------------------------------------------------------------------------------------------------------------


def test_an_even_router_has_a_balance_loss_of_one():
    layer = MoE(Router(4, 1), GLU(F), balance=1.0)
    p = parameters(layer)
    p["router"]["weight"] = jnp.eye(D)[:, :4] * 30.0
    x = jnp.tile(jnp.eye(D)[:4], (B, T // 4, 1))
    value, weight = apply(layer, p, x).losses["balance_loss"]
    np.testing.assert_allclose(value / weight, 1.0, rtol=1e-6)
    value, weight = apply(layer, p, jnp.ones_like(x) * jnp.eye(D)[0]).losses["balance_loss"]
    np.testing.assert_allclose(value / weight, 4.0, rtol=1e-6)  # all to one of four


def test_the_row_wise_loss_is_the_mean_over_rows():
    layer = MoE(Router(4, 2), GLU(F), balance=1.0, balance_over="row")
    p, x = parameters(layer), inputs()
    ratio = lambda out: float(out.losses["balance_loss"][0] / out.losses["balance_loss"][1])
    whole = ratio(apply(layer, p, x))
    np.testing.assert_allclose(whole, np.mean([ratio(apply(layer, p, x[b : b + 1])) for b in range(B)]), rtol=1e-6)
    assert abs(whole - ratio(apply(replace(layer, balance_over="batch"), p, x))) > 1e-4


def test_the_correction_evens_the_loads():
    """A skewed router: by steps of sign(mean load - load) the violation falls to a tenth; the gates never see the correction."""
    layer = MoE(Router(8, 2, "sigmoid", correction=True, rate=0.003), GLU(F))
    p = parameters(layer)
    p["router"]["weight"] += jnp.linspace(0, 0.5, 8)
    x = jax.random.normal(jax.random.key(3), (8, 64, D)) + 0.2

    @jax.jit
    def balanced(p, x):
        load = lambda p: layer.apply(p, x, Context()).stats
        last = jax.lax.fori_loop(0, 300, lambda _, p: layer.update(p, load(p)), p)
        return load(p)["load"], load(last)["load"]

    before, after = (float(utilisation(load)["violation"]) for load in balanced(p, x))
    assert before > 0.5 and after < 0.1 * before, (before, after)


def test_utilisation():
    even, skewed = utilisation(jnp.full(4, 6.0)), utilisation(jnp.asarray([12.0, 12.0, 0.0, 0.0]))
    np.testing.assert_allclose([even[k] for k in ("entropy", "violation", "idle")], [np.log(4), 0, 0], atol=1e-6)
    np.testing.assert_allclose([skewed[k] for k in ("entropy", "violation", "idle")], [np.log(2), 1, 0.5], atol=1e-6)


def test_padding_takes_no_room_and_no_part():
    layer = MoE(Router(4, 2), GLU(F), capacity=0.5)
    p, x = parameters(layer), inputs()
    there = jnp.where(jnp.arange(T) < 4, -1, jnp.arange(T))  # four padding tokens before the others
    other = x.at[:, :4].set(9.0)
    a, b = (apply(layer, p, v, positions=jnp.broadcast_to(there, (B, T))) for v in (x, other))
    np.testing.assert_array_equal(a.x[:, 4:], b.x[:, 4:])
    assert not np.asarray(a.x[:, :4]).any() and float(a.stats["load"].sum()) == B * (T - 4) * 2


# --- what is refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Router(8, 2, groups=3), "groups"),
    (lambda: Router(8, 5, groups=4, active_groups=2), "must hold at least 5"),
    (lambda: Router(4, 5), "cannot choose 5 of 4"),
    (lambda: MoE(Router(4, 2), GLU(F), capacity=0.0), "capacity"),
    (lambda: MoE(Router(4, 2), GLU(F), shared_gate=True), "shared"),
    (lambda: MoE(Router(4, 2), GLU(F), capacity=1.0, group=3).apply(parameters(LAYERS["softmax"]), inputs(), Context()), "groups of 3"),
])  # fmt: skip
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
