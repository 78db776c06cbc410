"""Linear layers of the decoder, with their LoRA adapters, as one autograd function each.

PEFT runs five small operations beside every matrix, and adds two tensors of the layer's size in both directions. And torch's
checkpointing ends the recomputation of a layer when the last tensor that its backward pass needs has been made; DeepSpeed's
linear function hands its input over after it has multiplied, so the layer's last matrix (27 % of a Llama's layer) is multiplied
again for nothing. Here the input is handed over first.
"""

import functools

import torch
from torch import nn


class _Keep(torch.autograd.Function):
    """Saves a linear layer's input and computes nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Linear(torch.autograd.Function):
    """x [tokens, in], weight [out, in], bias [out] or None, a [r, in] and b [out, r] or None → x·Wᵀ + bias + scale·(x·aᵀ)·bᵀ.

    keep: the _Keep node that has saved x, or None where no gradient needs it. Parameters are held as they are, not saved: ZeRO-3
    takes their data away after the forward pass and brings it back before the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, keep):
        ctx.parameters, ctx.scale, ctx.keep = (weight, a, b), scale, keep
        out = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        if a is not None:
            out.addmm_(x @ a.t(), b.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        (weight, a, b), scale, needs = ctx.parameters, ctx.scale, ctx.needs_input_grad
        x = grad_weight = grad_a = grad_b = None
        if ctx.keep is not None:
            (x,) = ctx.keep.saved_tensors
        grad_x = grad @ weight
        if a is not None:
            low = (grad @ b).mul_(scale)
            grad_x.addmm_(low, a)
            grad_a = low.t() @ x
            grad_b = (grad.t() @ (x @ a.t())).mul_(scale)
        if needs[1]:
            grad_weight = grad.t() @ x
        grad_bias = grad.sum(0) if needs[2] else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None


def _apply(x, weight, bias, a=None, b=None, scale=1.0):
    keep, shape = None, x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    if a is not None or weight.requires_grad:
        x = _Keep.apply(x)
        keep = x.grad_fn
    return _Linear.apply(x, weight, bias, a, b, scale, keep).view(*shape, weight.shape[0])


def _linear(module, plain, x):
    if not (torch.is_grad_enabled() and x.requires_grad):
        return plain(x)
    return _apply(x, module.weight, module.bias)


def _lora(module, adapter, plain, x, *args, **kwargs):
    if (
        args
        or kwargs
        or module.disable_adapters
        or module.merged
        or not (torch.is_grad_enabled() and x.requires_grad)
    ):
        return plain(x, *args, **kwargs)
    base = module.base_layer
    return _apply(
        x,
        base.weight,
        base.bias,
        module.lora_A[adapter].weight,
        module.lora_B[adapter].weight,
        module.scaling[adapter],
    )


def _adapter_of(module):
    """The name of a PEFT layer's only, plain adapter; None where it does more than `_Linear` computes."""
    active = list(getattr(module, "active_adapters", ()))
    if (
        len(active) != 1
        or active[0] not in module.lora_A
        or type(module.base_layer) is not nn.Linear
    ):
        return None
    name = active[0]
    plain = isinstance(module.lora_dropout[name], nn.Identity) and name not in getattr(
        module, "lora_variant", {}
    )
    return name if plain and not module.lora_bias.get(name) else None


def install(layers, leaf):
    """Replace the forward of the linear modules in these decoder layers. leaf: ZeRO-3 fetches a layer as a whole, without which an
    adapter and its matrix are not there together. Returns how many were replaced."""
    count = 0
    for layer in layers:
        inner = set()
        for module in list(layer.modules()):
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                inner.update(module.modules())
                inner.discard(module)
                adapter = _adapter_of(module)
                if leaf and adapter is not None:
                    module.forward = functools.partial(_lora, module, adapter, module.forward)
                    count += 1
            elif type(module) is nn.Linear and module not in inner:
                module.forward = functools.partial(_linear, module, module.forward)
                count += 1
    return count
