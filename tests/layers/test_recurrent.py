"""Recurrent layers against the layers of transformers that they are named after, and feature maps against what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minllm import spec
from minllm.layer import Context, Execution
from minllm.layers.carry import documents, remember
from minllm.layers.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention, unit
from minllm.layers.feature import Elu, Favor, Taylor
from minllm.layers.linear import Lightning, LinearAttention
from minllm.layers.lru import MinGRU, MinLSTM
from minllm.layers.ssm import Mamba, Mamba2
from minllm.sharding import make_mesh
from minllm_kernels import delta_rule, linear_attention

D, B, T = 16, 2, 70
POSITIONS = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))


def ready(layer):
    def draw():
        p = spec.init(layer.params(D), jax.random.key(0))
        return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), p)  # nothing at its neutral value

    return jax.jit(draw)()


def fill(module, **weights):
    for name, w in weights.items():
        part = module
        for step in name.split("__"):
            part = getattr(part, step)
        assert part.shape == np.shape(w), (name, part.shape, np.shape(w))
        part.data = torch.tensor(np.asarray(w))


def out(w):
    """(D, N, H) as (N H, D)."""
    return np.asarray(w).reshape(w.shape[0], -1).T


def taps(*w):
    """(W, N, H) each as one (channels, 1, W)."""
    return np.concatenate([np.asarray(a).reshape(len(a), -1).T for a in w])[:, None]


def compare(layer, p, theirs):
    """Values and the gradient in x."""
    x, dy = np.random.default_rng(0).normal(size=(2, B, T, D)).astype(np.float32)
    f = lambda x: layer.apply(p, x, Context(positions=POSITIONS)).x
    ours, grad = jax.jit(lambda x, dy: (f(x), jax.vjp(f, x)[1](dy)[0]))(x, dy)
    leaf = torch.tensor(x, requires_grad=True)
    y = theirs(leaf)
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(ours, y.detach(), rtol=0, atol=2e-5 * float(y.abs().max()))
    np.testing.assert_allclose(grad, leaf.grad, rtol=0, atol=2e-5 * float(leaf.grad.abs().max()))


def test_gated_delta_net_is_that_of_qwen3_next():
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    K, N, H, h = 2, 4, 8, 12
    layer = GatedDeltaNet(N, K, H, h)
    p = ready(layer)
    theirs = Qwen3NextGatedDeltaNet(Qwen3NextConfig(hidden_size=D, linear_num_key_heads=K, linear_num_value_heads=N, linear_key_head_dim=H,
                                                    linear_value_head_dim=h, num_hidden_layers=4), 0).eval()  # fmt: skip
    grouped = lambda w: np.asarray(w).reshape(D, K, -1)  # their rows go by key head: its q, its k, then the values and gates it serves
    fill(theirs, in_proj_qkvz__weight=np.concatenate([grouped(p[w]) for w in ("q", "k", "v", "gate")], -1).reshape(D, -1).T,
         in_proj_ba__weight=np.concatenate([grouped(p["beta"]), grouped(p["decay"]["weight"])], -1).reshape(D, -1).T,
         conv1d__weight=taps(p["q_conv"], p["k_conv"], p["v_conv"]), dt_bias=p["decay"]["bias"], A_log=p["decay"]["rate"],
         norm__weight=p["scale"], out_proj__weight=np.asarray(p["o"]).reshape(-1, D).T)  # fmt: skip
    compare(layer, p, theirs)


def test_kimi_delta_attention_is_that_of_kimi_linear():
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    N, H = 4, 8
    layer = KimiDeltaAttention(N, N, H)
    p = ready(layer)
    config = KimiLinearConfig(hidden_size=D, linear_num_heads=N, linear_head_dim=H, num_hidden_layers=2, num_local_experts=2,
                              layer_types=["linear_attention", "full_attention"], rms_norm_eps=1e-6)  # fmt: skip
    theirs = KimiLinearDeltaAttention(config, 0).eval()
    fill(theirs, q_proj__weight=out(p["q"]), k_proj__weight=out(p["k"]), v_proj__weight=out(p["v"]),
         conv1d__weight=taps(p["q_conv"], p["k_conv"], p["v_conv"]), b_proj__weight=np.asarray(p["beta"]).T,
         forget_gate__f_a_proj__weight=np.asarray(p["decay"]["down"]).T, forget_gate__f_b_proj__weight=out(p["decay"]["up"]),
         forget_gate__dt_bias=np.asarray(p["decay"]["bias"]).ravel(), forget_gate__A_log=np.asarray(p["decay"]["rate"]).reshape(1, 1, N, 1),
         g_a_proj__weight=np.asarray(p["gate"]["down"]).T, g_b_proj__weight=out(p["gate"]["up"]), o_norm__weight=p["scale"],
         o_proj__weight=np.asarray(p["o"]).reshape(-1, D).T)  # fmt: skip
    compare(layer, p, theirs)


def test_mamba_is_that_of_transformers():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    layer = Mamba(24, state=8, rank=4)
    p = ready(layer)
    theirs = MambaMixer(MambaConfig(hidden_size=D, intermediate_size=24, expand=1.5, state_size=8, time_step_rank=4), 0).eval()
    fill(theirs, in_proj__weight=np.concatenate([out(p["x"]), out(p["gate"])]), conv1d__weight=taps(p["conv"]), conv1d__bias=p["conv_bias"],
         x_proj__weight=np.concatenate([np.asarray(w).T for w in (p["step"]["down"], p["into"], p["out"])]),
         dt_proj__weight=np.asarray(p["step"]["up"]).T, dt_proj__bias=p["step"]["bias"], A_log=p["rate"], D=p["skip"],
         out_proj__weight=np.asarray(p["down"]).T)  # fmt: skip
    compare(layer, p, theirs)


def test_mamba2_is_that_of_transformers():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    N, h, G, S = 4, 8, 2, 8
    layer = Mamba2(N, h, S, G)
    p = ready(layer)
    theirs = Mamba2Mixer(Mamba2Config(hidden_size=D, num_heads=N, head_dim=h, n_groups=G, state_size=S, expand=2, chunk_size=16), 0).eval()
    c = p["conv"]
    fill(theirs, in_proj__weight=np.concatenate([out(p[w]) for w in ("gate", "x", "into", "out")] + [np.asarray(p["step"]["weight"]).T]),
         conv1d__weight=taps(c["x"], c["into"], c["out"]),
         conv1d__bias=np.concatenate([np.ravel(c[f"{w}_bias"]) for w in ("x", "into", "out")]),
         dt_bias=p["step"]["bias"], A_log=p["rate"], D=p["skip"], norm__weight=np.ravel(p["scale"]),
         out_proj__weight=np.asarray(p["o"]).reshape(-1, D).T)  # fmt: skip
    compare(layer, p, theirs)


def test_lightning_is_that_of_minimax():
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    N, H, layers = 4, 8, 3
    layer = Lightning(N, H, fade=1 - 1 / (layers - 1 + 1e-5) + 1e-5)
    p = ready(layer)
    config = MiniMaxConfig(hidden_size=D, num_attention_heads=N, num_key_value_heads=N, head_dim=H, num_hidden_layers=layers, block_size=32,
                           rms_norm_eps=1e-6, layer_types=["linear_attention"] * layers)  # fmt: skip
    theirs = MiniMaxLightningAttention(config, 1).eval()
    qkv = np.concatenate([np.asarray(p[w]) for w in ("q", "k", "v")], -1)  # head by head
    fill(theirs, qkv_proj__weight=out(qkv), out_proj__weight=np.asarray(p["o"]).reshape(-1, D).T, output_gate__weight=out(p["gate"]),
         norm__weight=np.ravel(p["scale"]))  # fmt: skip
    compare(layer, p, lambda x: theirs(x, (None, None), None)[0])


@pytest.mark.parametrize("feature", [Elu(), Taylor()], ids=["elu", "taylor"])
def test_linear_attention_is_the_masked_quadratic_form(feature):
    layer = LinearAttention(2, 8, feature)
    p = ready(layer)
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    q, k, v = (jnp.einsum("btd,dnh->bnth", x, p[w]) for w in ("q", "k", "v"))
    if isinstance(feature, Taylor):
        s = jnp.einsum("bnth,bnsh->bnts", q, k) * 8**-0.5
        weights = 1 + s + s * s / 2
    else:
        weights = jnp.einsum("bnth,bnsh->bnts", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
    weights = jnp.where(jnp.tril(jnp.ones((T, T), bool)), weights, 0)
    y = jnp.einsum("bnts,bnsh->bnth", weights / (weights.sum(-1, keepdims=True) + layer.eps), v)
    ours = layer.apply(p, x, Context(positions=POSITIONS)).x
    np.testing.assert_allclose(ours, jnp.einsum("bnth,nhd->btd", y, p["o"]), rtol=0, atol=1e-4)


def test_favor_estimates_the_softmax():
    """Unbiased, with an error that falls like M^-1/2: 16 times the features, a quarter of the error (0.15 to 0.4 allowed for the draw)."""
    q, k = (0.7 * jax.random.normal(jax.random.key(i), (1, 64, 1, 8)) for i in (1, 2))
    truth = jnp.exp(jnp.einsum("btnh,bsnh->ts", q, k) * 8**-0.5)
    errors = []
    for M in (64, 1024):
        feature = Favor(M)
        draws = []
        for seed in range(8):
            fq, fk = feature.apply(spec.init(feature.params(1, 8), jax.random.key(seed)), q, k)
            draws.append(jnp.einsum("btnm,bsnm->ts", fq, fk))
        errors.append(float(jnp.sqrt(jnp.mean((jnp.stack(draws) - truth) ** 2))))
        assert float(jnp.abs(jnp.stack(draws).mean(0) - truth).mean()) < 3 * errors[-1] / 8**0.5
    assert 0.15 < errors[1] / errors[0] < 0.4


def test_a_cache_begins_anew_at_position_0():
    """The slot of a finished sequence serves the next one."""
    layer = GatedDeltaNet(4, 2, 8)
    p, x = ready(layer), jax.random.normal(jax.random.key(1), (B, 6, D))
    cache = spec.init(layer.cache(D, B, T, jnp.float32), jax.random.key(0))
    first = layer.apply(p, x, Context(positions=POSITIONS[:, :6]), cache)
    again = layer.apply(p, x, Context(positions=POSITIONS[:, :6]), first.cache)
    np.testing.assert_array_equal(again.x, first.x)
    assert float(jnp.abs(layer.apply(p, x, Context(positions=POSITIONS[:, 6:12]), first.cache).x - first.x).max()) > 1e-3


def test_unit_length_has_a_gradient_at_zero():
    assert bool(jnp.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros(4))).all())


def test_head_counts_are_checked():
    with pytest.raises(ValueError, match="4 value heads for 3 kv_heads"):
        DeltaNet(4, 3, 8)
    with pytest.raises(ValueError, match="4 heads for 3 groups"):
        Mamba2(4, groups=3)
    with pytest.raises(ValueError, match="floor of the log decay is 1"):
        KimiDeltaAttention(4, 4, 8, floor=1.0)


@pytest.mark.parametrize("op", [linear_attention, delta_rule], ids=["linear", "delta"])
def test_a_sharded_sequence_carries_its_memory(op):
    """Over four shards: y, the memory after the last token and every gradient, through a state that goes in and documents that end on,
    before and after the edge of a shard, and one shard without any token."""
    r = np.random.default_rng(0)
    N, H, n = 2, 4, 32
    q, k, v = (r.normal(size=(2, n, N, H)).astype(np.float32) for _ in range(3))
    gates = [-np.exp(r.normal(size=(2, n, N, H)) - 2).astype(np.float32)]
    if op is delta_rule:
        k, gates = k / np.linalg.norm(k, axis=-1, keepdims=True), [r.uniform(size=(2, n, N)).astype(np.float32), *gates]
    state = r.normal(size=(2, N, H, H)).astype(np.float32)
    segments = np.stack([np.repeat([1, 2, 3, 0], [8, 5, 7, 12]), np.repeat([1, 2], [19, 13])])
    dy, dafter = r.normal(size=v.shape) * (segments > 0)[..., None, None], r.normal(size=state.shape)

    def run(mesh):
        ctx = Context(positions=jnp.where(segments > 0, 1, -1), segments=jnp.asarray(segments), run=Execution(mesh=mesh))

        def loss(q, k, v, gates, state):
            y, after = remember(op, q, k, v, *gates, state=state, ctx=ctx)
            return (y * dy).sum() + (after * dafter).sum(), (y * (segments > 0)[..., None, None], after)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(q, k, v, gates, state)

    assert int(documents(Context(positions=jnp.array([[-1, 0]])))[0, 0]) == 0
    for a, b in zip(jax.tree.leaves(run(make_mesh(jax.devices()[:4], context=4))), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("layer", [MinGRU(6), MinLSTM(6)])
def test_minimal_units(layer):
    """The formulas of arXiv 2410.01201, token by token in float64."""
    p, x = ready(layer), np.random.default_rng(0).normal(size=(B, T, D))
    ours = jax.jit(lambda x: layer.apply(p, x, Context(positions=POSITIONS)).x)(jnp.asarray(x, jnp.float32))
    w = {name: np.asarray(a, np.float64) for name, a in p.items()}
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    gate = lambda name: sigmoid(x @ w[name] + w[f"{name}_bias"])
    keep, take = 1 - gate("forget"), gate("forget")
    if isinstance(layer, MinLSTM):
        keep, take = (g / (gate("forget") + gate("input")) for g in (gate("forget"), gate("input")))
    h, rows = np.zeros((B, 6)), []
    for t in range(T):
        h = keep[:, t] * h + take[:, t] * (x[:, t] @ w["x"])
        rows.append(h @ w["down"])
    np.testing.assert_allclose(ours, np.stack(rows, 1), rtol=0, atol=1e-5)
