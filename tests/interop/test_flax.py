"""minllm models as NNX modules: the same numbers, trained by a plain NNX loop, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import EXAMPLES
from flax import nnx

import minllm
from minllm import spec
from minllm.interop.flax import Buffer, Module
from minllm.layer import Context
from minllm.lora import Adapted, LoRA
from minllm.models.llama import llama3
from minllm.models.transformer import Decoder

TOKENS = jax.random.randint(jax.random.key(2), (4, 17), 0, 64)


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if isinstance(example.layer, Decoder)])
def test_every_model_and_back(name):
    example = EXAMPLES[name]
    params = example.params()
    module = Module(example.layer, params)
    back = module.params()
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)))
    x = example.inputs(2, 9)
    assert np.array_equal(module(x).x, minllm.apply(example.layer, params, x).x)
    size = sum(a.size for a in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert size == spec.count(example.specs)


def test_a_plain_nnx_loop_trains():
    model = llama3(D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64, scaling=None, dropout=0.1)
    module = Module(model, minllm.init(model, jax.random.key(0)))
    optimizer = nnx.Optimizer(module, optax.adamw(1e-2), wrt=nnx.Param)
    rngs = nnx.Rngs(dropout=1)

    @nnx.jit
    def step(module, optimizer, rngs, tokens):
        def loss(module, rngs):
            logits = module(tokens[:, :-1], rngs=rngs).x
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(module, rngs)
        optimizer.update(module, grads)
        return value

    losses = [float(step(module, optimizer, rngs, TOKENS)) for _ in range(12)]
    assert losses[-1] < losses[0] - 1
    logits = minllm.apply(model, module.params(), TOKENS).x
    assert np.abs(np.asarray(logits) - np.asarray(module(TOKENS).x)).max() == 0


def test_buffers_are_not_params():
    """LoRA's base weights are buffers: no gradient, no optimizer state."""
    model = llama3(D=32, layers=1, heads=4, kv_heads=2, hidden=48, vocab=64, scaling=None)
    lora = LoRA(rank=2)
    adapted = lora.wrap(model.params(), minllm.init(model, jax.random.key(0)), jax.random.key(1))
    module = Module(Adapted(model, lora), adapted)
    assert len(jax.tree.leaves(nnx.state(module, Buffer))) and len(jax.tree.leaves(nnx.state(module, nnx.Param)))
    grads = nnx.grad(lambda m: (m(TOKENS).x ** 2).mean())(module)
    assert len(jax.tree.leaves(grads)) == len(jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_it_decodes_with_a_cache():
    model = llama3(D=32, layers=1, heads=4, kv_heads=2, hidden=48, vocab=64, scaling=None)
    module = Module(model, minllm.init(model, jax.random.key(0)))
    cache = spec.init(model.cache(4, 17), jax.random.key(0))
    positions = jnp.broadcast_to(jnp.arange(17), (4, 17))
    out = module(TOKENS[:, :9], Context(positions=positions[:, :9]), cache)
    rest = module(TOKENS[:, 9:], Context(positions=positions[:, 9:]), out.cache)
    whole = module(TOKENS).x
    assert np.abs(np.concatenate([out.x, rest.x], 1) - np.asarray(whole)).max() < 1e-5
