"""Law 8 for Mixtral: the logits, auxiliary loss and gradients of Hugging Face's model; and the published parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from minllm import spec
from minllm.layer import Context
from minllm.models import build
from minllm.weights import Stacked

D, LAYERS, HEADS, KV, F, VOCAB, E = 64, 2, 4, 2, 48, 97, 4


@pytest.fixture(scope="module")
def theirs():
    config = MixtralConfig(
        hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV, intermediate_size=F, vocab_size=VOCAB,
        num_local_experts=E, num_experts_per_tok=2, rms_norm_eps=1e-5, max_position_embeddings=1024, use_cache=False,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, experts_implementation="eager", sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    for name, p in model.named_parameters():  # logits of size one
        torch.nn.init.normal_(p, *((1.0, 0.3) if "norm" in name else (0.0, 0.75 * p.shape[-1] ** -0.5)))
    return model


def from_hf(weights):
    """Our tree of Hugging Face's state dict. Linear, so it maps gradients too."""
    w = {name.removeprefix("model."): np.asarray(a) for name, a in weights.items()}
    stacked = lambda name: np.stack([w[f"layers.{i}.{name}"] for i in range(LAYERS)])
    into = lambda name, n: stacked(f"self_attn.{name}.weight").swapaxes(1, 2).reshape(LAYERS, D, n, -1)
    attention = {"q": into("q_proj", HEADS), "k": into("k_proj", KV), "v": into("v_proj", KV),
                 "o": stacked("self_attn.o_proj.weight").swapaxes(1, 2).reshape(LAYERS, HEADS, -1, D)}  # fmt: skip
    gate, up = np.split(stacked("mlp.experts.gate_up_proj").swapaxes(2, 3), 2, -1)
    experts = {"gate": gate, "up": up, "down": stacked("mlp.experts.down_proj").swapaxes(2, 3)}
    moe = {"router": {"weight": stacked("mlp.gate.weight").swapaxes(1, 2)}, "experts": experts}
    norm = lambda name: {"scale": stacked(f"{name}.weight")}
    trunk = Stacked(({"norm": norm("input_layernorm"), "inner": attention}, {"norm": norm("post_attention_layernorm"), "inner": moe}))
    return {"embed": w["embed_tokens.weight"], "trunk": (trunk,), "norm": {"scale": w["norm.weight"]}, "head": w["lm_head.weight"].T}


@pytest.mark.parametrize("T", [5, 640])
def test_logits_and_gradients_are_those_of_hugging_face(theirs, T):
    """2e-5 for logits of size one and 1e-4 in relative L2 for gradients, the inventory's bars in float32."""
    model = build("mixtral", D=D, layers=LAYERS, heads=HEADS, kv_heads=KV, hidden=F, vocab=VOCAB, experts=E)
    p = jax.tree.map(jnp.asarray, from_hf({name: a.detach().numpy() for name, a in theirs.state_dict().items()}))
    assert jax.tree.map(jnp.shape, p) == jax.tree.map(lambda s: s.shape, model.params(), is_leaf=spec.is_spec)
    tokens = np.random.default_rng(T).integers(0, VOCAB, (2, T))
    logits = theirs(torch.tensor(tokens)).logits
    direction = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    theirs.zero_grad()
    (logits * torch.tensor(direction)).sum().backward()
    ours, vjp = jax.vjp(lambda p: model.apply(p, jnp.asarray(tokens), Context()).x, p)
    assert np.abs(np.asarray(ours) - logits.detach().numpy()).max() <= 2e-5
    (grads,) = vjp(jnp.asarray(direction))
    want = from_hf({name: a.grad.numpy() for name, a in theirs.named_parameters()})
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-4 * np.linalg.norm(b), spec.path_name(path)


@pytest.mark.parametrize(("preset", "count"), [
    ("8x7b", 46_702_792_704),
    ("8x22b", 140_630_071_296),         # with the 32,768 tokens of Instruct v0.1 and v0.3
])
def test_published_parameter_counts(preset, count):
    assert spec.count(build("mixtral", preset).params()) == count


def test_flops_count_the_chosen_experts():
    """12.9 billion active parameters of 8x7b (arXiv 2401.04088, table 2: 13B), the embedding not multiplied by."""
    model = build("mixtral", "8x7b")
    attention = 3 * 32 * 4 * 32 * 128 * (4096 + 1) / 2
    active = (model.flops(4096) - attention) / 6 + 32_000 * 4096
    assert 12.8e9 < active < 12.95e9
