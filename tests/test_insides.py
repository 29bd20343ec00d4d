"""Each inside of another library that lowmem uses stands in one list, and behaves as lowmem expects."""

import argparse
import ast
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.func import grad, vmap
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch, _pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

import lowmem
from lowmem.kernels import torch_versions
from tests.insides import USES, all_uses, needs_transformers, own_names, uses_of

CHECKS: dict[str, Callable[..., Any]] = {}


def shows(*names):
    """Note that a function checks how these insides behave; one with arguments gets the name, and a folder."""

    def note(function):
        CHECKS.update(dict.fromkeys(names, function))
        return function

    return note


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


class Operators(_python_dispatch.TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **kwargs or {})


def operators(function, *args):
    with Operators() as seen:
        function(*args)
    return seen.names


def modes():
    return [type(torch._C._get_dispatch_stack_at(at)) for at in range(torch._C._len_torch_dispatch_stack())]


# Attributes of modules


@shows("._parameters", "._buffers", "._modules")
def attributes_stand_in_dicts_that_can_be_exchanged(name):
    layer = nn.BatchNorm1d(2) if name != "._modules" else nn.Sequential(nn.ReLU())
    held = layer.__dict__[name[1:]]
    key = next(iter(held))
    assert getattr(layer, key) is held[key]
    other = nn.ReLU() if name == "._modules" else type(held[key])(torch.ones(2))
    layer.__dict__[name[1:]] = {**held, key: other}
    assert getattr(layer, key) is other


@shows("._non_persistent_buffers_set")
def buffers_that_a_state_leaves_out_are_named():
    layer = nn.Module()
    layer.register_buffer("a", torch.ones(1), persistent=False)
    assert layer._non_persistent_buffers_set == {"a"}
    layer._non_persistent_buffers_set.clear()
    assert [*layer.state_dict()] == ["a"]


HOOKS = {
    "._forward_hooks": lambda layer: layer.register_forward_hook(lambda *_: None),
    "._forward_pre_hooks": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "._forward_hooks_with_kwargs": lambda layer: layer.register_forward_hook(lambda *_: None, with_kwargs=True),
    "._forward_hooks_always_called": lambda layer: layer.register_forward_hook(lambda *_: None, always_call=True),
    "._forward_pre_hooks_with_kwargs": lambda layer: layer.register_forward_pre_hook(
        lambda *_: None, with_kwargs=True
    ),
    "._backward_hooks": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "._backward_pre_hooks": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "._load_state_dict_post_hooks": lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
    "torch.nn.modules.module._global_forward_hooks": lambda _: torch_module.register_module_forward_hook(print),
    "torch.nn.modules.module._global_forward_pre_hooks": lambda _: torch_module.register_module_forward_pre_hook(
        print
    ),
    "torch.nn.modules.module._global_backward_hooks": lambda _: torch_module.register_module_full_backward_hook(
        print
    ),
    "torch.nn.modules.module._global_backward_pre_hooks": lambda _: (
        torch_module.register_module_full_backward_pre_hook(print)
    ),
}


@shows(*HOOKS)
def a_hook_stands_in_its_dict_until_it_is_removed(name):
    layer = nn.Linear(2, 2)
    hooks = vars(torch_module if "global" in name else layer)[name.rpartition(".")[2]]
    before = len(hooks)
    handle = HOOKS[name](layer)
    assert len(hooks) == before + 1
    handle.remove()
    assert len(hooks) == before


@shows("._compiled_call_impl")
def a_call_runs_what_compile_left():
    layer = nn.Linear(2, 2)
    assert layer._compiled_call_impl is None
    layer._compiled_call_impl = lambda x: "compiled"
    assert layer(torch.ones(2)) == "compiled"


@shows("._apply")
def a_cast_of_a_model_calls_apply_of_each_module():
    class Layer(nn.Linear):
        def _apply(self, fn, recurse=True):
            self.cast_to = fn(torch.ones(1)).dtype
            return super()._apply(fn, recurse)

    model = nn.Sequential(Layer(2, 2)).half()
    assert model[0].cast_to is model[0].weight.dtype is torch.float16


@shows("._load_from_state_dict")
def errors_are_the_last_argument_and_missing_keys_the_one_two_before():
    class Layer(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
            self.seen = (prefix, rest[-3][:])
            rest[-1].append("refused by the layer")

    model = nn.Sequential(Layer(2, 2))
    with pytest.raises(RuntimeError, match="refused by the layer"):
        model.load_state_dict({"0.weight": torch.ones(2, 2)}, strict=False)
    assert model[0].seen == ("0.", ["0.bias"])


@shows("._version")
def writes_are_counted_and_a_state_names_the_version_of_a_module():
    x = torch.ones(2)
    view = x[0]
    x.add_(1)
    assert view._version == x._version == 1
    assert nn.BatchNorm1d(2).state_dict()._metadata[""] == {"version": nn.BatchNorm1d._version}


@shows("torch.nn.Module._version")
def modules_have_version_1_unless_they_say_otherwise():
    assert nn.Linear._version == nn.Module._version != nn.BatchNorm1d._version


@shows("torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX")
def the_key_of_an_extra_state_ends_so():
    class Layer(nn.Module):
        def get_extra_state(self):
            return 1

    key = torch_module._EXTRA_STATE_KEY_SUFFIX
    assert nn.Sequential(Layer()).state_dict() == {f"0.{key}": 1}


# Layers


@shows("._flat_weights", "._flat_weights_names")
def a_recurrent_layer_computes_with_its_flat_weights():
    layer, x = nn.LSTM(2, 3), torch.randn(2, 2)
    assert layer._flat_weights_names == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert all(
        one is getattr(layer, name) for one, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )
    layer.__dict__["_flat_weights"] = [torch.zeros_like(one) for one in layer._flat_weights]
    assert not layer(x)[0].any()


@shows("._flat_weight_refs")
def a_recurrent_layer_has_weak_references_to_its_weights():
    layer = nn.LSTM(2, 3)
    layer.flatten_parameters()
    refs = vars(layer).get("_flat_weight_refs", [])
    assert [ref() is one for ref, one in zip(refs, layer._flat_weights, strict=True)] == [True] * 4


@shows("._conv_forward", "._reversed_padding_repeated_twice")
def a_convolution_computes_with_a_given_weight_and_pads_as_it_says():
    layer = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular")
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    padded = functional.pad(x, tuple(layer._reversed_padding_repeated_twice), mode="circular")
    expected = functional.conv2d(padded, weight, layer.bias)
    torch.testing.assert_close(layer._conv_forward(x, weight, layer.bias), expected)
    layer._conv_forward = lambda *given: given
    assert layer(x) == (x, layer.weight, layer.bias) or layer(x)[1] is layer.weight


@shows("._WeightNorm")
def the_parametrization_of_weight_norm_has_this_name():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert [type(one).__name__ for one in layer.parametrizations.weight] == ["_WeightNorm"]


@shows("torch.nn.utils.weight_norm.WeightNorm")
def the_older_weight_norm_is_a_hook_that_knows_its_parameter():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(2, 2))
    (hook,) = layer._forward_pre_hooks.values()
    assert type(hook).__module__ == "torch.nn.utils.weight_norm"
    assert type(hook).__name__ == "WeightNorm"
    assert hook.name == "weight"


@shows("torch.nn.modules.conv._ConvNd", "torch.nn.modules.conv._ConvTransposeNd")
def all_convolutions_have_a_base_class(name):
    kinds = [nn.Conv1d, nn.Conv2d, nn.Conv3d] if name.endswith("_ConvNd") else []
    base = getattr(nn.modules.conv, name.rpartition(".")[2])
    assert all(
        issubclass(kind, base) for kind in (*kinds, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    )
    assert base is nn.modules.conv._ConvNd or not issubclass(nn.Conv2d, base)


@shows("torch.nn.modules.linear.NonDynamicallyQuantizableLinear")
def attention_has_a_linear_layer_that_it_does_not_call():
    layer = nn.MultiheadAttention(4, 2)
    assert type(layer.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    layer.out_proj.register_forward_hook(lambda *_: pytest.fail("it was called"))
    layer(*[torch.randn(2, 1, 4)] * 3)


@shows("torch.nn.grad.conv1d_input", "torch.nn.grad.conv2d_input", "torch.nn.grad.conv3d_input")
def the_gradient_of_a_convolution_is_autograd_s(name):
    dims = int(name[-8])
    x, weight = torch.randn(2, 4, *[5] * dims, requires_grad=True), torch.randn(6, 2, *[3] * dims)
    options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    out = getattr(functional, f"conv{dims}d")(x, weight, **options)
    incoming = torch.randn_like(out)
    found = getattr(nn.grad, f"conv{dims}d_input")(x.shape, weight, incoming, **options)
    torch.testing.assert_close(found, torch.autograd.grad(out, x, incoming)[0])


# Tensors


@shows("._base")
def a_view_knows_the_tensor_that_it_is_of():
    x = torch.randn(2, 2)
    assert x[0].view(1, 2)._base is x
    assert x._base is x.clone()._base is None


@shows("._cdata")
def memory_has_an_identity():
    x, y = torch.ones(2), torch.ones(2)
    assert x.untyped_storage()._cdata == x[1:].untyped_storage()._cdata != y.untyped_storage()._cdata


@shows("._is_param")
def a_subclass_with_this_attribute_is_a_parameter():
    class Kind(torch.Tensor):
        pass

    x = torch.ones(2).as_subclass(Kind)
    assert not isinstance(x, nn.Parameter)
    x._is_param = True
    assert isinstance(x, nn.Parameter)


@shows("._is_zerotensor")
def a_gradient_without_memory_says_so():
    assert torch._efficientzerotensor(2)._is_zerotensor()
    assert not torch.zeros(2)._is_zerotensor()


@shows("._indices", "._values")
def a_sparse_tensor_gives_its_memory_before_it_is_coalesced(name):
    x = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="coalesced"):
        getattr(x, name[2:])()
    assert getattr(x, name[1:])().tolist() == {"._indices": [[0, 0]], "._values": [1.0, 2.0]}[name]


@shows("._has_method")
def an_object_of_torchscript_says_which_methods_it_has():
    packed = torch.ops.quantized.linear_prepack_fp16(torch.ones(2, 2), None)
    assert isinstance(packed, torch.ScriptObject)
    assert packed._has_method("__getstate__")
    assert not packed._has_method("absent")


@shows("._schema")
def an_operator_says_its_name_its_arguments_and_what_it_returns():
    view, write, plain = torch.ops.aten.select.int, torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor
    assert view._schema.name == "aten::select"
    assert [one.name for one in view._schema.arguments] == ["self", "dim", "index"]
    aliases = [one._schema.returns[0].alias_info for one in (view, write, plain)]
    assert [alias and alias.is_write for alias in aliases] == [False, True, None]


@shows("torch.Tensor._make_wrapper_subclass")
def a_tensor_without_memory_has_shape_dtype_and_device():
    class Kind(torch.Tensor):
        @staticmethod
        def __new__(cls):
            made = torch.Tensor._make_wrapper_subclass(cls, (2, 3), dtype=torch.float16, device="cpu")
            made.extra = 7
            return made

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return torch.ones(1) if function is torch.ops.aten.neg.default else None

    made = Kind()
    assert (type(made), made.shape, made.dtype, made.extra) == (Kind, (2, 3), torch.float16, 7)
    with torch._C.DisableTorchFunctionSubclass():
        assert made.neg().tolist() == [1.0]


@shows("torch._C.DisableTorchFunctionSubclass")
def functions_of_a_subclass_can_be_switched_off():
    class Kind(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return "its own"

    x = torch.ones(2).as_subclass(Kind)
    assert x.neg() == "its own"
    with torch._C.DisableTorchFunctionSubclass():
        assert type(x.neg()) is torch.Tensor
    assert x.neg() == "its own"


@shows("torch._C._nn._parse_to")
def the_arguments_of_to_are_read():
    read = torch._C._nn._parse_to
    assert read("meta", torch.float16) == (torch.device("meta"), torch.float16, False, None)
    form = torch.channels_last
    assert read(torch.ones(1), non_blocking=True, memory_format=form)[1:] == (torch.float32, True, form)


@shows("torch._C._to_dlpack")
def memory_is_given_away_without_a_copy():
    x = torch.ones(3)
    torch.from_dlpack(torch._C._to_dlpack(x)).add_(1)
    assert x.tolist() == [2.0, 2.0, 2.0]


@shows("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
def a_stored_weight_holds_other_tensors():
    asks = _python_dispatch.is_traceable_wrapper_subclass

    class Pair(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            return None

    assert asks(torch.ones(1).as_subclass(Pair))
    assert not asks(torch.ones(1))


@shows("torch.utils.weak.WeakTensorKeyDictionary")
def tensors_are_keys_by_identity_and_are_let_go():
    known, x = WeakTensorKeyDictionary(), torch.ones(1)
    known[x] = 1
    assert x in known
    assert torch.ones(1) not in known
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert (len(known), alive()) == (0, None)


# Operators

RUN = {
    "._to_copy": lambda: torch.ones(2).to(torch.float16),
    "torch.ops.aten._to_copy.default": lambda: torch.ones(2).half(),
    "._unsafe_view": lambda: torch.ones(2, 2, 2) @ torch.ones(2, 2),
    "._embedding_bag": lambda: functional.embedding_bag(torch.tensor([[0]]), parameter(2, 2)),
    "._embedding_bag_forward_only": lambda: functional.embedding_bag(torch.tensor([[0]]), torch.ones(2, 2)),
    "torch.ops.aten._embedding_bag_forward_only.default": lambda: functional.embedding_bag(
        torch.tensor([[0]]), torch.ones(2, 2)
    ),
    "._weight_norm_interface": lambda: torch._weight_norm(torch.ones(2, 2), torch.ones(2, 1), 0),
    "._weight_norm_interface_backward": lambda: (
        torch._weight_norm(torch.ones(2, 2), parameter(2, 1), 0).sum().backward()
    ),
    "torch.ops.aten.gelu_backward": lambda: functional.gelu(parameter(2)).sum().backward(),
    "torch.ops.aten.silu_backward": lambda: functional.silu(parameter(2)).sum().backward(),
    "torch.ops.aten.native_layer_norm_backward": lambda: (
        functional.layer_norm(parameter(2, 4), (4,)).sum().backward()
    ),
}


@shows(*RUN)
def torch_runs_this_operator(name):
    own = name.split(".")[3] if name.startswith("torch.") else name[1:]
    assert own in operators(RUN[name])


@shows("._reshape_alias")
def the_operator_gives_a_view():
    x = torch.randn(2, 3)
    out = torch.ops.aten._reshape_alias.default(x, (3, 2), (2, 1))
    assert out.data_ptr() == x.data_ptr()
    assert torch.equal(out, x.view(3, 2))


@shows("._grouped_mm")
def groups_of_rows_are_multiplied():
    x, weight = torch.randn(4, 16).bfloat16(), torch.randn(2, 16, 8).bfloat16()
    out = torch._grouped_mm(x, weight, torch.tensor([1, 4], dtype=torch.int32))
    expected = torch.cat([x[:1] @ weight[0], x[1:] @ weight[1]])
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6)


@shows("._has_compatible_shallow_copy_type")
def to_asks_whether_a_parameter_can_keep_its_identity():
    asked = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            asked.append(getattr(function, "__name__", ""))
            return function(*args, **kwargs or {})

    layer = nn.Linear(2, 2)
    with Mode():
        layer.half()
    assert "_has_compatible_shallow_copy_type" in asked


@shows("._scaled_dot_product")
def the_operators_of_attention_begin_so():
    x = torch.randn(1, 2, 4, 8)
    for given in ((x, x, x), (nn.Parameter(x), x, x)):
        names = operators(functional.scaled_dot_product_attention, *given)
        assert any(name.startswith("_scaled_dot_product") for name in names)


@shows("torch._decomp.decomposition_table")
def lowmem_s_operators_are_decomposed_by_the_table():
    table = torch._decomp.decomposition_table
    assert torch.ops.lowmem.product_4bit.default in table
    assert table is torch._decomp.global_decomposition_table["post_autograd"]


@shows("torch._decomp.meta_table")
def the_table_of_meta_kernels_is_one_with_that_of_decompositions():
    assert torch._decomp.meta_table is torch._decomp.global_decomposition_table["meta"]


# Autograd


@shows("._backward_cls")
def the_node_of_a_function_is_of_this_class():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, incoming):
            return incoming * 2

    assert type(Own.apply(parameter(2)).grad_fn) is Own._backward_cls


@shows("._saved_tensors_hooks_is_enabled")
def torch_says_whether_saved_tensor_hooks_are_forbidden():
    asks = torch._C._autograd._saved_tensors_hooks_is_enabled
    assert asks()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        assert not asks()


@shows("._top_saved_tensors_default_hooks", "torch._C._autograd")
def torch_says_which_saved_tensor_hooks_are_active():
    asks = torch._C._autograd._top_saved_tensors_default_hooks
    assert asks(False) is None
    pack, seen = (lambda x: x), []
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert asks(False)[0] is pack
    checkpoint(lambda x: seen.append(asks(False)[0].__module__) or x.sin(), parameter(2), use_reentrant=False)
    assert seen == [checkpoint.__module__]


@shows("torch._C._functions.DelayedError")
def a_second_derivative_is_an_error_with_the_given_text():
    x = torch._C._functions.DelayedError("no second time", 1)(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="no second time"):
        x.sum().backward()


@shows("torch._C._AutoDispatchBelowAutograd")
def nothing_is_recorded_below_autograd():
    x = parameter(2)
    with torch._C._AutoDispatchBelowAutograd():
        assert x.sin().grad_fn is None
    assert x.sin().grad_fn is not None


@shows("torch.autograd.forward_ad._current_level")
def the_level_is_minus_one_outside_of_forward_mode():
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    torch.func.jvp(lambda x: x * forward_ad._current_level + forward_ad._current_level, *[(torch.ones(1),)] * 2)
    assert forward_ad._current_level == -1


@shows("torch._C._is_any_autocast_enabled")
def any_device_s_autocast_is_seen():
    asks = torch._C._is_any_autocast_enabled
    assert not asks()
    with torch.autocast("cpu", torch.bfloat16):
        assert asks()


@shows("torch._C._are_functorch_transforms_active")
def transforms_are_seen():
    asks, seen = torch._C._are_functorch_transforms_active, []
    grad(lambda x: seen.append(asks()) or x.sum())(torch.ones(2))
    vmap(lambda x: seen.append(asks()) or x)(torch.ones(2))
    assert [*seen, asks()] == [True, True, False]


@shows("torch._C._functorch.is_batchedtensor")
def a_tensor_under_vmap_is_known():
    asks, seen = torch._C._functorch.is_batchedtensor, []
    vmap(lambda x: seen.append(asks(x)) or x)(torch.ones(2))
    assert [*seen, asks(torch.ones(2))] == [True, False]


@shows("torch._C._functorch.is_legacy_batchedtensor")
def gradients_of_several_examples_are_known():
    asks, seen = torch._C._functorch.is_legacy_batchedtensor, []
    x = parameter(2)
    out = x * 1
    out.register_hook(lambda incoming: seen.append(asks(incoming)))
    torch.autograd.grad(out, x, torch.eye(2), is_grads_batched=True)
    assert [*seen, asks(torch.ones(2))] == [True, False]


# Modes, traces and graphs


@shows("._CachingTorchDispatchMode", "._CachedTorchDispatchMode")
def a_selective_checkpoint_has_these_modes(name):
    seen = []

    def region(x):
        seen.append([kind.__name__ for kind in modes()])
        return x.sin()

    checkpoint(region, parameter(2), use_reentrant=False, context_fn=lowmem.keep_products).sum().backward()
    assert name[1:] in seen[name == "._CachedTorchDispatchMode"]


@shows("torch._C._TorchDispatchModeKey.FAKE", "torch._C._get_dispatch_mode")
def the_mode_of_fake_tensors_has_a_key():
    key = torch._C._TorchDispatchModeKey.FAKE
    assert torch._C._get_dispatch_mode(key) is None
    with fake_tensor.FakeTensorMode() as mode:
        assert torch._C._get_dispatch_mode(key) is mode


@shows("torch._C._TorchDispatchModeKey.PROXY", "torch._C._TorchDispatchModeKey.FUNCTIONAL")
def the_modes_of_a_trace_have_keys(name):
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    key, seen = getattr(torch._C._TorchDispatchModeKey, name.rpartition(".")[2]), []
    if name.endswith("PROXY"):
        make_fx(lambda x: seen.append(torch._C._get_dispatch_mode(key)) or x.sin())(torch.ones(2))
    else:
        with FunctionalTensorMode():
            seen.append(torch._C._get_dispatch_mode(key))
    assert seen[0] is not None
    assert torch._C._get_dispatch_mode(key) is None


@shows("torch._C._get_dispatch_stack_at", "torch._C._len_torch_dispatch_stack")
def active_modes_are_counted_and_given_from_the_outermost():
    assert torch._C._len_torch_dispatch_stack() == 0
    with Operators() as outer, Operators() as inner:
        found = [torch._C._get_dispatch_stack_at(at) for at in range(torch._C._len_torch_dispatch_stack())]
    assert [one is mode for one, mode in zip(found, (outer, inner), strict=True)] == [True, True]


@shows("torch._C._get_tracing_state", "torch._C._is_tracing")
def a_trace_is_seen(name):
    asks, seen = getattr(torch._C, name.rpartition(".")[2]), []
    torch.jit.trace(lambda x: seen.append(asks()) or x + 1, torch.ones(2), check_trace=False)
    assert all(seen)
    assert seen
    assert not asks()


@shows("torch.utils._python_dispatch.TorchDispatchMode")
def a_mode_sees_operators():
    assert operators(lambda: torch.ones(2).sin()) == ["ones", "sin"]


@shows(*(f"torch.utils._python_dispatch.{name}" for name in ("_disable_current_modes", "_push_mode", "_pop_mode")))
def modes_are_laid_aside_and_single_ones_put_back():
    with Operators() as mode:
        with _python_dispatch._disable_current_modes():
            assert modes() == []
            torch.ones(2).sin()
            _python_dispatch._push_mode(mode)
            torch.ones(2).cos()
            _python_dispatch._pop_mode()
        assert modes() == [Operators]
    assert mode.names == ["ones", "cos"]


@shows("._FrameAction", "._FrameExecStrategy", "torch._C._dynamo.eval_frame", "._dynamo_marked_constant")
def a_function_is_left_to_python_under_torch_compile(name):
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return graph.forward

    def outer(x):
        return inner(x) * 2

    def inner(x):
        return x.sin()

    torch_versions.disable_dynamo(inner)
    torch.compiler.reset()
    torch.compile(inner, backend=backend)(torch.ones(2))
    assert graphs == []  # it is not compiled
    constant = torch_versions.mark_constant_in_graphs(lambda: [print(end=""), id(graphs)][1])
    torch.compile(lambda x: x + constant(), backend=backend, fullgraph=True)(torch.ones(2))
    assert str(id(graphs)) in graphs[0]


@shows("torch.compiler._is_exporting_flag")
def an_export_is_seen():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(torch_versions.is_exporting())
            return x + 1

    torch.export.export(Model(), (torch.ones(2),), strict=False)
    assert all(seen)
    assert seen
    if torch_versions.TORCH < (2, 12):
        assert torch.compiler._is_exporting_flag is False


@shows("torch._subclasses.FakeTensor", "torch._subclasses.fake_tensor.FakeTensorMode")
def fake_tensors_have_shapes_and_no_values():
    with fake_tensor.FakeTensorMode() as mode:
        made = mode.from_tensor(torch.ones(2, 3)) @ torch.ones(3, 4)
    assert isinstance(made, torch._subclasses.FakeTensor)
    assert (made.shape, made.device.type) == ((2, 4), "cpu")


with warnings.catch_warnings(action="ignore"):  # torch will drop them
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)


def _unknown(x):
    raise AssertionError


RAISES = {
    "DataDependentOutputException": lambda: torch.ones(1).item(),
    "DynamicOutputShapeException": lambda: torch.ones(2).nonzero(),
    "UnsupportedFakeTensorException": lambda: fake_tensor.FakeTensorMode().from_tensor(QUANTIZED),
    "UnsupportedOperatorException": lambda: torch.ops.insides.unknown(torch.ones(2)),
}


@shows(*(f"torch._subclasses.fake_tensor.{name}" for name in RAISES))
def what_fake_tensors_cannot_do_is_an_error_of_this_class(name):
    name = name.rpartition(".")[2]
    with torch.library._scoped_library("insides", "DEF") as library:
        library.define("unknown(Tensor x) -> Tensor")
        library.impl("unknown", _unknown, "CPU")
        with pytest.raises(getattr(fake_tensor, name)), fake_tensor.FakeTensorMode():
            RAISES[name]()


@shows(*(f"torch.utils._pytree.{name}" for name in ("tree_flatten", "tree_unflatten", "tree_leaves")))
def containers_are_taken_apart_and_put_together():
    tree = {"a": [1, (2, None)], "b": 3}
    leaves, structure = _pytree.tree_flatten(tree)
    assert leaves == _pytree.tree_leaves(tree) == [1, 2, None, 3]
    assert _pytree.tree_unflatten(leaves, structure) == tree


@shows("torch.utils._pytree.tree_map", "torch.utils._pytree.tree_map_only")
def leaves_are_replaced():
    assert _pytree.tree_map(str, {"a": [1, (2.0,)]}) == {"a": ["1", ("2.0",)]}
    assert _pytree.tree_map_only(int, str, {"a": [1, (2.0,)]}) == {"a": ["1", (2.0,)]}


@shows("._optimizer_step_pre_hooks")
def an_optimizer_holds_its_hooks():
    optimizer = torch.optim.SGD([parameter(1)])

    class Held:
        def hook(self, *_):
            pass

    held = Held()
    optimizer.register_step_pre_hook(held.hook)
    (found,) = optimizer._optimizer_step_pre_hooks.values()
    assert found.__self__ is held


# FSDP2


@shows(".__composable_api_state_key", "._is_fsdp_managed_module", "._fsdp_use_orig_params")
def fully_shard_leaves_these_attributes(name):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Linear(2, 2)
        before = set(vars(layer))
        fully_shard(layer, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        added = [own for own in vars(layer) if own not in before]
    finally:
        torch.distributed.destroy_process_group()
    assert [own for own in added if own.startswith(name[1:])]


# The standard library


@shows("argparse._ActionsContainer")
def parsers_and_groups_share_a_base():
    parser = argparse.ArgumentParser()
    assert isinstance(parser, argparse._ActionsContainer)
    assert isinstance(parser.add_argument_group("a"), argparse._ActionsContainer)


@shows("._print_message")
def a_parser_writes_its_help_by_this_method():
    class Parser(argparse.ArgumentParser):
        def _print_message(self, message, file=None):
            self.written = message

    parser = Parser(prog="a")
    parser.print_help(io.StringIO())
    assert parser.written == parser.format_help()


def check_use(name, folder=None):
    """Run the check of a use; an error says what lowmem uses the inside for, and where."""
    check = CHECKS[name]
    try:
        check(*[name, folder][: check.__code__.co_argcount])
    except Exception as error:
        error.add_note(f"{name} behaves otherwise. {', '.join(all_uses()[name])}: {USES[name]}")
        raise


@pytest.mark.parametrize("name", [name for name in USES if not needs_transformers(name)])
def test_an_inside_behaves_as_lowmem_expects(name):
    check_use(name)


def test_the_list_has_each_inside_that_lowmem_uses_and_no_other():
    assert {name: files for name, files in all_uses().items() if name not in USES} == {}
    assert [name for name in USES if name not in all_uses()] == []


PLANTED = {
    "from torch._inductor import config": "torch._inductor.config",
    "from torch.utils import _foreach_utils as each": "torch.utils._foreach_utils",
    "from torch import Tensor\nTensor._make_subclass(Tensor, x)": "torch.Tensor._make_subclass",
    "from torch.autograd import forward_ad\nforward_ad._is_fwd_grad_enabled()": (
        "torch.autograd.forward_ad._is_fwd_grad_enabled"
    ),
    "from torch.nn.modules import module as hooks\nhooks._global_buffer_registration_hooks": (
        "torch.nn.modules.module._global_buffer_registration_hooks"
    ),
    "import torch\nask = torch._C\nask._is_fwd_grad_enabled()": "torch._C._is_fwd_grad_enabled",
    "from torch.fx.experimental.proxy_tensor import set_proxy_slot": (
        "torch.fx.experimental.proxy_tensor.set_proxy_slot"
    ),
    "import torch\ntorch.fx.experimental.proxy_tensor.set_proxy_slot(x)": (
        "torch.fx.experimental.proxy_tensor.set_proxy_slot"
    ),
    "from transformers.modeling_utils import load_state_dict": "transformers.modeling_utils.load_state_dict",
    "from peft.tuners.lora import Linear": "peft.tuners.lora.Linear",
    "from accelerate.utils.modeling import find_tied_parameters": "accelerate.utils.modeling.find_tied_parameters",
    "import torch\ntorch.ops.aten._foreach_add.List(x)": "torch.ops.aten._foreach_add.List",
    "model._tied_weights_keys": "._tied_weights_keys",
    "getattr(model, '_tied_weights_keys', None)": "._tied_weights_keys",
    "vars(module)['_state_dict_hooks']": "._state_dict_hooks",
    "module.__dict__.get('_is_full_backward_hook')": "._is_full_backward_hook",
    "NAMES = ('_checkpoint_hook', '_StopRecomputationError')": "._checkpoint_hook",
    "name == '_checkpoint_hook'": "._checkpoint_hook",
    "class Layer(nn.Module):\n    def _save_to_state_dict(self):\n        pass": "._save_to_state_dict",
    "class Quantizer(HfQuantizer):\n    def _unknown_hook(self):\n        pass": "._unknown_hook",
    "sys.modules.get('torch._dynamo')": "torch._dynamo",
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_use_is_found(source):
    tree = ast.parse(source)
    assert PLANTED[source] in uses_of(tree, own_names([tree]), called=set())
    assert PLANTED[source] not in USES


def test_what_is_public_or_lowmem_s_own_is_no_inside():
    source = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

class Reader(dict):
    def _next(self):
        return self._next, torch.nn.functional.linear, torch.ops.aten.add.Tensor, "_packed", name.endswith("_hooks")
"""
    tree = ast.parse(source)
    assert uses_of(tree, own_names([tree]), called={"_next"}) == set()
