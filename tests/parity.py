"""Law 8 as a harness: a family's tiny random model in `transformers` and the same folder in ours, compared in value and gradient.

`FAMILIES` holds, for each family, a config.json that turns on all that the family has. `Pair` makes the model that `transformers` builds
of it, saves it as a folder, and reads that folder by `hf.load`: names, config and weights are part of what is compared.
"""

import json
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minllm import models, spec
from minllm.interop import hf, safetensors
from minllm.interop.table import pick, tensors
from minllm.layer import Context
from minllm.layers.position import Rope
from minllm.models.family import sublayers
from minllm.weights import unstack

VOCAB = 97
PROMPTS = (5, 65, 700)
SHAPE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=1024)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", **SHAPE, head_dim=24, rms_norm_eps=1e-5, rope_theta=500_000.0, rope_scaling=LLAMA3),
    "llama_tied": dict(model_type="llama", **SHAPE, tie_word_embeddings=True, rope_theta=10_000.0),
    "mistral": dict(model_type="mistral", **SHAPE, head_dim=24, sliding_window=40),
    "qwen2": dict(model_type="qwen2", **SHAPE | dict(num_hidden_layers=3), use_sliding_window=True, sliding_window=40,
                  max_window_layers=1, rope_scaling=YARN),
    "qwen3": dict(model_type="qwen3", **SHAPE, head_dim=24, attention_bias=True, tie_word_embeddings=True),
    "gemma": dict(model_type="gemma", pad_token_id=None, **SHAPE | dict(num_key_value_heads=1), head_dim=24),
    "gemma2": dict(model_type="gemma2", pad_token_id=None, **SHAPE | dict(num_hidden_layers=3), head_dim=24, query_pre_attn_scalar=20,
                   sliding_window=40, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(model_type="gemma3_text", pad_token_id=None, **SHAPE | dict(num_hidden_layers=7), head_dim=24,
                        query_pre_attn_scalar=20, sliding_window=40, rope_scaling=dict(rope_type="linear", factor=8.0)),
    "mixtral": dict(model_type="mixtral", **SHAPE, head_dim=24, sliding_window=40, num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": dict(model_type="qwen3_moe", **SHAPE | dict(num_hidden_layers=3), head_dim=24, moe_intermediate_size=40, num_experts=6,
                      num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[1], attention_bias=True),
    "gpt_oss": dict(model_type="gpt_oss", **SHAPE | dict(num_hidden_layers=3), head_dim=24, sliding_window=40, num_local_experts=5,
                    num_experts_per_tok=2, rope_scaling=YARN | dict(truncate=False), swiglu_limit=1.0),
    "olmo2": dict(model_type="olmo2", **SHAPE, rope_theta=500_000.0),
    "mamba": dict(model_type="mamba", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=6),
    "mamba2": dict(model_type="mamba2", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=8,
                   n_groups=2, tie_word_embeddings=True),
    "jamba": dict(model_type="jamba", pad_token_id=None, **SHAPE | dict(num_hidden_layers=4), num_experts=5,
                  num_experts_per_tok=2, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=6),
    # delta rules in few layers: in float32 those of `transformers` are 2e-5 from float64 after five (ours 1e-5)
    "qwen3_next": dict(model_type="qwen3_next", **SHAPE | dict(num_hidden_layers=3), head_dim=24, linear_num_value_heads=4,
                       layer_types=["linear_attention", "full_attention", "linear_attention"],
                       linear_num_key_heads=2, linear_key_head_dim=12, linear_value_head_dim=20, num_experts=6, num_experts_per_tok=3,
                       moe_intermediate_size=40, shared_expert_intermediate_size=48, mlp_only_layers=[1], partial_rotary_factor=0.5),
    "deepseek_v2": dict(model_type="deepseek_v2", **SHAPE | dict(num_hidden_layers=3, num_key_value_heads=4), q_lora_rank=None,
                        kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, n_shared_experts=2,
                        num_experts_per_tok=3, moe_intermediate_size=40, first_k_dense_replace=1, n_group=4, topk_group=2,
                        topk_method="group_limited_greedy", routed_scaling_factor=1.5),
    "deepseek_v3": dict(model_type="deepseek_v3", **SHAPE | dict(num_hidden_layers=3, num_key_value_heads=4), q_lora_rank=32,
                        kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, n_shared_experts=2,
                        num_experts_per_tok=3, moe_intermediate_size=40, first_k_dense_replace=1, n_group=4, topk_group=2,
                        rope_scaling=YARN | dict(mscale=0.8, mscale_all_dim=0.8)),
    "recurrent_gemma": dict(model_type="recurrent_gemma", pad_token_id=None, **SHAPE | dict(num_hidden_layers=4, num_key_value_heads=1),
                            lru_width=64, attention_window_size=40, block_types=["recurrent", "attention", "recurrent"]),
    "rwkv": dict(model_type="rwkv", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64,
                 intermediate_size=96),
    "kimi_linear": dict(model_type="kimi_linear", pad_token_id=None, **SHAPE | dict(num_key_value_heads=4), linear_num_heads=4,
                        linear_head_dim=12, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
                        num_local_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, n_group=4, topk_group=2,
                        layer_types=["linear_attention", "full_attention"]),
    "gpt2": dict(model_type="gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=1024),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A tiny model of `transformers` with random weights of a size that makes logits of size one, and the same read by us."""

    name: str
    folder: Path

    @cached_property
    def theirs(self) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(**json.loads(json.dumps(FAMILIES[self.name])))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
        for name, p in model.named_parameters():
            # gains that are stored less one
            offset = "gemma" in self.name or (self.name == "qwen3_next" and "linear_attn" not in name)
            gain = ("norm" in name or "ln" in name) and name.endswith("weight")
            fan_in = p.shape[0] if "c_" in name or (p.ndim == 3 and "conv" not in name) else p.shape[-1]
            torch.nn.init.normal_(p, *((1.0 - offset, 0.3) if gain else (0.0, 0.3 if p.ndim == 1 else 0.75 * fan_in**-0.5)))
        for name, b in model.named_buffers():
            if "correction" in name:
                torch.nn.init.normal_(b, 0.0, 0.1)
        model.save_pretrained(self.folder)
        return model

    def exact_frequencies(self) -> None:
        """`transformers` rounds rotary frequencies several times in float32: 4e-7 of them, which at 700 tokens and seven layers is 2e-5 of
        a logit. Its frequencies must be ours to 1e-6, and are then ours, rounded once."""
        theirs = {name: b for name, b in self.theirs.named_buffers() if name.endswith("inv_freq") and "original" not in name}
        ropes = [layer.position for layer in sublayers(self.loaded[0]) if isinstance(getattr(layer, "position", None), Rope)]
        for name, buffer in theirs.items():
            fit = [ours for rope in ropes if np.allclose(ours := frequencies(rope, 2 * len(buffer)), buffer, rtol=1e-6, atol=0)]
            assert fit, f"no layer has the frequencies {name}"
            buffer.copy_(torch.from_numpy(fit[0]))

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        assert self.theirs
        return hf.load(self.folder)

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, VOCAB, max(PROMPTS))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.theirs(torch.tensor(tokens[None])).logits[0].numpy()

    @cached_property
    def logit_errors(self) -> list[float]:
        """Of each length of prompt: the largest difference of logits."""
        model, params = self.loaded
        self.exact_frequencies()
        rows = np.zeros((len(PROMPTS), max(PROMPTS)), np.int32)
        positions = np.full_like(rows, -1)  # one program for all lengths: what is no token has no position
        for row, T in enumerate(PROMPTS):
            rows[row, :T], positions[row, :T] = self.tokens[:T], np.arange(T)
        ours = jax.jit(lambda p, x, at: model.apply(p, x, Context(positions=at)).x)(params, rows, positions)
        theirs = [self.logits(self.tokens[:T]) for T in PROMPTS]
        assert all(np.abs(one).max() > 1 for one in theirs)
        return [float(np.abs(np.asarray(mine[:T]) - one).max()) for mine, one, T in zip(ours, theirs, PROMPTS)]

    @cached_property
    def decode_error(self) -> float:
        """A prefill and then single tokens against the whole row at once, both ours, past every window."""
        model, params = self.loaded
        T, N = 65, 4
        full = jax.jit(lambda p, x: model.apply(p, x, Context()).x)(params, self.tokens[None, : T + N])[0, T:]
        step, loose = jax.jit(model.apply), unstack(params)
        cache = spec.init(model.cache(1, T + N), jax.random.key(0))
        cache = step(loose, self.tokens[None, :T], Context(positions=jnp.arange(T)[None]), cache).cache
        worst = 0.0
        for i in range(N):
            out = step(loose, self.tokens[None, T + i : T + i + 1], Context(positions=jnp.array([[T + i]])), cache)
            cache, worst = out.cache, max(worst, float(jnp.abs(out.x[0, 0] - full[i]).max()))
        return worst

    @cached_property
    def gradient_errors(self) -> dict[str, float]:
        """Of each tensor of the file: the relative difference of the loss's gradients, in L2."""
        model, params = self.loaded
        tokens = self.tokens[None, :100]
        target = np.roll(tokens, -1, 1)

        def loss(p):
            logits = model.apply(p, jnp.asarray(tokens), Context()).x
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1).mean()

        ours = jax.jit(jax.grad(loss))(params)
        logits = self.theirs(torch.tensor(tokens), use_cache=False).logits
        named = dict(self.theirs.named_parameters())
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(target).flatten()),
                                    list(named.values()))  # fmt: skip
        theirs = dict(zip(named, (g.numpy() for g in grads)))
        theirs |= {name: np.zeros(b.shape, np.float32) for name, b in self.theirs.named_buffers() if "correction" in name}
        errors = {}
        for tensor in tensors(model, self.family.rows(model)):
            mine = tensor.pattern.join([np.asarray(pick(ours, target)) for target in tensor.targets])
            other = self.gradient(theirs, tensor.name)
            # zero for both: an expert that nobody chose, a router's bias that is not learned
            errors[tensor.name] = float(np.linalg.norm(mine - other) / (np.linalg.norm(other) or 1.0))
        return errors

    def gradient(self, theirs: dict[str, np.ndarray], name: str) -> np.ndarray:
        """The gradient of a tensor of the file. In memory `transformers` keeps experts as one tensor, gate above up, and other things
        under other names."""
        if name in theirs:
            return theirs[name]
        name = name.replace("block_sparse_moe", "mlp")
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight", name):
            experts, expert, which = found[1], int(found[2]), found[3]
            if which in ("w2", "down_proj"):
                return theirs[f"{experts}.down_proj"][expert]
            return np.split(theirs[f"{experts}.gate_up_proj"][expert], 2)[which in ("w3", "up_proj")]
        if found := re.fullmatch(r"(.*\.self_attn)\.([qkv])_conv1d\.weight", name):
            return np.split(theirs[f"{found[1]}.conv1d.weight"], 3)["qkv".index(found[2])]
        return theirs[re.sub(r"self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)", r"self_attn.forget_gate.\1", name)]

    def greedy(self, count: int = 64) -> tuple[list[int], list[int]]:
        """(steps where our likeliest token is another one than theirs, of these the ties). Both continue their text."""
        model, params = self.loaded
        cache = spec.init(model.cache(1, 65 + count), jax.random.key(0))
        step, loose = jax.jit(model.apply), unstack(params)
        out = step(loose, self.tokens[None, :65], Context(positions=jnp.arange(65)[None]), cache)
        text, differ, ties = list(self.tokens[:65]), [], []
        for i in range(count):
            theirs = self.logits(np.array(text))[-1]
            mine = np.asarray(out.x[0, -1])
            if mine.argmax() != theirs.argmax():
                differ.append(i)
                low, high = np.sort(theirs)[-2:]
                ties += [i] if high - low <= 1e-3 else []
            text.append(int(theirs.argmax()))
            out = step(loose, np.array([[text[-1]]]), Context(positions=jnp.array([[len(text) - 1]])), out.cache)
        return differ, ties

    @property
    def family(self) -> Any:
        return models.family(FAMILIES[self.name]["model_type"])

    def exported(self) -> tuple[Path, Any]:
        """(a folder that we wrote, what transformers loads of it)."""
        folder = self.folder.parent / f"{self.folder.name}-out"
        if not folder.exists():
            hf.save(folder, *self.loaded, family=self.family.name, like=self.folder)
        return folder, AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        )

    def round_trip(self) -> None:
        """Import and export give the same bytes of the same tensors; transformers loads the export as the same model."""
        folder, again = self.exported()
        before, after = hf.renamed(safetensors.stored(self.folder), self.family), safetensors.stored(folder)
        assert sorted(before) == sorted(after)
        for name, tensor in before.items():
            assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
            assert tensor.read().tobytes() == after[name].read().tobytes(), name
        for (name, a), (other, b) in zip(self.theirs.named_parameters(), again.named_parameters(), strict=True):
            assert name == other and torch.equal(a, b), name
        with torch.no_grad():
            x = torch.tensor(self.tokens[None])
            for a, b in zip(self.theirs.buffers(), again.buffers(), strict=True):
                b.copy_(a)
            assert torch.equal(self.theirs(x).logits, again(x).logits)


def frequencies(rope: Rope, R: int) -> np.ndarray:
    """Of R dims, in float64 and rounded once."""
    base = rope.theta ** -(np.arange(0, R, 2) / R)
    return np.asarray(rope.scaling.frequencies(base, rope.theta, 1) if rope.scaling else base, np.float32)


def pair(name: str) -> Pair:
    return Pair(name, Path(tempfile.mkdtemp(prefix="minllm-parity-")) / name)
