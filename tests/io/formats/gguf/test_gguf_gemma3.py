"""The config of a Gemma 3 becomes the fields that llama.cpp reads, and what llama.cpp does not compute is refused."""

import pytest

from lowmem.io.formats.gguf.gguf_metadata import gguf_model_fields

GEMMA3 = {
    **{"model_type": "gemma3_text", "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 96},
    **{"vocab_size": 96, "sliding_window": 512},
}


def test_the_config_of_a_gemma_3_becomes_fields():
    """As the files on the Hub say it, which leave out what is a default; and as transformers writes it now."""
    fields = gguf_model_fields(GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None})
    assert fields["gemma3.attention.sliding_window_pattern"] == 6
    assert (fields["gemma3.rope.freq_base"], fields["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
    assert (fields["gemma3.attention.key_length"], fields["gemma3.context_length"]) == (256, 131072)
    assert fields == gguf_model_fields(GEMMA3)
    scaled = gguf_model_fields(GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled == fields | {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": None}
    assert gguf_model_fields(GEMMA3 | {"rope_parameters": ropes}) == scaled
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    assert gguf_model_fields(GEMMA3 | {"layer_types": types[:8]})["gemma3.attention.sliding_window_pattern"] == 3
    alone = ["sliding_attention"] * 8
    assert gguf_model_fields(GEMMA3 | {"layer_types": alone})["gemma3.attention.sliding_window_pattern"] == 9
    large = GEMMA3 | {"num_hidden_layers": 62, "query_pre_attn_scalar": 8}
    assert gguf_model_fields(large)["gemma3.block_count"] == 62


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu': llama.cpp computes 'gelu_pytorch_tanh'"),
        ({"query_pre_attn_scalar": 128}, "query_pre_attn_scalar=128: llama.cpp computes 256"),
        ({"num_hidden_layers": 62, "query_pre_attn_scalar": 256}, "query_pre_attn_scalar=256: llama.cpp computes 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"sliding_window": 0}, "sliding_window=0 must be a positive integer"),
        ({"sliding_window_pattern": "6"}, "sliding_window_pattern='6' must be a positive integer"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 4}, r"layer_types=\['full_attention'"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types=\['sliding_attention'\]"),
        ({"head_dim": 128}, "query_pre_attn_scalar=256: llama.cpp computes 128"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention'"),
        ({"rope_parameters": []}, None),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
        ({"rope_parameters": {"full_attention": 3}}, "full_attention=3 must be an object"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
            "rope_type='yarn': llama.cpp computes default or linear",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "llama.cpp computes default in a gemma3",
        ),
        ({"model_type": "gemma3"}, "model_type='gemma3' is no architecture"),
    ],
)
def test_a_gemma_3_that_llama_cpp_does_not_compute_is_refused_by_name(changes, why):
    if why is None:
        assert gguf_model_fields(GEMMA3 | changes) == gguf_model_fields(GEMMA3)
        return
    with pytest.raises(ValueError, match=why):
        gguf_model_fields(GEMMA3 | changes)
