"""Law 8 for BERT: hidden states, both heads, gradients, padding and text parts against Hugging Face, and the files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from minllm.interop import hf, safetensors
from minllm.interop.table import pick, tensors
from minllm.layer import Context
from minllm.models import family

VOCAB = 97
CLASSES = {"BertModel": BertModel, "BertForMaskedLM": BertForMaskedLM, "BertForPreTraining": BertForPreTraining}


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                        max_position_embeddings=700, pad_token_id=None, attn_implementation="eager")  # fmt: skip
    theirs = CLASSES[request.param](config).eval()
    for name, p in theirs.named_parameters():
        gain = "LayerNorm.weight" in name
        torch.nn.init.normal_(p, *((1.0, 0.3) if gain else (0.0, 0.3 if p.ndim == 1 else 0.75 * p.shape[-1] ** -0.5)))
    folder = tmp_path_factory.mktemp("bert") / request.param
    theirs.save_pretrained(folder)
    return theirs, folder, *hf.load(folder)


def inputs(T):
    """Two rows, the second shorter; the second half of each of the second kind."""
    random = np.random.default_rng(T)
    tokens, mask = random.integers(0, VOCAB, (2, T)), np.ones((2, T), np.int32)
    mask[1, T - T // 3 :] = 0
    types = (np.arange(T) >= T // 2).astype(np.int32) * np.ones((2, 1), np.int32)
    return tokens, types, mask


@pytest.mark.parametrize("T", [5, 65, 700])
def test_values(pair, T):
    """2e-5 for values of size one, where there is a token."""
    theirs, _, model, params = pair
    tokens, types, mask = inputs(T)
    with torch.no_grad():
        given = dict(attention_mask=torch.tensor(mask), token_type_ids=torch.tensor(types), output_hidden_states=True)
        found = theirs(torch.tensor(tokens), **given)
    ctx = Context(positions=jnp.where(mask > 0, jnp.arange(T), -1))

    @jax.jit
    def ours(p, x):
        h = model.hidden(p, x, ctx, jnp.asarray(types)).x
        return {"h": h} | {name: {"pooler": lambda: model.pooled(p, h), "fill": lambda: model.logits(p, h, ctx),
                                  "follows": lambda: model.follows(p, h)}[name]() for name in model.parts}  # fmt: skip

    mine = ours(params, tokens)
    hidden = found.hidden_states[-1].numpy()
    assert np.abs(np.asarray(mine["h"]) - hidden)[mask > 0].max() <= 2e-5
    fill = "prediction_logits" if "follows" in mine else "logits"
    names = {"pooler": "pooler_output", "fill": fill, "follows": "seq_relationship_logits"}
    for name in model.parts:
        if (expected := getattr(found, names[name], None)) is not None:
            at = mask > 0 if name == "fill" else np.ones(2, bool)
            assert np.abs(np.asarray(mine[name]) - expected.numpy())[at].max() <= 2e-5, name


def test_gradients(pair):
    """1e-4 in relative L2 for each tensor."""
    theirs, _, model, params = pair
    if "fill" not in model.parts:
        assert model.parts == ("pooler",)
        return
    tokens, _, _ = inputs(65)
    target = np.roll(tokens, 1, 1)

    def loss(p):
        logits = model.apply(p, jnp.asarray(tokens), Context()).x
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1).mean()

    ours = jax.jit(jax.grad(loss))(params)
    found = theirs(torch.tensor(tokens))
    logits = found.prediction_logits if "follows" in model.parts else found.logits
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(target).flatten()).backward()
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for tensor in tensors(model, family("bert").rows(model)):
        mine = tensor.pattern.join([np.asarray(pick(ours, one)) for one in tensor.targets])
        if tensor.name not in named or "key.bias" in tensor.name:       # a bias of the keys moves all scores of a query alike
            assert np.abs(mine).max() <= 1e-6, tensor.name
            continue
        other = named[tensor.name].numpy()
        assert np.linalg.norm(mine - other) <= 1e-4 * np.linalg.norm(other), tensor.name


def test_round_trip(pair, tmp_path):
    theirs, folder, model, params = pair
    hf.save(tmp_path / "out", model, params, family="bert")
    before, after = safetensors.stored(folder), safetensors.stored(tmp_path / "out")
    prefix = "bert." if type(theirs) is BertModel else ""               # the bare trunk is written under its full names
    assert sorted(prefix + name for name in before) == sorted(after)
    for name, tensor in before.items():
        assert tensor.read().tobytes() == after[prefix + name].read().tobytes(), name
    again = type(theirs).from_pretrained(tmp_path / "out")
    for (name, a), (other, b) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name


def test_nothing_to_decode(pair):
    _, _, model, params = pair
    with pytest.raises(ValueError, match="BERT sees the whole row at once"):
        model.apply(params, jnp.zeros((1, 3), jnp.int32), Context(), cache=())
