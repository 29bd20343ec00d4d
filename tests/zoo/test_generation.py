"""Real architectures, prepared for inference, generate in every mode what they generated before: ``tox -e zoo``."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e zoo")
pytest.importorskip("torchvision", reason="torchvision is not installed: tox -e zoo")

from transformers import LogitsProcessor

import lowmem
from lowmem.integrations.transformers.key_value_cache import InPlaceCacheLayer
from tests.zoo.architectures import ARCHITECTURES

pytestmark = [pytest.mark.filterwarnings("ignore:.*are weights that stay dense"), pytest.mark.thorough(keep=1)]

GREEDY = {"do_sample": False}
MODES = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": GREEDY | {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "left padding": GREEDY,
    "assisted": GREEDY | {"assistant_model": None},
    "prompt lookup": GREEDY | {"prompt_lookup_num_tokens": 3},
    "static": GREEDY | {"cache_implementation": "static"},
    "offloaded": GREEDY | {"cache_implementation": "offloaded"},
    "quantized": GREEDY | {"cache_implementation": "quantized"},
}
GENERATING = {name: architecture for name, architecture in ARCHITECTURES.items() if architecture.generates}
# Their attention has code of its own that keeps states elsewhere, or they have none
RECURRENT = "rwkv", "mamba", "mamba2", "falcon_mamba", "xlnet"


class Deciding(LogitsProcessor):
    """Rounds, so that tokens do not depend on rounding errors."""

    def __call__(self, input_ids, scores):
        return (scores * 64).round() / 64


def converted(architecture, prepared):
    model = lowmem.convert(architecture.make(), lowmem.FourBit("int4", 32))
    return lowmem.prepare_inference(model) if prepared else model


def outcome(architecture, mode, prepared):
    """Return the tokens of a mode, or the error that transformers raises; and the classes of the cache's layers."""
    model, kinds = converted(architecture, prepared), set()

    def see(module, args, kwargs):
        cache = kwargs.get("cache")
        kinds.update(map(type, getattr(getattr(cache, "self_attention_cache", cache), "layers", ())))

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    given = {name: value for name, value in architecture.inputs().items() if not name.startswith("decoder_")}
    if mode in ("assisted", "prompt lookup"):
        given = {name: value[:1] for name, value in given.items()}
    named = given | MODES[mode]
    if mode == "assisted":
        named["assistant_model"] = converted(architecture, prepared)
    if mode == "left padding" and "attention_mask" in named:
        named["attention_mask"] = named["attention_mask"].clone()
        named["attention_mask"][0, :2] = 0
    torch.manual_seed(0)
    try:
        tokens = model.generate(**named, min_new_tokens=8, max_new_tokens=8, logits_processor=[Deciding()]).tolist()
    except Exception as error:  # noqa: BLE001 - modes that this architecture does not have raise the same
        tokens = type(error)
    finally:
        handle.remove()
    return tokens, kinds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GENERATING)
def test_a_prepared_architecture_generates_the_same_tokens(name, mode):
    expected, kinds = outcome(GENERATING[name], mode, False)
    got, prepared_kinds = outcome(GENERATING[name], mode, True)
    assert got == expected
    if mode == "greedy":
        assert isinstance(expected, list), expected
        grow = any(kind.__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer") for kind in kinds)
        assert any(issubclass(kind, InPlaceCacheLayer) for kind in prepared_kinds) == grow, prepared_kinds
