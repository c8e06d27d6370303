"""gpt-oss (OpenAI 2025, arXiv 2508.10925, section 2 and table 1): every second layer looks at 128 tokens; each head has a sink; biases
everywhere; 4 of many experts, by a softmax over the chosen; a SwiGLU that is clamped and shifted; YaRN.

Its released files hold experts in 4 bits (MXFP4): dequantize them first.
"""

from dataclasses import replace

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, Swish
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope, Scaling, YarnScaling
from minllm.layers.residual import PreNorm
from minllm.models import mixtral, qwen
from minllm.models.family import BENIGN, Arg, BalanceLoss, Family, LayerTypes, Only, RopeFields
from minllm.models.transformer import Decoder, fold
from minllm.spec import FanIn


def gpt_oss(
    D: int = 2880,
    layers: int = 24,
    heads: int = 64,
    kv_heads: int | None = 8,
    hidden: int = 2880,
    vocab: int = 201_088,
    experts: int = 32,
    active: int = 4,
    theta: float = 150_000.0,
    scaling: Scaling | None = YarnScaling(32.0, 4096, round_dims=False),
    head_dim: int = 64,
    window: int | None = 128,
    windowed: tuple[bool, ...] | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    balance: float = 0.0,
    tied: bool = False,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are gpt-oss-20b. windowed: which layers look at `window` tokens only; None for every second, from the first."""
    norm, out = RMSNorm(eps), FanIn((2 * layers) ** -0.5)
    whole = Attention(heads, kv_heads or heads, head_dim, Rope(theta, scaling), bias=True, out_bias=True, sinks=True, out_init=out)
    expert = GLU(hidden, Swish(alpha), bias=True, limit=limit, shift=1.0, out_init=out)
    moe = PreNorm(MoE(Router(experts, active, bias=True), expert, balance=balance), norm)
    narrow = windowed or tuple(i % 2 == 0 for i in range(layers))
    blocks = [(PreNorm(replace(whole, window=window if one else None), norm), moe) for one in narrow]
    return Decoder(vocab, D, fold(blocks), norm, tied)


FIELDS = {name: known for name, known in mixtral.FIELDS.items() if name != "router_jitter_noise"} | {
    "vocab_size": Arg("vocab", 201_088),
    "head_dim": Arg("head_dim", 64),
    "attention_bias": Only(True),
    "rope_theta": RopeFields(150_000.0),
    "sliding_window": Arg("window", 128),
    "layer_types": LayerTypes(2),
    "num_local_experts": Arg("experts", 128, other="num_experts"),
    "num_experts_per_tok": Arg("active", 4),
    "swiglu_alpha": Arg("alpha", 1.702),
    "swiglu_limit": Arg("limit", 7.0),
    "router_aux_loss_coef": BalanceLoss(4),
}
_EXPERTS = "layers/{i}/1/inner/experts/"
WEIGHTS = (
    mixtral.ATTENTION
    | qwen.BIASES
    | {
        "model.layers.{i}.self_attn.sinks": ("layers/{i}/0/inner/sinks", "n -> n"),
        "model.layers.{i}.mlp.router.weight": ("layers/{i}/1/inner/router/weight", "e d -> d e"),
        "model.layers.{i}.mlp.router.bias": ("layers/{i}/1/inner/router/bias", "e -> e"),
        "model.layers.{i}.mlp.experts.gate_up_proj": ((f"{_EXPERTS}gate", f"{_EXPERTS}up"), "e d (f (1 + 1)) -> e d f, e d f"),
        "model.layers.{i}.mlp.experts.gate_up_proj_bias": ((f"{_EXPERTS}gate_bias", f"{_EXPERTS}up_bias"), "e (f (1 + 1)) -> e f, e f"),
        "model.layers.{i}.mlp.experts.down_proj": (f"{_EXPERTS}down", "e f d -> e f d"),
        "model.layers.{i}.mlp.experts.down_proj_bias": (f"{_EXPERTS}down_bias", "e d -> e d"),
    }
)
PRESETS = {"20b": {}, "120b": dict(layers=36, experts=128)}
_BENIGN = BENIGN | {"experts_per_token", "initial_context_length"}  # said twice in the released configs, under other names
FAMILY = {"gpt_oss": Family("gpt_oss", "GptOssForCausalLM", gpt_oss, PRESETS, FIELDS, WEIGHTS, benign=_BENIGN)}
