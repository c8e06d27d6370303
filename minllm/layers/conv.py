"""A short causal convolution, each channel by itself.

    y_t = act(sum_i w_i x_{t - W + 1 + i})

It lets a recurrent layer see the last few tokens exactly: H3 (Fu et al. 2022, arXiv 2212.14052, section 3), Mamba (arXiv 2312.00752,
section 3.4). The convolution is `minllm_kernels.causal_conv`.
"""

from dataclasses import dataclass

from jaxtyping import Array, Float

from minllm.layer import Context, Out
from minllm.layers.carry import Recurrent, conv_cache, convolve, resume
from minllm.layers.mlp import Activation, silu
from minllm.spec import Normal, Spec


@dataclass(frozen=True)
class ShortConv(Recurrent):
    width: int = 4
    act: Activation = silu

    def params(self, D):
        return {"conv": Spec((self.width, D), "_ embed", Normal(self.width**-0.5))}

    def cache(self, D, B, S, dtype):
        return {"conv": conv_cache(B, self.width, (D,), "act_embed", dtype)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        before = resume(cache, ctx)
        y, conv = convolve(x, p["conv"], before and before["conv"], "act_embed", ctx)
        return Out(self.act(y), cache and {"conv": conv})
