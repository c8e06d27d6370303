"""What training minimises: a pure function of model, parameters and batch.

An objective gives its losses as name -> (sum, weight). Sums are added over microbatches and shards and divided by the weight of the
whole batch, so that neither changes the gradient (masked tokens count for nothing wherever they fall).
"""

from typing import Any, Literal

import jax.numpy as jnp
from pydantic import Field

from minllm.config import config
from minllm.layer import Context, Losses, add_losses
from minllm.parallel.vocab import cross_entropy
from minllm.spec import Tree

Batch = dict[str, Any]


@config
class NextToken:
    """Cross-entropy of each token given those before it (nats a token), over the tokens whose weight is not zero.

    A batch holds "tokens", "targets" (the same, one later) and "weights", each "B T"; "segments" and "positions" where rows are packed.
    """

    kind: Literal["next_token"] = "next_token"
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing: the share of the target spread over the vocabulary")
    z_loss: float = Field(default=0.0, ge=0, description="times the square of the log-sum-exp, against drifting logits (PaLM: 1e-4)")

    def weight(self, batch: Batch) -> Any:
        return batch["weights"].astype(jnp.float32).sum()

    def context(self, batch: Batch, ctx: Context) -> Context:
        """What the layers see of the batch beside its tokens."""
        return ctx.replace(segments=batch.get("segments"), positions=batch.get("positions"))

    def losses(self, model: Any, p: Tree, batch: Batch, ctx: Context, aim: bool = True) -> tuple[Losses, Any]:
        """({"loss": ..., and what else is added to it}, statistics of the layers). Without `aim`, plain cross-entropy: what evaluation
        reports."""
        ctx = self.context(batch, ctx)
        out = model.hidden(p, batch["tokens"], ctx)
        smoothing = self.smoothing if aim else 0.0
        loss, lse = cross_entropy(out.x, model.head(p), batch["targets"], softcap=model.softcap, smoothing=smoothing, run=ctx.run)
        w = batch["weights"].astype(loss.dtype)
        losses = {"loss": ((loss * w).sum(), w.sum())}
        if self.z_loss and aim:
            losses["z_loss"] = (self.z_loss * (lse * lse * w).sum(), w.sum())
        return add_losses(losses, out.losses if aim else None), out.stats  # type: ignore[return-value]


@config
class SFT(NextToken):
    """Supervised fine-tuning: next-token loss on what the assistant says. The `chat` data source gives all other targets weight 0."""

    kind: Literal["sft"] = "sft"  # type: ignore[assignment]


Objective = NextToken | SFT
