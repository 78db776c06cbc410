"""The experts of a mixture: their matrices, and their forward pass as grouped products.

PEFT adapts a stack of expert matrices by making W + BA of the whole stack in every pass: for
Qwen3-30B-A3B 1.2 GB a layer, whatever experts the tokens go to. Here each expert's tokens are
multiplied with its W, its A and its B. Torch's own function would keep the gathered stack alive
until the backward pass, as it saves a view of it; this one looks it up anew, so ZeRO-3 can release
it in between.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Since torch 2.10, for bf16 on CUDA. Elsewhere the experts are computed one by one.
_GROUPED: Callable | None = getattr(nn.functional, "grouped_mm", None)
_PER_TOKEN = re.compile("experts?_per_tok|(experts?|moe)_(top_?)?k$|top_?k_experts?")
# Numbers that have "expert" in their name and do not count those of a list or stack: experts that
# compute nothing or stand beside the routed ones, which layers have some, how wide they are.
_NO_COUNT = re.compile("zero|shared|layer|size")


# -- what a model is made of -------------------------------------------------------------------
def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers: the members of the ModuleList with the most parameters.

    Return an empty list where the model has no ModuleList.
    """
    return list(
        max(
            (m for m in model.modules() if isinstance(m, nn.ModuleList)),
            key=lambda m: sum(shape(p).numel() for p in m.parameters()),
            default=[],
        )
    )


def shape(parameter: Tensor) -> torch.Size:
    """Return a parameter's whole shape: one that ZeRO-3 has partitioned is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def stacks(module: nn.Module) -> list[str]:
    """Return the names of the module's own stacks of expert matrices: [experts, …, …].

    The module says itself how many experts it has: other tensors with three dimensions are
    convolutions, or heads.
    """
    numbers = {v for k, v in vars(module).items() if "expert" in k and isinstance(v, int)}
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if len(shape(parameter)) == 3 and shape(parameter)[0] in numbers
    ]


def is_list(module: Any, config: Any) -> bool:
    """Return whether these modules are experts: the text model's configuration has so many."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) in _counts(config)


def count(module: nn.Module, config: Any) -> int:
    """Return the number of experts in a module, in a stack or a list; 0 where it has none."""
    for child in module.modules():
        for name in stacks(child):
            return shape(child.get_parameter(name))[0]
        if is_list(child, config):
            return len(list(child.children()))
    return 0


def supported(module: Any) -> bool:
    """Return whether _forward computes these experts: those of transformers' experts interface."""
    declared = all(
        hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed")
    )
    return declared and all(
        module.get_parameter(name).dtype.is_floating_point for name in stacks(module)
    )


def _counts(config: Any) -> set[int]:
    return {
        value
        for name, value in vars(config).items()
        if "expert" in name and isinstance(value, int)
        if not _PER_TOKEN.search(name) and not _NO_COUNT.search(name)
    } - {0, 1}


def routes(config: Any) -> bool:
    """Return whether a model of this configuration has several experts."""
    return bool(_counts(config))


def per_token(config: Any) -> int:
    """Return the number of routed experts that a token goes to; 0 where the model has none.

    config: the text model's. Families name it num_experts_per_tok, moe_k, moe_topk, top_k_experts…
    """
    for name, value in vars(config).items():
        if isinstance(value, int) and _PER_TOKEN.search(name):
            return value
    return 0


# -- grouped products --------------------------------------------------------------------------
def _native(*tensors: Tensor) -> bool:
    """Return whether torch's grouped product takes these: rows of whole 16 bytes."""
    return (
        _GROUPED is not None
        and all(t.is_cuda and t.dtype == torch.bfloat16 for t in tensors)
        and all(size % 8 == 0 for t in tensors for size in t.shape[-2 + (t.dim() == 2) :])
        and torch.cuda.get_device_capability(tensors[0].device) >= (8, 0)
    )


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return each row times its expert's matrix: [S, out].

    rows: [S, in], sorted by expert. matrices: [experts, in, out]. ends: int32 [experts], where the
    rows of each expert end.
    """
    if _GROUPED and _native(rows, matrices):
        return _GROUPED(rows, matrices, offs=ends)
    out, start = rows.new_zeros(len(rows), matrices.shape[2]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(rows[start:end], matrices[expert], out=out[start:end])
        start = end
    return out


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return for each expert the sum over its rows of left ⊗ right: [experts, m, n].

    left: [S, m]. right: [S, n]. ends: as in grouped_product.
    """
    if _GROUPED and _native(left, right):
        return _GROUPED(left.t(), right, offs=ends)
    out, start = left.new_zeros(len(ends), left.shape[1], right.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=out[expert])
        start = end
    return out


class _GroupedLinear(torch.autograd.Function):
    """Return each row times its expert's matrix, and scale · row · A · B of its adapter.

    rows: [S, in], sorted by expert. weight: [experts, out, in], or [experts, in, out] where it is
    transposed. lora_a: [experts · r, in] or None. lora_b: [out, r · experts] or None: both as PEFT
    stores them. Parameters are kept as attributes, as in linear.py.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scale: float,
        transposed: bool,
        ends: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.parameters, ctx.scale, ctx.transposed = (weight, lora_a, lora_b), scale, transposed
        out = grouped_product(rows, weight if transposed else weight.mT, ends)
        if lora_a is not None and lora_b is not None:
            a, b = _factors(lora_a, lora_b, len(ends))
            low_rank = grouped_product(rows, a, ends).mul_(scale)
            out += grouped_product(low_rank, b, ends)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends = ctx.saved_tensors
        (weight, lora_a, lora_b), grad = ctx.parameters, grad.contiguous()
        grad_rows = grad_weight = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_product(grad, weight.mT if ctx.transposed else weight, ends)
        if ctx.needs_input_grad[1]:
            pair = (rows, grad) if ctx.transposed else (grad, rows)
            grad_weight = grouped_outer(*pair, ends)
        if lora_a is not None:
            a, b = _factors(lora_a, lora_b, len(ends))
            grad_low_rank = grouped_product(grad, b.mT, ends).mul_(ctx.scale)
            if grad_rows is not None:
                grad_rows += grouped_product(grad_low_rank, a.mT, ends)
            grad_a = grouped_outer(grad_low_rank, rows, ends).reshape(lora_a.shape)
            low_rank = grouped_product(rows, a, ends).mul_(ctx.scale)
            grad_b = grouped_outer(low_rank, grad, ends).permute(2, 1, 0).reshape(lora_b.shape)
        return grad_rows, grad_weight, grad_a, grad_b, None, None, None


def _factors(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the adapter's A as [experts, in, r] and its B as [experts, r, out]."""
    a = lora_a.view(experts, -1, lora_a.shape[1]).mT
    b = lora_b.view(len(lora_b), -1, experts).permute(2, 1, 0).contiguous()
    return a, b


# -- the experts' forward pass -----------------------------------------------------------------
def _forward(
    experts: Any,
    wrappers: dict[str, Any],
    plain: Callable,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute what `plain`, the module's own forward, computes.

    experts: a module of transformers' experts interface. wrappers: PEFT's, by the name of the stack
    that each adapts. hidden_states: [T, hidden]. top_k_index, top_k_weights: [T, k].
    """
    adapters = {}
    for name, wrapper in wrappers.items():
        active = wrapper.active_adapters
        if wrapper.disable_adapters or wrapper.merged or len(active) != 1:
            return plain(hidden_states, top_k_index, top_k_weights)
        (adapter,) = active
        adapters[name] = (
            wrapper.lora_A[adapter].weight,
            wrapper.lora_B[adapter].weight,
            wrapper.scaling[adapter],
        )
    tokens, k = top_k_index.shape
    chosen, order = torch.sort(top_k_index.flatten(), stable=True)
    ends = torch.searchsorted(
        chosen, torch.arange(experts.num_experts, device=chosen.device), right=True
    ).int()

    def product(rows: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        lora_a, lora_b, scale = adapters.get(name, (None, None, 1.0))
        rows = rows.to(weight.dtype)
        out = _GroupedLinear.apply(rows, weight, lora_a, lora_b, scale, experts.is_transposed, ends)
        return out + getattr(experts, f"{name}_bias")[chosen] if experts.has_bias else out

    rows = hidden_states[order // k]
    if experts.has_gate:
        rows = experts._apply_gate(product(rows, "gate_up_proj"))
    else:
        rows = experts.act_fn(product(rows, "up_proj"))
    rows = product(rows, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.flatten()[order, None]
    # Sums in a fixed order, where adding to rows by index would take any.
    summed = rows[torch.argsort(order)].unflatten(0, (tokens, k)).sum(1)
    return summed.to(hidden_states.dtype)


def install(model: nn.Module, leaf: bool) -> int:
    """Replace the forward of the experts, with and without adapters. Return their number.

    leaf: ZeRO-3 gathers each decoder layer as a whole. Otherwise it gathers the experts with their
    adapters as one, for which they are marked here.
    """
    from deepspeed.utils import set_z3_leaf_modules
    from peft.tuners.lora.layer import ParamWrapper

    count, inside = 0, set()
    for module in model.modules():
        if module in inside:
            continue
        outer: Any = module
        wrappers, base = {}, outer
        while isinstance(base, ParamWrapper):
            wrappers[base.parameter_name] = base
            base = base.base_layer
            inside.add(base)
        if stacks(base) and supported(base):
            outer.forward = functools.partial(_forward, base, wrappers, outer.forward)
            count += 1
    if not leaf and any(isinstance(module, ParamWrapper) for module in model.modules()):
        set_z3_leaf_modules(model, [ParamWrapper])
    return count
