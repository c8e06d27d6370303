"""Law 8 for T5 and T5 v1.1: logits, gradients, padding of the source, decoding with both caches, and the files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from minllm import spec
from minllm.interop import hf, safetensors
from minllm.interop.table import pick, tensors
from minllm.layer import Context
from minllm.models import family
from minllm.weights import unstack

VOCAB = 97


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def pair(request, tmp_path_factory):
    """Both with a tied head, as `transformers` builds them today; the untied head of v1.1 is Llama's."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=64, d_kv=12, d_ff=96, num_layers=2, num_decoder_layers=3, num_heads=4,
                      relative_attention_num_buckets=8, relative_attention_max_distance=40, feed_forward_proj=request.param,
                      decoder_start_token_id=0)  # fmt: skip
    theirs = T5ForConditionalGeneration(config).eval()
    for name, p in theirs.named_parameters():
        gain = "layer_norm" in name
        # scores are not divided by sqrt(H): small queries keep the softmax soft
        torch.nn.init.normal_(p, *((1.0, 0.3) if gain else (0.0, (0.2 if ".q." in name else 0.75) * p.shape[-1] ** -0.5)))
    torch.nn.init.normal_(theirs.shared.weight, 0.0, 1.0)
    folder = tmp_path_factory.mktemp("t5") / request.param
    theirs.save_pretrained(folder)
    return theirs, folder, *hf.load(folder)


def inputs(S, T):
    """Two rows, the second source shorter."""
    random = np.random.default_rng(T)
    mask = np.ones((2, S), np.int32)
    mask[1, S - S // 3 :] = 0
    return random.integers(1, VOCAB, (2, S)), mask, random.integers(1, VOCAB, (2, T))


def run(model, params, source, mask, target):
    source, target = jnp.asarray(source), jnp.asarray(target)
    ctx = model.encode(params, source, Context(positions=jnp.where(mask > 0, jnp.arange(source.shape[1]), -1)))
    return model.apply(params, target, ctx).x


@pytest.mark.parametrize("S, T", [(5, 7), (65, 40), (700, 130)])
def test_logits(pair, S, T):
    """2e-5 for logits of size one, past the last bucket on both sides."""
    theirs, _, model, params = pair
    source, mask, target = inputs(S, T)
    with torch.no_grad():
        expected = theirs(torch.tensor(source), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(target)).logits.numpy()
    ours = np.asarray(jax.jit(lambda p: run(model, p, source, mask, target))(params))
    assert np.abs(ours - expected).max() <= 2e-5 and np.abs(expected).max() > 0.5


@pytest.mark.parametrize("pair", ["relu", pytest.param("gated-gelu", marks=pytest.mark.nightly)], indirect=True)
def test_decoding(pair):
    """The source is encoded once; then the cache alone knows it. 1e-5: the inventory's bar for cached against full."""
    _, _, model, params = pair
    source, mask, target = inputs(33, 9)
    full = np.asarray(run(model, params, source, mask, target))
    source, target = jnp.asarray(source), jnp.asarray(target)
    loose, step = unstack(params), jax.jit(model.apply)
    ctx = model.encode(params, source, Context(positions=jnp.where(mask > 0, jnp.arange(33), -1)))
    cache = spec.init(model.cache(2, 40), jax.random.key(0))
    out = step(loose, target[:, :4], ctx.replace(positions=jnp.tile(jnp.arange(4), (2, 1))), cache)
    parts = [out.x]
    for t in range(4, 9):
        out = step(loose, target[:, t : t + 1], Context(positions=jnp.full((2, 1), t)), out.cache)
        parts.append(out.x)
    assert np.abs(np.concatenate(parts, 1) - full).max() <= 1e-5
    with pytest.raises(ValueError, match="the memory has 33 tokens, the cache room for 20; make it for the longer of both"):
        small = spec.init(model.cache(2, 20), jax.random.key(0))
        model.apply(loose, target[:, :4], ctx.replace(positions=jnp.tile(jnp.arange(4), (2, 1))), small)
    with pytest.raises(ValueError, match=r"needs ctx\.memory, or a cache"):
        model.apply(params, target, Context())


@pytest.mark.parametrize("pair", ["relu", pytest.param("gated-gelu", marks=pytest.mark.nightly)], indirect=True)
def test_gradients(pair):
    """1e-4 in relative L2 for each tensor, the shared tables of distances included."""
    theirs, _, model, params = pair
    source, mask, target = inputs(65, 60)
    wanted = np.roll(target, -1, 1)

    def loss(p):
        logits = run(model, p, source, mask, target)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], -1).mean()

    ours = jax.jit(jax.grad(loss))(params)
    logits = theirs(torch.tensor(source), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(target)).logits
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(wanted).flatten()).backward()
    named = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for tensor in tensors(model, family("t5").rows(model)):
        mine = tensor.pattern.join([np.asarray(pick(ours, one)) for one in tensor.targets])
        assert np.linalg.norm(mine - named[tensor.name]) <= 1e-4 * np.linalg.norm(named[tensor.name]), tensor.name


def test_round_trip(pair, tmp_path):
    theirs, folder, model, params = pair
    hf.save(tmp_path / "out", model, params)
    before, after = safetensors.stored(folder), safetensors.stored(tmp_path / "out")
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        assert tensor.read().tobytes() == after[name].read().tobytes(), name
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    for (name, a), (other, b) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name


def test_packed_rows_are_refused(pair):
    _, _, model, params = pair
    source, target = (jnp.asarray(x) for x in inputs(5, 4)[::2])
    ctx = model.encode(params, source, Context()).replace(segments=jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="a packed row has no one memory"):
        model.apply(params, target, ctx)
