"""Causal linear attention with a decaying memory, and its gradient."""

from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Impl
from minllm_kernels.ops import recurrence


def linear_attention(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N h"],
    log_decay: Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    state: Float[Array, "B N H h"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    *,
    impl: Impl = "auto",
    chip: str | None = None,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B N H h"]]:
    """(y, the memory after the last token) of

        S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T        y_t = S_t^T q_t

    (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16 to 20). log_decay g <= 0: one a head (RetNet, Mamba-2's SSD), one a channel of k
    (GLA), or none. N / K value heads share a q and k head. q is not scaled, and nothing is normalised.
    state: the memory before the first token; default zero. It is float32, or float64 for float64 inputs.
    segments: the document of each token. The memory is emptied where a document begins; `state` belongs to the first of the row. Tokens of
    segment 0 are padding: they leave the memory alone, and their outputs mean nothing.
    Differentiable in q, k, v, log_decay and state through both results; the backward pass keeps one memory a chunk of tokens.
    impl: "auto" | "reference" | "xla" | "tpu"; chip: the device kind that tiles are chosen for.

    Raises ValueError where shapes do not fit, or when the chosen impl cannot serve the call.
    """
    return recurrence.run("linear_attention", q, k, v, log_decay, None, state, segments, impl, chip)
