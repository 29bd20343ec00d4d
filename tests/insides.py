"""What lowmem uses of other libraries' insides: the walk that finds the uses, and the one list of them (``USES``)."""

import ast
import sys
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils import checkpoint

import lowmem
from lowmem.nn.forms import CodedForm, HalfForm

PACKAGE = Path(lowmem.__file__).parent
OTHERS = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "rich", "tokenizers", "argparse")
OTHERS += ("filelock", "huggingface_hub", "sentence_transformers", "triton", "re")

# Modules of torch that its documentation describes; of transformers it describes the root.
DOCUMENTED = ("torch", "torch.nn", "torch.nn.functional", "torch.nn.parameter", "torch.nn.utils", "torch.autograd")
DOCUMENTED += ("torch.autograd.graph", "torch.autograd.forward_ad", "torch.nn.utils.parametrize", "torch.optim")
DOCUMENTED += ("torch.utils.checkpoint", "torch.utils.tensorboard", "torch.overrides", "torch.compiler", "torch.fx")
DOCUMENTED += ("torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.library")
DOCUMENTED += ("torch.jit", "torch.distributed.device_mesh", "torch.func", "torch.serialization", "torch.cuda")
DOCUMENTED += ("torch.linalg", "torch.special", "torch.random", "torch.version", "torch.onnx", "torch.nn.init")
DOCUMENTED += ("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils")
DOCUMENTED += ("torch.nn.parallel", "torch.nn.modules.module", "torch.backends.cpu", "torch.backends.mha")
STANDARD = {"_replace", "_fields", "_asdict", "_make", "_exit"}  # the standard library documents them
READERS = {"getattr", "hasattr", "setattr", "delattr"}


def is_hidden(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != "" and name not in STANDARD


def _of_objects() -> set[str]:
    """Return the hidden names of torch's objects, and of its checkpoint's classes: some are lowmem's, too."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    objects = (nn.LSTM(1, 1), nn.Conv2d(1, 1, 1), nn.Parameter(torch.ones(1)), optimizer)
    classes = {name for name, value in vars(checkpoint).items() if isinstance(value, type)}
    return {name for name in (*classes, *(name for one in objects for name in dir(one))) if is_hidden(name)}


OF_OBJECTS = _of_objects()
OPERATORS = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
TEXTS = OF_OBJECTS | {name for name in OPERATORS if is_hidden(name)}
SUFFIXES = {f"_{part}" for form in (CodedForm, HalfForm) for part in (*form.parts, "order")}


def aliases(tree: ast.Module) -> dict[str, str]:
    """Return the full names of what a module imports of others, and of names that it gives to parts of these."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OTHERS:
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            names = {one.asname or one.name.split(".")[0]: one.name if one.asname else "" for one in node.names}
            found |= {name: full or name for name, full in names.items() if (full or name).split(".")[0] in OTHERS}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
            for target, value in pairs:
                full = full_name(value, found)
                if isinstance(target, ast.Name) and full:
                    found[target.id] = full
    return found


def full_name(node: ast.AST, known: dict[str, str]) -> str:
    """Return the path of an attribute of a library, such as torch.nn.Linear; "" if it begins with another name."""
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, known)
        return f"{owner}.{node.attr}" if owner else ""
    return known.get(node.id, "") if isinstance(node, ast.Name) else ""


def is_inside(path: str) -> bool:
    """Whether a full name is private, or of a module that its library does not document."""
    parts = path.split(".")
    if any(map(is_hidden, parts)):
        return True
    if path in DOCUMENTED:
        return False
    if parts[0] == "transformers":
        return len(parts) > 2 and parts[1].islower()
    if parts[0] in ("peft", "accelerate"):
        return len(parts) > 2
    if parts[:2] == ["torch", "ops"]:  # the operators of aten are documented, but for those of gradients
        return (parts[2:3] == ["aten"] and parts[-1].endswith("_backward")) or parts[2:3] == ["transformers"]
    return parts[0] == "torch" and not _is_documented(path)


def _is_documented(path: str) -> bool:
    """Whether a path of torch begins with a documented module, and goes on with a name that is no module."""
    rests = {one: path.removeprefix(f"{one}.") for one in DOCUMENTED if path.startswith(f"{one}.")}
    return any(f"{one}.{rest.partition('.')[0]}" not in sys.modules for one, rest in rests.items())


def own_names(trees: list[ast.Module]) -> set[str]:
    """Return the hidden names that lowmem defines: functions, classes, variables, attributes of ``self``."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if _last_name(node.value) in ("self", "cls") else set()
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and _is_dict(node.value):
            found |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
    return {name for name in found if is_hidden(str(name))}


def _is_dict(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _last_name(node.func) == "vars"
    return isinstance(node, ast.Attribute) and node.attr == "__dict__"


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def texts_as_names(tree: ast.Module) -> set[str]:
    """Return the texts that a module uses as names of attributes, or that are hidden names of torch's objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            of_dict = isinstance(node.func, ast.Attribute) and _is_dict(node.func.value)
            if of_dict or _last_name(node.func) in {*READERS, "startswith"}:
                found |= {one.value for one in node.args if isinstance(one, ast.Constant)}
        elif isinstance(node, ast.Subscript) and _is_dict(node.value) and isinstance(node.slice, ast.Constant):
            found.add(node.slice.value)
        elif isinstance(node, ast.Constant) and node.value in TEXTS:
            found.add(node.value)
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            found |= {one.value for one in node.elts if isinstance(one, ast.Constant)}
    return {name for name in found if isinstance(name, str) and is_hidden(name) and name.isidentifier()} - SUFFIXES


def overridden(tree: ast.Module) -> set[str]:
    """Return the hidden names of methods of classes that have base classes."""
    bodies = [one for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases for one in node.body]
    return {one.name for one in bodies if isinstance(one, ast.FunctionDef) and is_hidden(one.name)}


def uses_of(tree: ast.Module, own: set[str], called: set[str]) -> set[str]:
    """Return the insides of other libraries that a module uses.

    A name with dots is a path from a library on; ``.name`` is an attribute of an object.

    Args:
        tree: the module.
        own: hidden names that lowmem defines.
        called: hidden names that lowmem reads as attributes: other methods are called by another library.
    """
    known, paths, names = aliases(tree), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            paths |= {f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            paths |= {one.name for one in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            paths |= {node.value} if node.value.replace(".", "").isidentifier() else set()
        elif isinstance(node, ast.Attribute):
            path = full_name(node, known)
            if path:
                paths.add(path)
            elif is_hidden(node.attr) and (_last_name(node.value) not in ("self", "cls") or node.attr not in own):
                names.add(node.attr)
    paths = {path for path in paths if not any(other.startswith(f"{path}.") for other in paths)}
    paths = {path for path in paths if path.split(".")[0] in OTHERS and is_inside(path)}
    hooks = {name for name in overridden(tree) if name in OF_OBJECTS or name not in called}
    read = {name for name in names if name not in own or name in OF_OBJECTS}
    read |= {name for name in texts_as_names(tree) if name not in own or name in TEXTS}
    read = {name for name in read if not name.startswith("_lowmem")}
    return paths | {f".{name}" for name in read | hooks}


@cache
def all_uses() -> dict[str, list[str]]:
    """Return the insides of other libraries that lowmem uses, with the files that use each."""
    trees = {path: ast.parse(path.read_text(encoding="utf8")) for path in sorted(PACKAGE.rglob("*.py"))}
    own = own_names([*trees.values()])
    called = {node.attr for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called |= {name for tree in trees.values() for name in texts_as_names(tree)}
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for name in uses_of(tree, own, called):
            found.setdefault(name, []).append(path.relative_to(PACKAGE).as_posix())
    return dict(sorted(found.items()))


# What lowmem uses, and what for. ``.name`` is an attribute or method of objects, an operator, or the name of a class.
# A test of each shows that it still behaves so: test_insides.py here and in integrations/transformers.
USES = {
    # Attributes of modules
    "._parameters": "a module's own parameters, read without the properties that stored and adapted ones are",
    "._buffers": "a module's own buffers, copied and put back",
    "._modules": "a module's children, read without its __getattr__",
    "._non_persistent_buffers_set": "which buffers a state_dict leaves out",
    "._forward_hooks": "hooks of a call: they stay when parameters are stored, and forbid to bypass the call",
    "._forward_pre_hooks": "as _forward_hooks; the hook of weight_norm is one",
    "._forward_hooks_with_kwargs": "as _forward_hooks",
    "._forward_hooks_always_called": "as _forward_hooks",
    "._forward_pre_hooks_with_kwargs": "as _forward_pre_hooks",
    "._backward_hooks": "as _forward_hooks",
    "._backward_pre_hooks": "as _forward_hooks",
    "._load_state_dict_post_hooks": "a module with adapters merges them again after it has loaded a state",
    "._compiled_call_impl": "the code of module.compile(), which must not be bypassed",
    "._apply": "casts and moves parts without changing their bits",
    "._load_from_state_dict": "refuses states with other forms",
    "._version": "of a module: its state's version, which names the formats; of a tensor: how often it was written",
    "torch.nn.Module._version": "whether a class has a version of its own",
    "torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX": "the key of get_extra_state, which names the formats",
    "torch.nn.modules.module._global_forward_hooks": "hooks for all modules: a call that they see is not bypassed",
    "torch.nn.modules.module._global_forward_pre_hooks": "as _global_forward_hooks",
    "torch.nn.modules.module._global_backward_hooks": "as _global_forward_hooks",
    "torch.nn.modules.module._global_backward_pre_hooks": "as _global_forward_hooks",
    # Layers
    "._flat_weights": "recurrent layers: their weights in the kernels' order, without weak references",
    "._flat_weights_names": "as _flat_weights",
    "._flat_weight_refs": "as _flat_weights",
    "._conv_forward": "a convolution with its padding mode, of a given weight",
    "._reversed_padding_repeated_twice": "the padding of a convolution that is not of zeros",
    "._WeightNorm": "recognizes weight_norm, which keeps its weights stored, and the older one, a hook",
    "torch.nn.utils.weight_norm.WeightNorm": "as _WeightNorm",
    "torch.nn.modules.conv._ConvNd": "the base classes of convolutions",
    "torch.nn.modules.conv._ConvTransposeNd": "as _ConvNd",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": "a layer that nn.MultiheadAttention never calls",
    "torch.nn.grad.conv1d_input": "the gradient of a convolution's input, of some output channels",
    "torch.nn.grad.conv2d_input": "as conv1d_input",
    "torch.nn.grad.conv3d_input": "as conv1d_input",
    # Tensors
    "._base": "finds out whether a result is a view; one of a stored weight is returned as no view",
    "._cdata": "the identity of a tensor's memory, by which bytes are counted once",
    "._is_param": "is set: stored and adapted weights are parameters for isinstance",
    "._is_zerotensor": "a gradient without memory, which C cannot read",
    "._indices": "memory of a sparse tensor that is not coalesced",
    "._values": "memory of a sparse tensor that is not coalesced",
    "._has_method": "whether an object of TorchScript gives its tensors",
    "._schema": "an operator's name, its arguments, and whether it returns views or writes",
    "torch.Tensor._make_wrapper_subclass": "makes tensors without memory: stored and adapted weights, logits, states",
    "torch._C.DisableTorchFunctionSubclass": "calls a function without __torch_function__ of subclasses",
    "torch._C._nn._parse_to": "reads the arguments of Tensor.to",
    "torch._C._to_dlpack": "gives C the memory of a tensor",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "whether a tensor has no memory but that of others",
    "torch.utils.weak.WeakTensorKeyDictionary": "parameters that were moved to the meta device, by identity",
    # Operators
    "._to_copy": "the operator of casts: a stored weight changes its dtype alone",
    "._unsafe_view": "operators that share memory, as view does",
    "._reshape_alias": "operators that share memory, as view does",
    "._has_compatible_shallow_copy_type": "by its answer False, Module.to makes a new parameter",
    "._embedding_bag": "the operators of EmbeddingBag, which reads some rows",
    "._embedding_bag_forward_only": "as _embedding_bag",
    "._grouped_mm": "the product of groups in torch before 2.10",
    "._weight_norm_interface": "weight_norm and its gradient, of rows",
    "._weight_norm_interface_backward": "as _weight_norm_interface",
    "._scaled_dot_product": "begins the names of attention's operators, whose results a checkpoint keeps",
    "torch.ops.aten._to_copy.default": "as _to_copy",
    "torch.ops.aten._embedding_bag_forward_only.default": "as _embedding_bag",
    "torch.ops.aten.gelu_backward": "gradients of functions whose input or output is computed again",
    "torch.ops.aten.silu_backward": "as gelu_backward",
    "torch.ops.aten.native_layer_norm_backward": "as gelu_backward",
    "torch._decomp.decomposition_table": "torch.onnx.export finds the parts of lowmem's operators, and shapes",
    "torch._decomp.meta_table": "as decomposition_table",
    # Autograd
    "._backward_cls": "recognizes the node of lowmem's own function",
    "._saved_tensors_hooks_is_enabled": "saved-tensor hooks: the user's, a checkpoint's, or forbidden",
    "._top_saved_tensors_default_hooks": "as _saved_tensors_hooks_is_enabled",
    "torch._C._autograd": "as _saved_tensors_hooks_is_enabled",
    "torch._C._functions.DelayedError": "an error when something is differentiated twice",
    "torch._C._AutoDispatchBelowAutograd": "calls an operator without autograd, as its own kernel for autograd",
    "torch.autograd.forward_ad._current_level": "whether forward-mode derivatives are computed",
    "torch._C._is_any_autocast_enabled": "whether any device has autocast, at the cost of one call",
    "torch._C._are_functorch_transforms_active": "whether torch.func transforms a call: autograd is not bypassed",
    "torch._C._functorch.is_batchedtensor": "refuses a stack of stored weights under vmap",
    "torch._C._functorch.is_legacy_batchedtensor": "gradients of is_grads_batched, which have no memory",
    # Modes, traces and graphs
    "._CachingTorchDispatchMode": "the modes of a selective checkpoint: results are not written to",
    "._CachedTorchDispatchMode": "as _CachingTorchDispatchMode",
    "torch._C._TorchDispatchModeKey.FAKE": "fake tensors and traces: a product is an operator, not C",
    "torch._C._TorchDispatchModeKey.PROXY": "as FAKE",
    "torch._C._TorchDispatchModeKey.FUNCTIONAL": "as FAKE",
    "torch._C._get_dispatch_mode": "the active modes; without one, calls go straight to C",
    "torch._C._get_dispatch_stack_at": "as _get_dispatch_mode",
    "torch._C._len_torch_dispatch_stack": "as _get_dispatch_mode",
    "torch._C._get_tracing_state": "whether torch.jit.trace records",
    "torch._C._is_tracing": "as _get_tracing_state",
    "torch.utils._python_dispatch.TorchDispatchMode": "sees each operator, to count its memory",
    "torch.utils._python_dispatch._disable_current_modes": "runs what a selective checkpoint must not see",
    "torch.utils._python_dispatch._pop_mode": "as _disable_current_modes",
    "torch.utils._python_dispatch._push_mode": "as _disable_current_modes",
    "._FrameAction": "leaves a function to Python under torch.compile, without importing the compiler",
    "._FrameExecStrategy": "as _FrameAction",
    "torch._C._dynamo.eval_frame": "as _FrameAction",
    "._dynamo_marked_constant": "is set: torch.compile records a function's result, without importing the compiler",
    "torch.compiler._is_exporting_flag": "whether torch.export records, before torch 2.12",
    "torch._subclasses.FakeTensor": "a state without values",
    "torch._subclasses.fake_tensor.FakeTensorMode": "lowmem.plan runs a model without memory",
    "torch._subclasses.fake_tensor.DataDependentOutputException": "lowmem.plan explains what fake tensors cannot do",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException": "as DataDependentOutputException",
    "torch._subclasses.fake_tensor.UnsupportedFakeTensorException": "as DataDependentOutputException",
    "torch._subclasses.fake_tensor.UnsupportedOperatorException": "as DataDependentOutputException",
    "torch.utils._pytree.tree_flatten": "the tensors in a nested output or among arguments",
    "torch.utils._pytree.tree_unflatten": "as tree_flatten",
    "torch.utils._pytree.tree_leaves": "as tree_flatten",
    "torch.utils._pytree.tree_map": "as tree_flatten",
    "torch.utils._pytree.tree_map_only": "as tree_flatten",
    "._optimizer_step_pre_hooks": "whether an optimizer has master weights already",
    # FSDP2
    ".__composable_api_state_key": "the state of fully_shard, which a copy of a module leaves out",
    "._is_fsdp_managed_module": "as __composable_api_state_key",
    "._fsdp_use_orig_params": "as __composable_api_state_key",
    # The standard library
    "argparse._ActionsContainer": "a parser or a group of its arguments, as a type",
    "._print_message": "errors of writing a command's help are raised",
    # transformers
    "._attn_implementation": "the attention of a config, put back after blocks were recognized",
    "._from_config": "makes a model of a config on the meta device",
    "._hf_peft_config_loaded": "a model with adapters of PEFT saves these alone",
    "._is_hf_initialized": "is set: transformers leaves the values of stored parts",
    "._keep_in_fp32_modules": "layers that transformers keeps in float32 stay dense",
    "._keep_in_fp32_modules_strict": "as _keep_in_fp32_modules",
    "._keys_to_ignore_on_load_missing": "parameters that a folder need not hold, or that transformers does not save",
    "._keys_to_ignore_on_save": "as _keys_to_ignore_on_load_missing",
    "._name_or_path": "the name of an adapter's base",
    "._original_source_patterns": "the names of a file's tensors that become one weight",
    "._original_target_patterns": "as _original_source_patterns",
    "._dequantize": "the quantizer's hooks: modules store weights, the loaded model is checked, modules become dense",
    "._process_model_before_weight_loading": "as _dequantize",
    "._process_model_after_weight_loading": "as _dequantize",
    "torch.ops.transformers.grouped_mm_fallback": "the product of experts in models of transformers",
    "transformers.cache_utils.DynamicLayer": "keys and values of a layer, which lowmem's cache extends",
    "transformers.cache_utils.DynamicSlidingWindowLayer": "as DynamicLayer",
    "transformers.cli.serve.Serve.__doc__": "lowmem serve is transformers' command with limits",
    "transformers.conversion_mapping.get_model_conversion_mapping": "how a folder's tensors become a model's",
    "transformers.core_model_loading.Concatenate": "experts that are one weight in a model",
    "transformers.core_model_loading.ConversionOps": "the base of the operation that stores a tensor",
    "transformers.core_model_loading.MergeModulelist": "as Concatenate",
    "transformers.core_model_loading.WeightConverter": "how a folder's tensors become a model's",
    "transformers.core_model_loading.WeightRenaming": "as WeightConverter",
    "transformers.core_model_loading.convert_and_load_state_dict_in_model": "loads a model's parts once more",
    "transformers.core_model_loading.rename_source_key": "as WeightConverter",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": "attention that lowmem.attend falls back to",
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get": "which mask a model's attention gets",
    "transformers.masking_utils.eager_mask": "which mask a model's attention gets",
    "transformers.masking_utils.sdpa_mask": "which mask a model's attention gets",
    "transformers.modeling_utils.LoadStateDictConfig": "as convert_and_load_state_dict_in_model",
    "transformers.pytorch_utils.Conv1D": "a linear layer with a transposed weight, in other programs' folders",
    "transformers.quantizers.auto.register_quantization_config": "registers lowmem's config and quantizer",
    "transformers.quantizers.auto.register_quantizer": "as register_quantization_config",
    "transformers.quantizers.base.HfQuantizer": "the bases of lowmem's quantizer and config",
    "transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert": "what other quantizers store or replace",
    "transformers.quantizers.base.MODULES_TO_PATCH_FOR_QUANTIZATION": "as get_modules_to_not_convert",
    "transformers.quantizers.quantizers_utils.should_convert_module": "as get_modules_to_not_convert",
    "transformers.utils.import_utils.is_gguf_available": "whether transformers reads GGUF tokenizers, or serves",
    "transformers.utils.import_utils.is_serve_available": "as is_gguf_available",
    "transformers.utils.logging": "hides transformers' progress bars",
    "transformers.utils.quantization_config.QuantizationConfigMixin": "as HfQuantizer",
}


def needs_transformers(name: str) -> bool:
    """Whether a test of a use is one of those that need transformers, which stand at the end of ``USES``."""
    return [*USES].index(name) >= [*USES].index("._attn_implementation")


def where(files: list[str]) -> str:
    """Return files as text, or the folders of more than three."""
    return ", ".join(files if len(files) <= 3 else sorted({path.partition("/")[0] for path in files}))


def names_listed() -> str:
    """Return the list as a table: names that are used for the same purpose share a row, with the files that use them.

    A purpose "as tree_flatten" is that of the use of this name.
    """
    used, rows = all_uses(), {}
    purposes = {f"as {name.rpartition('.')[2]}": why for name, why in reversed(USES.items())}
    for name, why in USES.items():
        names, files = rows.setdefault(purposes.get(why, why), ([], set()))
        names.append(f"`{name.removeprefix('.')}`")
        files.update(used.get(name, []))
    lines = [f"| {', '.join(names)} | {where(sorted(files))} | {why} |" for why, (names, files) in rows.items()]
    return "\n".join(["| | used in | for |", "| :-- | :-- | :-- |", *lines, ""])
