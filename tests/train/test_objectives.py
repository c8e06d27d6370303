"""Next-token loss against torch in float64, on a model so small that its logits are a table: normalisation, masks, smoothing, z-loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minllm import spec
from minllm.layer import Context, Out
from minllm.models.llama import llama3
from minllm.objectives import SFT, NextToken

B, T, D, V = 8, 6, 5, 11


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


class Bigram:
    """logits = embed[token] head, capped if asked; `balance` is a loss that a layer adds."""

    def __init__(self, softcap=None, balance=None):
        self.softcap, self.balance = softcap, balance

    def hidden(self, p, tokens, ctx):
        return Out(p["embed"][tokens], losses=self.balance)

    def head(self, p):
        return p["head"]


@pytest.fixture
def p():
    rng = np.random.default_rng(0)
    return {"embed": jnp.asarray(rng.normal(size=(V, D))), "head": jnp.asarray(2 * rng.normal(size=(D, V)))}


@pytest.fixture
def batch():
    """Row i has weights on i tokens only, some of them fractions: no two microbatches weigh the same, and row 0 weighs nothing."""
    rng = np.random.default_rng(1)
    weights = (np.arange(T) < np.arange(B)[:, None]) * rng.choice([0.25, 1.0], (B, T))
    tokens, targets = rng.integers(0, V, (2, B, T))
    return {name: jnp.asarray(a) for name, a in (("tokens", tokens), ("targets", targets), ("weights", weights))}


def torchs(p, batch, softcap=None, smoothing=0.0, z_loss=0.0):
    """(cross-entropy, z-loss, gradients of their sum), each a mean over the weight of the whole batch."""
    p = {name: torch.tensor(np.asarray(v), requires_grad=True) for name, v in p.items()}
    tokens, targets, weights = (torch.tensor(np.asarray(batch[name])) for name in ("tokens", "targets", "weights"))
    logits = p["embed"][tokens] @ p["head"]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing).reshape(B, T)
    loss = (each * weights).sum() / weights.sum()
    z = z_loss * (logits.logsumexp(-1) ** 2 * weights).sum() / weights.sum()
    (loss + z).backward()
    return loss.item(), z.item(), {name: v.grad.numpy() for name, v in p.items()}


def ours(objective, model, p, batch, pieces=1, aim=True):
    """As the step does it: sums of each microbatch over the weight of the whole batch, added up."""
    whole = objective.weight(batch)
    parts, grads = {}, jax.tree.map(jnp.zeros_like, p)
    for i in range(pieces):
        piece = {name: a[i::pieces] for name, a in batch.items()}

        def total(p):
            losses = objective.losses(model, p, piece, Context(), aim=aim)[0]
            each = {name: s / whole for name, (s, _) in losses.items()}
            return sum(each.values()), each

        g, each = jax.grad(total, has_aux=True)(p)
        grads = jax.tree.map(jnp.add, grads, g)
        parts = {name: parts.get(name, 0) + float(v) for name, v in each.items()}
    return parts, grads


@pytest.mark.parametrize("options", [{}, dict(smoothing=0.1), dict(z_loss=1e-2), dict(smoothing=0.2, z_loss=1e-4)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradient_are_torchs(p, batch, options, softcap):
    """F64 (G01, G03)."""
    loss, z, grads = torchs(p, batch, softcap, **options)
    parts, got = ours(NextToken(**options), Bigram(softcap), p, batch)
    assert abs(parts["loss"] - loss) <= 1e-10
    assert abs(parts.get("z_loss", 0.0) - z) <= 1e-10 and ("z_loss" in parts) == ("z_loss" in options)
    for name in p:
        np.testing.assert_allclose(got[name], grads[name], rtol=0, atol=1e-10)


def test_a_mask_is_torchs_ignore_index(p, batch):
    masked = batch | {"weights": jnp.asarray(np.asarray(batch["weights"]) > 0, float)}
    targets = np.where(np.asarray(masked["weights"]) > 0, np.asarray(batch["targets"]), -100)
    logits = torch.tensor(np.asarray(p["embed"][batch["tokens"]] @ p["head"]))
    want = F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=-100)
    assert abs(ours(NextToken(), Bigram(), p, masked)[0]["loss"] - want.item()) <= 1e-10


def test_what_a_masked_token_predicts_changes_nothing(p, batch):
    other = batch | {"targets": jnp.where(batch["weights"] > 0, batch["targets"], V - 1 - batch["targets"])}
    options = NextToken(smoothing=0.1, z_loss=1e-2)
    for a, b in zip(jax.tree.leaves(ours(options, Bigram(), p, batch)), jax.tree.leaves(ours(options, Bigram(), p, other)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_microbatches_of_uneven_weight_add_up_to_the_batch(p, batch, pieces):
    """G01: 1e-6 relative is asked for; in float64 it is 1e-12. The mean of the pieces' means, which is often taken for it, is not it."""
    objective, model = NextToken(smoothing=0.1, z_loss=1e-2), Bigram()
    (whole, grads), (parts, got) = ours(objective, model, p, batch), ours(objective, model, p, batch, pieces)
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-12)
    for name in p:
        np.testing.assert_allclose(got[name], grads[name], rtol=0, atol=1e-12 * np.abs(grads[name]).max())
    each = [objective.losses(model, p, {name: a[i::pieces] for name, a in batch.items()}, Context())[0]["loss"] for i in range(pieces)]
    means = float(np.mean([s / max(w, 1e-9) for s, w in each]))
    assert abs(means - whole["loss"]) > 1e-3


def test_without_aim_it_is_plain_cross_entropy(p, batch):
    """What evaluation reports: no smoothing, no z-loss, nothing that layers add."""
    model = Bigram(balance={"balance": (jnp.asarray(3.0), jnp.asarray(1.0))})
    objective = NextToken(smoothing=0.3, z_loss=1.0)
    assert set(ours(objective, model, p, batch)[0]) == {"loss", "z_loss", "balance"}
    parts, grads = ours(objective, model, p, batch, aim=False)
    loss, _, want = torchs(p, batch)
    assert set(parts) == {"loss"} and abs(parts["loss"] - loss) <= 1e-10
    np.testing.assert_allclose(grads["head"], want["head"], rtol=0, atol=1e-10)


def test_supervised_tuning_is_the_same_loss_on_other_weights(p, batch):
    assert ours(SFT(), Bigram(), p, batch)[0] == ours(NextToken(), Bigram(), p, batch)[0]


def test_uniform_logits_cost_log_v(p, batch):
    flat = p | {"head": jnp.zeros((D, V))}
    parts, _ = ours(NextToken(smoothing=0.5, z_loss=1.0), Bigram(), flat, batch)
    assert parts["loss"] == pytest.approx(np.log(V), abs=1e-12) and parts["z_loss"] == pytest.approx(np.log(V) ** 2, abs=1e-12)


def test_packed_documents_cost_what_they_cost_apart():
    """Segments and positions reach the model. F32: 1e-5 of the sum."""
    model = llama3(D=16, layers=2, heads=2, kv_heads=1, hidden=24, vocab=V, scaling=None)
    params = spec.init(model.params(), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, V)
    packed = {"tokens": tokens, "targets": (tokens + 1) % V, "weights": jnp.ones((1, 12), jnp.float32),
              "segments": jnp.asarray([[1] * 5 + [2] * 7]), "positions": jnp.asarray([[*range(5), *range(7)]])}  # fmt: skip
    sum_of = lambda batch: float(NextToken().losses(model, params, batch, Context())[0]["loss"][0])
    apart = [sum_of({name: packed[name][:, part] for name in ("tokens", "targets", "weights")}) for part in (slice(0, 5), slice(5, 12))]
    assert sum_of(packed) == pytest.approx(sum(apart), rel=1e-5)
    alone = {name: packed[name] for name in ("tokens", "targets", "weights")}
    assert abs(sum_of(alone) - sum(apart)) > 1e-3, "without segments the documents would see each other"
