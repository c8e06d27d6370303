"""What training minimises: a pure function of model, parameters and batch.

An objective gives its losses as name -> (sum, weight). Sums are added over microbatches and shards and divided by the weight of the
whole batch, so that neither changes the gradient (masked tokens count for nothing wherever they fall).
"""

from typing import Any, Literal

import jax.numpy as jnp
from pydantic import Field

from minllm.config import config
from minllm.layer import Context, Losses, add_losses
from minllm.sharding import local
from minllm.spec import Tree
from minllm_kernels import cross_entropy

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

    def losses(self, model: Any, p: Tree, batch: Batch, ctx: Context, aim: bool = True) -> tuple[Losses, Any]:
        """({"loss": ..., and what else is added to it}, statistics of the layers). Without `aim`, plain cross-entropy: what evaluation
        reports."""
        ctx = ctx.replace(segments=batch.get("segments"), positions=batch.get("positions"))
        out = model.hidden(p, batch["tokens"], ctx)
        run = ctx.run

        def op(x, w, targets):
            return cross_entropy(x, w, targets, softcap=model.softcap, smoothing=self.smoothing if aim else 0.0,
                                 impl=run.kernels, chip=run.chip)  # fmt: skip

        rows = "batch residual_seq"  # a tensor group shares out the tokens, not the vocabulary
        head = model.head(p, run)
        loss, lse = local(op, (f"{rows} _", "_ _", rows), (rows, rows), run)(out.x, head, batch["targets"])
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
