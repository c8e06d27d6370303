"""PyTorch beside JAX: shared memory, gradients through the bridge, and a cross check that finds what is wrong."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import minllm
from minllm.interop.torch import as_torch, cross_check, to_jax, to_torch
from minllm.layer import Context
from minllm.layers.position import Rope
from minllm.models.llama import llama3
from minllm.weights import Stacked
from minllm_kernels import attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_without_a_copy(dtype):
    t = torch.arange(4096).reshape(64, 64).remainder(7).to(dtype)
    a = to_jax(t)
    assert a.shape == (64, 64) and str(a.dtype) == str(dtype).removeprefix("torch.")
    assert a.unsafe_buffer_pointer() == t.data_ptr() and to_torch(a).data_ptr() == t.data_ptr()
    assert torch.equal(to_torch(a), t)
    b = jnp.arange(4096).reshape(64, 64).astype(a.dtype)
    assert to_torch(b).data_ptr() == b.unsafe_buffer_pointer()
    assert np.array_equal(np.asarray(to_jax(to_torch(b)), np.float32), np.asarray(b, np.float32))


def test_what_cannot_be_shared_is_copied():
    t = torch.arange(4096, dtype=torch.float32).reshape(64, 64)
    for view in (t.T, t[:, 3:], t.flatten()[1:], t[:0], torch.tensor(2.0)):
        assert np.array_equal(to_jax(view), view.numpy())


def test_wide_numbers_are_not_rounded_silently():
    with pytest.raises(ValueError, match="jax_enable_x64 is off"):
        to_jax(torch.arange(3))
    with jax.enable_x64(True):
        assert to_jax(torch.arange(3)).dtype == jnp.int64


def heads(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck_of_an_op():
    """torch's own check by finite differences, in float64, of our attention with its custom gradient; positions are integers."""
    at = torch.arange(5)[None].expand(2, 5)
    op = as_torch(lambda q, k, v, at: attention(q, k, v, q_pos=at, kv_pos=at))
    with jax.enable_x64(True):
        assert torch.autograd.gradcheck(lambda *qkv: op(*qkv, at), (heads(2, 5, 2, 4), heads(2, 5, 1, 4), heads(2, 5, 1, 4)), atol=1e-6)


def test_trees_numbers_and_integers_pass_through():
    def f(tree, scale):
        return {"y": tree["x"] * scale, "most": tree["x"].argmax(), "n": tree["n"] + 1}

    g, x = as_torch(f), torch.randn(4, requires_grad=True)
    out = g({"x": x, "n": torch.tensor([3], dtype=torch.int32)}, 2.5)
    assert out["most"].item() == x.argmax().item() and out["n"].tolist() == [4] and not out["most"].requires_grad
    (out["y"] * torch.arange(4.0)).sum().backward()
    assert torch.allclose(x.grad, 2.5 * torch.arange(4.0))
    with torch.no_grad():
        assert not g({"x": x, "n": torch.tensor([3], dtype=torch.int32)}, 2.5)["y"].requires_grad


def test_only_what_is_wanted_gets_a_gradient():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3)
    y, unused = as_torch(lambda a, b: (a * b, a.sum()))(a, b)
    y.sum().backward()
    assert torch.equal(a.grad, b) and b.grad is None


def test_an_input_that_was_written_to_is_an_error():
    x = torch.randn(64, requires_grad=True) * 1.0
    y = as_torch(lambda x: x * x)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_it_is_compiled_once():
    traces = []
    f = as_torch(lambda x: (traces.append(1), x * 2)[1])
    for _ in range(4):
        f(torch.ones(3, requires_grad=True)).sum().backward()
    assert len(traces) == 1


def test_a_model_learns_in_a_torch_loop():
    """Parameters in torch, the model in JAX: torch's AdamW takes the loss down."""
    model = llama3(D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64, scaling=None)
    leaves, structure = jax.tree.flatten(minllm.init(model, jax.random.key(0)))
    params = [torch.nn.Parameter(to_torch(a).clone()) for a in leaves]
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    apply = as_torch(lambda p, x: model.apply(jax.tree.unflatten(structure, p), x, Context()).x)
    adam, losses = torch.optim.AdamW(params, lr=1e-2), []
    for _ in range(8):
        logits = apply(params, tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].long().flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


# --- cross check ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    config = LlamaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                         vocab_size=64, use_cache=False, rms_norm_eps=1e-5,
                         rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    w = {name: jnp.asarray(p.detach().numpy()) for name, p in theirs.named_parameters()}
    row = lambda name: jnp.stack([w[f"model.layers.{i}.{name}.weight"] for i in range(3)])
    into = lambda name: row(name).swapaxes(1, 2)
    attend = {x: into(f"self_attn.{x}_proj").reshape(3, 32, -1, 8) for x in "qkv"} | {"o": into("self_attn.o_proj").reshape(3, 4, 8, 32)}
    feed = {x: into(f"mlp.{x}_proj") for x in ("gate", "up", "down")}
    trunk = tuple({"norm": {"scale": row(f"{norm}_layernorm")}, "inner": inner}
                  for norm, inner in (("input", attend), ("post_attention", feed)))  # fmt: skip
    params = {"embed": w["model.embed_tokens.weight"], "trunk": (Stacked(trunk),), "norm": {"scale": w["model.norm.weight"]},
              "head": w["lm_head.weight"].T}  # fmt: skip
    return llama3(32, 3, 4, 2, 48, 64, 10_000.0, None), params, theirs


TOKENS = np.random.default_rng(0).integers(0, 64, (2, 65))


def test_equal_models(pair):
    found = cross_check(*pair, TOKENS)
    assert found.parted is None and len(found.places) == 5 and "equal to 1e-04" in str(found)


def test_the_wrong_weight_is_found(pair):
    """A wrong weight in layer 1 is layer 1's alone: layer 2 inherits the error, and is right by itself."""
    model, params, theirs = pair
    up = params["trunk"][0].pattern[1]["inner"]["up"].at[1, 0, 0].add(5.0)
    feed = params["trunk"][0].pattern[1]
    wrong = params | {"trunk": (Stacked((params["trunk"][0].pattern[0], feed | {"inner": feed["inner"] | {"up": up}})),)}
    found = cross_check(model, wrong, theirs, TOKENS)
    assert found.parted.name == "layer 1" and found.places[3].error > 1e-3 > 1e-4 > found.places[3].alone
    (attend, near_attend, error), (feed, near_feed, feed_error) = found.inside
    assert (attend, near_attend) == ("Attention", "self_attn") and error < 1e-4
    assert (feed, near_feed) == ("GLU", "mlp") and feed_error > 1e-4
    assert "layer 1" in next(line for line in str(found).splitlines() if "they part here" in line)


def test_a_wrong_rotation_is_found_in_the_first_layer(pair):
    model, params, theirs = pair
    block = model.trunk[0].pattern
    turned = replace(block[0], inner=replace(block[0].inner, position=Rope(pairs="neighbours")))
    found = cross_check(replace(model, trunk=(replace(model.trunk[0], pattern=(turned, block[1])),)), params, theirs, TOKENS)
    assert found.parted.name == "layer 0" and found.inside[0][2] > 1e-4 > found.inside[1][2]


def test_wrong_ends_are_found(pair):
    model, params, theirs = pair
    assert cross_check(model, params | {"embed": params["embed"] * 1.01}, theirs, TOKENS).parted.name == "embedding"
    assert cross_check(model, params | {"head": params["head"] * 1.01}, theirs, TOKENS).parted.name == "logits"
    with pytest.raises(ValueError, match="no list of layers"):
        cross_check(model, params, torch.nn.Linear(2, 2), TOKENS)
