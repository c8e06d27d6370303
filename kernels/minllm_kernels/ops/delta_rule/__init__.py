"""The delta rule with a decaying memory, and its gradient."""

from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Impl
from minllm_kernels.ops import recurrence


def delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N h"],
    beta: Float[Array, "B T N"],
    log_decay: Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    state: Float[Array, "B N H h"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    *,
    impl: Impl = "auto",
    chip: str | None = None,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B N H h"]]:
    """(y, the memory after the last token) of

        S_t = (I - b_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        y_t = S_t^T q_t

    The memory is asked for k, and what is written is b times how far its answer is from v. Without decay this is DeltaNet (Yang et al.
    2024, arXiv 2406.06484), with one log decay g <= 0 a head Gated DeltaNet (arXiv 2412.06464), with one a channel Kimi Delta Attention
    (arXiv 2510.26692). b lies in [0, 1], or [0, 2] where eigenvalues may be negative (arXiv 2411.12537); k should have length 1, or the
    memory can grow without bound. N / K value heads share a q and k head. q is not scaled.
    state: the memory before the first token; default zero. It is float32, or float64 for float64 inputs.
    segments: the document of each token. The memory is emptied where a document begins; `state` belongs to the first of the row. Tokens of
    segment 0 are padding: they leave the memory alone, and their outputs mean nothing.
    Differentiable in q, k, v, beta, log_decay and state through both results; the backward pass keeps one memory a chunk of tokens.
    impl: "auto" | "reference" | "xla" | "tpu"; chip: the device kind that tiles are chosen for.

    Raises ValueError where shapes do not fit, or when the chosen impl cannot serve the call.
    """
    return recurrence.run("delta_rule", q, k, v, log_decay, beta, state, segments, impl, chip)
