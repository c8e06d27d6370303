"""Every published shape has exactly the published number of parameters, ours and as `transformers` builds it; nothing is allocated."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from minllm import models, spec

# Of the model cards and the papers' tables; gemma3's are of the text models alone, qwen3_next's and deepseek_v3's without the layer that
# guesses a second token.
PUBLISHED = {
    "llama": {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800, "1b": 1_235_814_400, "3b": 3_212_749_824,
              "3.0-8b": 8_030_261_248, "3.0-70b": 70_553_706_496, "2-7b": 6_738_415_616, "2-13b": 13_015_864_320,
              "2-70b": 68_976_648_192, "1-7b": 6_738_415_616, "1-13b": 13_015_864_320, "1-33b": 32_528_943_616,
              "1-65b": 65_285_660_672},
    "mistral": {"7b": 7_241_732_096, "7b-v0.2": 7_241_732_096, "7b-v0.3": 7_248_023_552, "nemo": 12_247_782_400},
    "mixtral": {"8x7b": 46_702_792_704, "8x22b": 140_630_071_296},
    "qwen2": {"7b": 7_615_616_512, "0.5b": 494_032_768, "1.5b": 1_543_714_304, "3b": 3_085_938_688, "14b": 14_770_033_664,
              "32b": 32_763_876_352, "72b": 72_706_203_648},
    "qwen3": {"8b": 8_190_735_360, "0.6b": 596_049_920, "1.7b": 1_720_574_976, "4b": 4_022_468_096, "14b": 14_768_307_200,
              "32b": 32_762_123_264},
    "qwen3_moe": {"30b-a3b": 30_532_122_624, "235b-a22b": 235_093_634_560},
    "gemma": {"7b": 8_537_680_896, "2b": 2_506_172_416},
    "gemma2": {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320},
    "gemma3_text": {"1b": 999_885_952, "270m": 268_098_176, "4b": 3_880_263_168, "12b": 11_766_034_176, "27b": 27_009_346_304},
    "olmo2": {"7b": 7_298_617_344, "1b": 1_484_916_736, "13b": 13_716_198_400, "32b": 32_234_279_936},
    "gpt2": {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200},
    "bert": {"base": 109_482_240, "large": 335_141_888, "minilm-l6": 22_713_216},
    "t5": {"small": 60_506_624, "base": 222_903_552, "large": 737_668_096, "v1.1-small": 76_961_152, "v1.1-base": 247_577_856},
    "mamba": {"130m": 129_135_360, "370m": 371_516_416, "790m": 793_204_224, "1.4b": 1_372_178_432, "2.8b": 2_768_345_600},
    "mamba2": {"130m": 128_989_632, "370m": 368_346_624, "780m": 780_161_280, "1.3b": 1_343_757_312, "2.7b": 2_702_599_680,
               "codestral-7b": 7_285_403_648},
    "jamba": {"v0.1": 51_570_323_328, "1.5-large": 398_555_145_696},
    "qwen3_next": {"80b-a3b": 79_674_391_296},
    "deepseek_v2": {"v2": 235_741_434_880, "v2-lite": 15_706_484_224},
    "deepseek_v3": {"v3": 671_026_419_200},
    "kimi_linear": {"48b-a3b": 49_122_681_728},
    "recurrent_gemma": {"2b": 2_682_862_080, "9b": 8_579_977_216},
    "rwkv": {"169m": 169_342_464, "430m": 430_397_440, "1.5b": 1_515_106_304, "3b": 2_984_627_200, "7b": 7_392_649_216,
             "14b": 14_148_597_760},
    "gpt_oss": {"20b": 20_914_757_184, "120b": 116_829_156_672},
}  # fmt: skip
EVERY = [(name, preset, size) for name, sizes in PUBLISHED.items() for preset, size in sizes.items()]


def test_the_list_is_whole():
    assert {name: {*models.family(name).presets} - {"mini"} for name in models.FAMILIES} == {n: {*s} for n, s in PUBLISHED.items()}


@pytest.mark.parametrize("name, preset, size", EVERY)
def test_counts(name, preset, size):
    assert spec.count(models.build(name, preset).params()) == size


@pytest.mark.nightly
@pytest.mark.parametrize("name, preset, size", EVERY)
def test_counts_of_transformers(name, preset, size):
    config = models.family(name).config(models.build(name, preset))
    with torch.device("meta"):
        theirs = getattr(transformers, config.pop("architectures")[0])(AutoConfig.for_model(**config))
    corrections = [b for name, b in theirs.named_buffers() if "correction" in name]  # of routers: stored, and no parameters there
    assert sum(p.numel() for p in (*theirs.parameters(), *corrections)) == size


def test_mini_is_a_mini_llama():
    model = models.build("llama", "mini")
    assert 1e6 < spec.count(model.params()) < 15e6
    assert models.build("llama", "mini", vocab=256).vocab == 256 and models.build("llama", "mini") == model


@pytest.mark.parametrize("args, message", [
    (dict(family="lama"), "'lama' is no model family; did you mean 'llama'"),
    (dict(family="llama", preset="mimi"), "'mimi' is no llama preset; did you mean 'mini'"),
    (dict(family="llama", preset="9b"), "'9b' is no llama preset; did you mean '"),
    (dict(family="llama", layer=3), "'layer' is no argument of llama; did you mean 'layers'"),
    (dict(family="llama", D=64, heads=4, kv_heads=3), "4 heads for 3 kv_heads"),
    (dict(family="gpt2", D=64, heads=5), "a width D of 64 does not divide into 5 heads"),
])  # fmt: skip
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        models.build(**args)
