"""Whole folders as the packages write them: what ``from_exact`` keeps is what transformers dequantizes."""

import json
import warnings

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e formats")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: tox -e formats")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: tox -e formats")
pytest.importorskip("accelerate", reason="accelerate is not installed: tox -e formats")

from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from lowmem.integrations.transformers import from_exact
from lowmem.io.formats.export_model import export
from tests.formats.makers import compressed_tensors
from tests.integrations.transformers.folders import IDS, load, write
from tests.integrations.transformers.foreign import is_layer, values
from tests.integrations.transformers.test_foreign_checkpoint import write_gpt_oss

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages


def assert_equal(model, expected):
    """All weights are bit for bit the same, and as many are stored as the package has quantized."""
    found = values(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].view(torch.int32), value.float().contiguous().view(torch.int32)), name


def bitsandbytes_values(model) -> dict[str, torch.Tensor]:
    """Return what the package says that a model's parameters hold."""
    from bitsandbytes import functional

    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = torch.float32
            parameter = functional.dequantize_4bit(parameter.data, state)
        found[name] = parameter.detach().float()
    return found


def test_bitsandbytes(tmp_path):
    dense = write(tmp_path / "dense", "llama")
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            asked = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=kind,
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.float32,
            )
            theirs = load(dense, quantization_config=asked, dtype=torch.float32)
            folder = tmp_path / f"{kind} {double}"
            theirs.save_pretrained(folder)
            ours = from_exact(folder, dtype=torch.float32)
            layers = ours.model.layers[0]
            assert layers.self_attn.q_proj.forms["weight"].format == {"nf4": "nf4", "fp4": "bnb_fp4"}[kind]
            expected = bitsandbytes_values(load(folder, dtype=torch.float32))
            rows_end = {name for name in expected if "down_proj" in name}  # rows of 96: their operator is wrong there
            found = values(ours)
            for name in expected.keys() - rows_end:
                assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(tmp_path, symmetric):
    """What lowmem keeps is what the package decompresses, and is written back with the same bytes.

    transformers decompresses symmetric ones on the CPU. Parameters that it makes for zero points have another shape
    than compressed-tensors 0.20 itself writes, so that it refuses any such folder.
    """
    folder = write(tmp_path / "folder", "llama")
    state = load_file(folder / "model.safetensors")
    parts, expected = {}, {}
    for number, (name, value) in enumerate(sorted(state.items())):
        expected[name] = value
        if is_layer(name) and value.shape[1] == 64:
            (expected[name],) = compressed_tensors(
                tmp_path / "one.safetensors", number, rows=value.shape[0], symmetric=symmetric
            ).values()
            made = load_file(tmp_path / "one.safetensors")
            parts |= {name.replace("weight", part.removeprefix("layer.")): one for part, one in made.items()}
        else:
            parts[name] = value
    save_file(parts, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}
    quantization |= {"ignore": ["lm_head", "re:.*down_proj"], "quantization_status": "compressed"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    ours = from_exact(folder)
    assert_equal(ours, expected)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        rows = export(tmp_path / "ours", tmp_path / "out", format="compressed-tensors")
    assert all(row.error is None for row in rows)
    assert any("zero points" in row.kind for row in rows) != symmetric
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == parts.keys()
    for name, part in parts.items():  # transformers casts scales to the dtype that it computes in
        assert torch.equal(written[name], part.float() if name.endswith("weight_scale") else part), name
    assert any("zero points" in str(note.message) for note in notes) != symmetric
    for path in (folder, tmp_path / "out") if symmetric else ():
        theirs = load(path)
        with torch.inference_mode():
            wanted, found = (one(IDS).logits.double() for one in (theirs, ours))
        assert float((wanted - found).norm()) < 1e-5 * float(wanted.norm())


def test_gpt_oss(tmp_path):
    """transformers dequantizes such a folder on the CPU."""
    folder, _ = write_gpt_oss(tmp_path / "folder")
    ours = from_exact(folder, dtype=torch.float32)
    theirs = load(folder, dtype=torch.float32)
    assert_equal(ours, {name: value.detach() for name, value in theirs.named_parameters()})
    with torch.inference_mode():
        wanted, found = (one(IDS).logits.double() for one in (theirs, ours))
    assert float((wanted - found).norm()) < 1e-5 * float(wanted.norm())
