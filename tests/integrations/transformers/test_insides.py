"""Each inside of transformers that lowmem uses behaves as lowmem expects; ``tests.insides`` has the list."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, conversion_mapping, core_model_loading, masking_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto, base, quantizers_utils
from transformers.utils import import_utils
from transformers.utils.quantization_config import QuantizationConfigMixin

from tests.insides import USES, needs_transformers
from tests.test_insides import check_use, shows

CONFIG = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
CONFIG |= {"num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": 16}


def model(**options):
    return LlamaForCausalLM(LlamaConfig(**CONFIG, **options))


@shows("._attn_implementation")
def set_attn_implementation_changes_what_this_attribute_says():
    made = model(attn_implementation="sdpa")
    assert made.config._attn_implementation == "sdpa"
    made.set_attn_implementation("eager")
    assert made.config._attn_implementation == "eager"


@shows("._from_config")
def a_model_is_made_of_a_config_in_a_dtype():
    with torch.device("meta"):
        made = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), dtype=torch.bfloat16)
    assert {(one.device.type, one.dtype) for one in made.parameters()} == {("meta", torch.bfloat16)}


@shows("._hf_peft_config_loaded")
def a_model_without_adapters_says_so():
    assert not model()._hf_peft_config_loaded


@shows("._is_hf_initialized")
def a_parameter_with_this_attribute_keeps_its_values():
    made = model()
    kept, other = made.lm_head.weight, made.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        kept.fill_(7), other.fill_(7)
    for one in made.modules():
        one._is_hf_initialized = False
    kept._is_hf_initialized = True
    made.init_weights()
    assert (kept == 7).all()
    assert not (other == 7).any()


class Keeping(LlamaForCausalLM):
    _keep_in_fp32_modules = ("up_proj",)
    _keep_in_fp32_modules_strict = ("down_proj",)
    _keys_to_ignore_on_save = ("lm_head.weight",)
    _keys_to_ignore_on_load_missing = ("lm_head.weight",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept")
    Keeping(LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


def float32_layers(dtype, path):
    made = Keeping.from_pretrained(path, dtype=dtype)
    return {name.split(".")[-2] for name, one in made.named_parameters() if one.dtype is torch.float32}


@shows("._keep_in_fp32_modules", "._keep_in_fp32_modules_strict")
def these_layers_stay_in_float32(name, path):
    strict = {"down_proj"}
    assert float32_layers(torch.float16, path) == {"up_proj"} | strict
    assert float32_layers(torch.bfloat16, path) == strict


@shows("._keys_to_ignore_on_save", "._keys_to_ignore_on_load_missing")
def these_parameters_are_not_saved_and_may_be_missing(name, path):
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    _, info = Keeping.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]


@shows("._name_or_path")
def a_loaded_config_has_the_name_of_its_folder(name, path):
    assert Keeping.from_pretrained(path).config._name_or_path == str(path)


@shows("._original_source_patterns", "._original_target_patterns", "transformers.core_model_loading.WeightConverter")
def a_converter_keeps_the_patterns_that_it_was_made_of(name):
    given = {"source_patterns": ["experts.*.w1.weight", "experts.*.w3.weight"], "target_patterns": "experts.up"}
    operations = [core_model_loading.MergeModulelist(dim=0), core_model_loading.Concatenate(dim=1)]
    made = core_model_loading.WeightConverter(**given, operations=operations)
    assert made._original_source_patterns == given["source_patterns"]
    assert made._original_target_patterns == [given["target_patterns"]]
    assert made.operations == operations


@shows("transformers.core_model_loading.Concatenate", "transformers.core_model_loading.MergeModulelist")
def operations_join_tensors(name):
    x = {"a": [torch.ones(2, 3)], "b": [torch.zeros(2, 3)]}
    if name.endswith("MergeModulelist"):
        joined = core_model_loading.MergeModulelist(dim=0).convert({"a": [x["a"][0], x["b"][0]]}, ["a"], ["c"])
        assert {key: tuple(one.shape) for key, one in joined.items()} == {"c": (2, 2, 3)}
    else:
        joined = core_model_loading.Concatenate(dim=1).convert(x, ["a", "b"], ["c"])
        assert joined["c"].tolist() == [[1.0] * 3 + [0.0] * 3] * 2
    assert core_model_loading.Concatenate(dim=1).dim == 1


@shows("transformers.core_model_loading.WeightRenaming", "transformers.core_model_loading.rename_source_key")
def a_renaming_and_a_converter_give_a_name_in_the_model(name):
    renamings = [core_model_loading.WeightRenaming("old", "new")]
    converters = [
        core_model_loading.WeightConverter(["a.*.w"], ["a.w"], operations=[core_model_loading.MergeModulelist(dim=0)])
    ]
    rename = core_model_loading.rename_source_key
    assert rename("x.old.weight", renamings, converters) == ("x.new.weight", None)
    found, pattern = rename("x.a.3.w", renamings, converters)
    assert (found, pattern is not None) == ("x.a.w", True)


class Doubling(core_model_loading.ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        return {key: [one * 2 for one in value] for key, value in input_dict.items()}


@shows(
    "transformers.core_model_loading.ConversionOps",
    "transformers.core_model_loading.convert_and_load_state_dict_in_model",
    "transformers.modeling_utils.LoadStateDictConfig",
)
def a_state_is_loaded_through_an_operation(name):
    made = model()
    key = "model.layers.0.mlp.up_proj.weight"
    converter = core_model_loading.WeightConverter(["up_proj.weight"], ["up_proj.weight"], operations=[Doubling()])
    how = LoadStateDictConfig(weight_mapping=[converter], dtype=torch.float32)
    core_model_loading.convert_and_load_state_dict_in_model(made, {key: torch.ones(16, 16)}, how)
    assert (made.state_dict()[key] == 2).all()


@shows("transformers.conversion_mapping.get_model_conversion_mapping")
def a_model_of_experts_has_converters():
    config = transformers.MixtralConfig(**CONFIG, num_local_experts=2)
    with torch.device("meta"):
        made = transformers.MixtralForCausalLM(config)
    kinds = {type(one) for one in conversion_mapping.get_model_conversion_mapping(made)}
    assert core_model_loading.WeightConverter in kinds
    assert not any(
        isinstance(one, core_model_loading.WeightConverter)
        for one in conversion_mapping.get_model_conversion_mapping(model())
    )


class Noting(base.HfQuantizer):
    requires_calibration = False

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.seen = []

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.seen.append("before" if next(model.parameters()).is_meta else "")

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.seen.append("" if next(model.parameters()).is_meta else "after")
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


class NotingConfig(QuantizationConfigMixin):
    def __init__(self, **options):
        self.quant_method = "insides_test"


@shows("._dequantize")
def a_quantizer_makes_a_model_dense_by_its_hook():
    class Dense(Noting):
        def _dequantize(self, model, dtype=None):
            self.seen.append(dtype)
            return model

    quantizer, dense = Dense(NotingConfig()), model()
    assert quantizer.dequantize(dense, torch.float64) is dense
    assert quantizer.seen == [torch.float64]


@shows(
    "._process_model_before_weight_loading",
    "._process_model_after_weight_loading",
    "transformers.quantizers.base.HfQuantizer",
    "transformers.quantizers.auto.register_quantizer",
    "transformers.quantizers.auto.register_quantization_config",
    "transformers.utils.quantization_config.QuantizationConfigMixin",
)
def a_registered_quantizer_is_called_before_and_after_loading(name, path):
    places = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    auto.register_quantizer("insides_test")(Noting)
    auto.register_quantization_config("insides_test")(NotingConfig)
    try:
        made = LlamaForCausalLM.from_pretrained(path, quantization_config=NotingConfig())
    finally:
        for place in places:
            del place["insides_test"]
    assert made.hf_quantizer.seen == ["before", "after"]


@shows("transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert")
def output_layers_are_left_dense():
    assert "lm_head" in base.HfQuantizer.get_modules_to_not_convert(model(), None, ["up_proj"])
    assert "up_proj" in base.HfQuantizer.get_modules_to_not_convert(model(), None, ["up_proj"])


@shows("transformers.quantizers.base.MODULES_TO_PATCH_FOR_QUANTIZATION")
def names_of_classes_lead_to_what_replaces_them():
    assert base.MODULES_TO_PATCH_FOR_QUANTIZATION
    assert all(isinstance(name, str) for name in base.MODULES_TO_PATCH_FOR_QUANTIZATION)


@shows("transformers.quantizers.quantizers_utils.should_convert_module")
def a_layer_is_left_dense_by_its_name_or_its_end():
    asks = quantizers_utils.should_convert_module
    assert asks("model.layers.0.mlp.up_proj", ["lm_head"])
    assert not asks("lm_head", ["lm_head"])
    assert not asks("model.layers.0.mlp.up_proj", ["up_proj"])


@shows("torch.ops.transformers.grouped_mm_fallback")
def the_fallback_multiplies_groups_of_rows():
    import transformers.integrations.moe  # noqa: F401 - registers it

    x, weight = torch.randn(4, 16), torch.randn(2, 16, 8)
    out = torch.ops.transformers.grouped_mm_fallback(x, weight, torch.tensor([1, 4], dtype=torch.int32))
    torch.testing.assert_close(out, torch.cat([x[:1] @ weight[0], x[1:] @ weight[1]]))


@shows("transformers.cache_utils.DynamicLayer", "transformers.cache_utils.DynamicSlidingWindowLayer")
def a_layer_of_a_cache_returns_all_states_that_it_keeps(name):
    layer = DynamicLayer() if name.endswith("DynamicLayer") else DynamicSlidingWindowLayer(sliding_window=4)
    states = torch.randn(1, 2, 3, 4)
    layer.update(states, states)
    keys, _ = layer.update(states, states)
    assert torch.equal(keys, torch.cat([states, states], 2))
    assert layer.get_seq_length() == 6
    assert layer.keys.shape[2] == (6 if name.endswith("DynamicLayer") else 3)


@shows("transformers.integrations.sdpa_attention.sdpa_attention_forward")
def attention_takes_heads_and_gives_tokens():
    module = nn.Module()
    module.is_causal = True
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    out, weights = sdpa_attention_forward(module, q, k, v, None, scaling=0.5)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None


@shows(
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get",
    "transformers.masking_utils.eager_mask",
    "transformers.masking_utils.sdpa_mask",
)
def each_attention_has_its_mask(name):
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    assert masks.get("sdpa") is masking_utils.sdpa_mask
    assert masks.get("eager") is masking_utils.eager_mask
    assert masks.get("absent") is None


@shows("transformers.pytorch_utils.Conv1D")
def the_weight_is_transposed():
    layer, x = Conv1D(3, 2), torch.randn(4, 2)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


@shows("transformers.utils.import_utils.is_gguf_available", "transformers.utils.import_utils.is_serve_available")
def a_package_is_looked_for(name):
    from importlib.util import find_spec

    asks = getattr(import_utils, name.rpartition(".")[2])
    packages = ("gguf",) if "gguf" in name else ("fastapi", "uvicorn", "pydantic", "openai")
    assert bool(asks()) == all(map(find_spec, packages))


@shows("transformers.cli.serve.Serve.__doc__")
def the_command_says_what_it_does():
    if not import_utils.is_serve_available():
        pytest.skip("transformers[serving] is not installed")
    from transformers.cli.serve import Serve

    assert Serve.__doc__


@shows("transformers.utils.logging")
def progress_bars_are_switched():
    bars = transformers.utils.logging
    bars.disable_progress_bar()
    assert not bars.is_progress_bar_enabled()


@pytest.mark.parametrize("name", [name for name in USES if needs_transformers(name)])
def test_an_inside_of_transformers_behaves_as_lowmem_expects(name, folder):
    check_use(name, folder)
