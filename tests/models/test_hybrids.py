"""config.json of the families of recurrences, latent attention and mixtures: what is not honoured is an error."""

import pytest
from parity import FAMILIES

from minllm import models
from minllm.layers.attention import Attention
from minllm.layers.delta import GatedDeltaNet
from minllm.models.family import difference, sublayers


@pytest.mark.parametrize("name, change, message", [
    ("mamba", dict(expand=3, intermediate_size=128), "intermediate_size is 128, and expand times hidden_size 192"),
    ("mamba", dict(use_bias=True), "use_bias is True; only False"),
    ("mamba", dict(ssm_cfg=dict(layer="Mamba2")), "ssm_cfg is .*; only {}"),
    ("mamba", dict(state_sise=8), "state_sise = 8 .did you mean state_size"),
    ("mamba2", dict(num_heads=6), "num_heads x head_dim is 6 x 16, and expand times hidden_size 128"),
    ("mamba2", dict(time_step_limit=[0.0, 0.1]), "time_step_limit is"),
    ("mamba2", dict(n_groups=3), "8 heads for 3 groups"),
    ("jamba", dict(head_dim=24), "head_dim is 24; only hidden_size / num_attention_heads = 16"),
    ("jamba", dict(mamba_conv_bias=False), "mamba_conv_bias is False"),
    ("qwen3_next", dict(layer_types=["full_attention"] * 4), "layer_types has 4 entries for 3 layers"),
    ("qwen3_next", dict(layer_types=["sliding_attention"] * 3), "layer_types has 'sliding_attention'"),
    ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method is 'noaux_tc'; known are greedy"),
    ("deepseek_v2", dict(num_key_value_heads=2), "num_key_value_heads is 2; latent attention has a key for each of its 4 heads"),
    ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func is 'softmax'; only 'sigmoid'"),
    ("deepseek_v3", dict(qk_head_dim=64), "qk_head_dim is 64; with heads of 16 dims that stand still and 8 that turn it is 24"),
    ("deepseek_v3", dict(quantization_config=dict(quant_method="fp8")), "quantization_config"),
    ("kimi_linear", dict(mla_use_nope=False), "mla_use_nope is False"),
    ("kimi_linear", dict(linear_attn_config=dict(full_attn_layers=[2], kda_layers=[])), "must name each of 2 layers once"),
    ("kimi_linear", dict(linear_attn_config=dict(gates=1)), "linear_attn_config has unknown keys: gates"),
    ("recurrent_gemma", dict(block_types=["recurrent", "mamba"]), "block_types has 'mamba'"),
    ("recurrent_gemma", dict(intermediate_size=97), "intermediate_size is 97"),
])  # fmt: skip
def test_fields(name, change, message):
    config = FAMILIES[name] | change
    with pytest.raises(ValueError, match=message):
        models.family(config["model_type"]).model(config)


NAMES = ("mamba", "mamba2", "jamba", "qwen3_next", "deepseek_v2", "deepseek_v3", "kimi_linear", "recurrent_gemma", "rwkv")


@pytest.mark.parametrize("name", NAMES)
def test_config_and_back(name):
    """What is read of a config is what is written of the model, and no other family can write it."""
    family = models.family(name)
    model = family.model(FAMILIES[name])
    assert family.model(family.config(model)) == model
    for other in models.FAMILIES:
        if other != name:
            with pytest.raises(ValueError, match=f"the model is no {other}"):
                models.family(other).config(model)
    with pytest.raises(ValueError, match=f"the model is no {name}"):
        family.config(models.build("llama", "mini"))


def test_the_release_of_kimi_counts_layers_from_one():
    """Its own config.json says in linear_attn_config what ours says in layer_types."""
    family = models.family("kimi_linear")
    full = [4, 8, 12, 16, 20, 24, 27]
    release = dict(
        model_type="kimi_linear", hidden_size=2304, num_hidden_layers=27, num_attention_heads=32, intermediate_size=9216, head_dim=72,
        qk_nope_head_dim=128, qk_rope_head_dim=64, first_k_dense_replace=1, mla_use_nope=True, rope_theta=10_000.0, rope_scaling=None,
        linear_attn_config=dict(head_dim=128, num_heads=32, short_conv_kernel_size=4, full_attn_layers=full,
                                kda_layers=[i for i in range(1, 28) if i not in full]))  # fmt: skip
    assert difference(family.model(release), models.build("kimi_linear")) == ""


def test_where_the_kinds_stand():
    kinds = [type(layer) for layer in list(sublayers(models.build("qwen3_next")))[::2]]
    assert kinds == 12 * [*3 * [GatedDeltaNet], Attention]
    attends = [i for i, layer in enumerate(list(sublayers(models.build("jamba")))[::2]) if isinstance(layer, Attention)]
    assert attends == [4, 12, 20, 28]
