"""Whether GGUF will hold a model exactly, by its config, names and shapes, before it is trained or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from lowmem.errors import FileError, file_error, value_errors_as_file_errors
from lowmem.io.formats.gguf.gguf_block_types import DENSE
from lowmem.io.formats.gguf.gguf_encoding import exact_type_and_row_bytes_or_none, form_mismatch_reason_or_none
from lowmem.io.formats.gguf.gguf_metadata import DESCRIBED, gguf_architecture_of_model_type_or_raise
from lowmem.io.formats.gguf.gguf_tensor_names import tensor_name_map_from_metadata
from lowmem.io.formats.gguf.gguf_tokenizer_fields import tokenizer_and_chat_template_fields
from lowmem.io.formats.gguf.gguf_writer import check_weights_match_metadata, checked_name_map_and_metadata
from lowmem.io.formats.lazy_model import LazyModelContent, open_lazy_model
from lowmem.io.shards import LazyWeight
from lowmem.io.training_record import StorageTechnique
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import CHOICES, Budget, FourBit, Half, embedding_and_output_technique
from lowmem.quant.tensor import QuantizedTensor

LLAMA_CPP = FourBit("iq4_nl", embeddings="q8_0")
"""How a model is stored for llama.cpp: in what GGUF holds exactly, with the least loss."""

_EMBEDDING = "token_embd.weight"
_ENDS = (_EMBEDDING, "output.weight")
_MODEL_ENDS = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class GGUFOutlook:
    """What ``lowmem export`` will make of a model.

    Args:
        refusal: the error of its export; None: it is written.
        inexact: a weight that GGUF does not hold as it will be stored, and why; None: there is none.
        remedy: how to train on a base without such a weight.
        like: why ``--like`` has to name an existing file of the model; None: it need not.
    """

    refusal: str | None = None
    inexact: str | None = None
    remedy: str = ""
    like: str | None = None

    def check_exact(self, path: Path, task: str) -> None:
        """Raise a FileError, with the task, unless the model will be written exactly."""
        if self.refusal is not None:
            # Which names the path
            raise FileError(f"{self.refusal}; leave --for llama.cpp out")
        if self.inexact is not None:
            raise file_error(path, f"{self.inexact}; leave --for llama.cpp out", task)

    def description(self) -> str:
        """Return one line: whether export will write a base exactly, and else with which option of ``fit``."""
        like = "" if self.like is None else f"; export needs --like GGUF, since {self.like}"
        if self.refusal is not None:
            return f"no export to GGUF: {self.refusal}"
        if self.inexact is None:
            return f"export to GGUF: exact, so that llama.cpp computes with the weights as they are stored{like}"
        return f"export to GGUF: not exact, since {self.inexact}; {self.remedy} trains on a base that is{like}"


def gguf_outlook(source: Path, technique: StorageTechnique, targets: Sequence[str] = ()) -> GGUFOutlook:
    """Return what ``lowmem export`` will make of a folder, or of a GGUF file, which it copies.

    Args:
        source: a folder, dense or stored, or a GGUF file.
        technique: how the weights of a dense folder will be stored; None: all are as they are.
        targets: paths, their ends or glob patterns of the layers that an adapter has; none: the default ones.
    """
    if source.is_file():
        return GGUFOutlook()
    try:
        with open_lazy_model(source) as model:
            weights, like = _checked_weights_and_like_reason(model)
            patterns = [pattern for name in targets for pattern in (name, f"*.{name}")]
            are_tied = _ENDS[1] not in weights
            if are_tied and any(fnmatchcase(end, pattern) for end in _MODEL_ENDS for pattern in patterns):
                why = "llama.cpp adapts neither end of a model whose ends share a weight: leave it out of --target"
                raise file_error(source, why, "export an adapter of")
            inexact = _first_inexact_reason_or_none(weights, technique)
            if inexact is None:
                return GGUFOutlook(like=like)
            if any(isinstance(weight.form, CodedForm) for weight in weights.values()):
                return GGUFOutlook(None, inexact, "--for llama.cpp with the dense model", like)
            is_remedy = _first_inexact_reason_or_none(weights, LLAMA_CPP) is None
            return GGUFOutlook(None, inexact, "--for llama.cpp" if is_remedy else "--format dense", like)
    except FileError as error:
        return GGUFOutlook(str(error))


def _checked_weights_and_like_reason(model: LazyModelContent) -> tuple[dict[str, LazyWeight], str | None]:
    """Return a model's weights by name in GGUF, and why export needs ``--like``, or None.

    Raises:
        FileError: a config, a name or a shape that is not written, with or without ``--like``.
    """
    with value_errors_as_file_errors(model.path, "export"):
        architecture = gguf_architecture_of_model_type_or_raise(model.config or {})
        if architecture in DESCRIBED:
            names, numbers = checked_name_map_and_metadata(model, None)
        else:
            names, numbers = tensor_name_map_from_metadata({"general.architecture": architecture}), None
        weights = {names.gguf_name(weight.name): weight for weight in model.weights.values()}
    if numbers is None:
        return weights, f"the config of a {architecture} does not say all that llama.cpp needs"
    shapes = {name: weight.shape for name, weight in weights.items()}
    check_weights_match_metadata(model, names, numbers, shapes, "config.json")
    try:
        tokenizer_and_chat_template_fields(model.path, model.config or {}, shapes[_EMBEDDING][0])
    except FileError as error:
        return weights, str(error)
    return weights, None


def _first_inexact_reason_or_none(weights: Mapping[str, LazyWeight], technique: StorageTechnique) -> str | None:
    reasons = (_inexact_reason_or_none(name, weight, technique) for name, weight in weights.items())
    return next(filter(None, reasons), None)


def _inexact_reason_or_none(gguf_name: str, weight: LazyWeight, technique: StorageTechnique) -> str | None:
    form = _planned_form(gguf_name, weight, technique)
    if isinstance(form, torch.dtype):
        reason = None if form in DENSE or len(weight.shape) == 1 else "which GGUF does not have"
    elif weight.order is not None or weight.is_transposed:
        reason = f"its {'rows' if weight.order is None else 'columns'} are stored in another order"
    else:
        reason = form_mismatch_reason_or_none(form, weight.shape[-1]) or _scale_reason_or_none(form, weight)
    return None if reason is None else f"{weight.name} is in {form}, {reason}"


def _planned_form(gguf_name: str, weight: LazyWeight, technique: StorageTechnique) -> CodedForm | torch.dtype:
    """Return how a weight is stored, or will be if it is dense now."""
    if technique is None or len(weight.shape) < 2 or isinstance(weight.form, CodedForm):
        return weight.form
    if isinstance(technique, Half):
        return technique.dtype
    # All but the last one of the choices differ in their blocks alone
    technique = CHOICES[0] if isinstance(technique, Budget) else technique
    if isinstance(technique, FourBit) and gguf_name in _ENDS:
        technique = embedding_and_output_technique(technique)
    return CodedForm.from_quantized_tensor(
        technique.skeleton(torch.empty(weight.shape, dtype=torch.float32, device="meta"))
    )


def _scale_reason_or_none(form: CodedForm, weight: LazyWeight) -> str | None:
    """Return why no type of GGUF has the scales of a weight, whose levels and blocks one has; None: one has them."""
    if isinstance(weight.form, CodedForm):
        stored = weight.read()
        is_exact = isinstance(stored, QuantizedTensor) and exact_type_and_row_bytes_or_none(stored) is not None
    else:
        # Of fp4, GGUF holds powers of two alone
        is_exact = form.scale_encoding.startswith("float16") and form.format != "fp4"
    return None if is_exact else "whose scales GGUF does not hold"
