"""What LoRA's linear layers are timed against, by name: frozen products, PEFT's layers, other schemes."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

import pykernels
from pykernels import products
from pykernels.bench import lora_schemes as schemes
from pykernels.bench.lora_layers import SCALING, Layer, Options, Result, ours, stepped

Call = Callable[[], Result]
FROZEN = "frozen F.linear"
OWN = "own frozen"
WITHOUT = "without magnitude"
COMPILED = "peft compiled"
SCHEME = "peft scheme"


def able(name: str) -> bool:
    """Whether what the rival needs is installed."""
    return name not in ("peft", COMPILED) or _peft_imports()


def stand_in(name: str, options: Options) -> str:
    """The rival, or the scheme that a graph of PEFT's plain layer comes to where PEFT is not installed."""
    plain = "adapters" not in options and "dora" not in options
    return SCHEME if name == "peft" and plain and not able(name) else name


@functools.cache
def _peft_imports() -> bool:
    try:
        importlib.import_module("peft")
    except ImportError:
        return False
    return True


def uncompiled(name: str) -> str:
    """The rival that does the same without a compiler."""
    return "peft" if name == COMPILED else name


def adapted(name: str) -> bool:
    """Whether the rival has the adapter in its result, or is the frozen product alone."""
    return name not in (FROZEN, OWN)


def checked(name: str, options: Options) -> bool:
    """Whether the rival's result can be held against float64: what it drops is its own draw."""
    return not (adapted(name) and "dropout" in options)


def capturable(name: str, options: Options) -> bool:
    """Whether a CUDA graph can hold it: mixed batches of PEFT, and of our "torch", wait for the host."""
    return "adapters" not in options or name not in ("peft", "torch")


def rival(name: str, c: Layer, options: Options) -> Call:
    """The call of that name on a layer. KeyError for an unknown one."""
    return _RIVALS[name](c, options)


def _own_frozen(c: Layer, options: Options) -> Result:
    """Our product on the CPU, and the gradient of x."""
    y = torch.empty(c.x.shape[0], c.weight.shape[0], dtype=c.x.dtype)
    products.product(y, c.x, c.weight.t(), None, [], [], None)
    if not options.get("step"):
        return y
    by_x = torch.empty_like(c.x)
    products.product(by_x, c.grad, c.weight, None, [], [], None)
    return (by_x,)


def _frozen(c: Layer, options: Options) -> Result:
    y = linear(c.x, c.weight)
    return (c.grad @ c.weight,) if options.get("step") else y


def _without(c: Layer, options: Options) -> Result:
    """Our layer without DoRA's magnitude."""
    return ours(c, {**options, "dora": False})


def _scheme(scheme: Callable[..., torch.Tensor]) -> Callable[[Layer, Options], Call]:
    def made(c: Layer, options: Options) -> Call:
        dropped = {"dropout": options["dropout"]} if "dropout" in options else {}
        return partial(stepped, c, options, lambda x, a, b: scheme(x, c.weight, a, b, SCALING, **dropped))

    return made


def _vllm(c: Layer, options: Options) -> Call:
    if "adapters" not in options:
        return _scheme(schemes.vllm)(c, options)
    low, high = schemes.stacked(c.adapters)
    return lambda: schemes.vllm_grouped(c.x, c.weight, low, high, c.index)


def peft_layer(c: Layer, options: Options) -> Any:
    """PEFT's layer on the same weight, adapters copied in its dtype, in the mode that the row needs."""
    peft = importlib.import_module("peft")
    n, k = c.weight.shape
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(k, n, bias=False, device="meta")})
    module["layer"].weight = torch.nn.Parameter(c.weight, requires_grad=False)
    for i, a in enumerate(c.adapters):
        rank = a.A.shape[0]
        kind = {"lora_dropout": options.get("dropout", 0.0), "use_dora": bool(options.get("dora"))}
        config = peft.LoraConfig(r=rank, lora_alpha=rank * SCALING, target_modules=["layer"], **kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of a second adapter
            peft.inject_adapter_in_model(config, module, adapter_name=str(i))
    layer: Any = module["layer"].to(c.x.dtype)
    for i, a in enumerate(c.adapters):
        for part, value in ((layer.lora_A, a.A), (layer.lora_B, a.B)):
            part[str(i)].weight.data.copy_(value)
    if options.get("dora"):
        norm = pykernels.dora_norm(c.weight, c.adapters[0].A, c.adapters[0].B, SCALING)
        layer.lora_magnitude_vector["0"].weight.data.copy_(c.factor * norm)
    layer.set_adapter([str(i) for i in range(len(c.adapters))] if "adapters" not in options else "0")
    return layer.train(bool(options.get("step")))


def _with_norm_at_hand(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """PEFT's DoRA as fast as it serves: from the second call on, neither B A nor its norm is made anew."""
    with importlib.import_module("peft.helpers").DoraCaching():
        y: torch.Tensor = layer(x)
    return y


def _peft(c: Layer, options: Options, *, compiled: bool = False) -> Call:
    layer = peft_layer(c, options)
    forward: Callable[..., torch.Tensor] = layer
    if compiled:
        forward = torch.compile(layer, dynamic=False)
    if "adapters" in options:
        names = [str(i) for i in c.index.tolist()]
        return torch.no_grad()(lambda: forward(c.x, adapter_names=names))
    if options.get("dora"):
        return torch.no_grad()(partial(_with_norm_at_hand, layer, c.x))
    if not options.get("step"):
        return torch.no_grad()(lambda: forward(c.x))
    low = [layer.lora_A["0"].weight, layer.lora_B["0"].weight]

    def step() -> Result:
        x = c.x.detach().requires_grad_()
        return torch.autograd.grad(forward(x), [x, *low], c.grad)

    return step


_RIVALS: dict[str, Callable[[Layer, Options], Call]] = {
    FROZEN: lambda c, o: partial(_frozen, c, o),
    OWN: lambda c, o: partial(_own_frozen, c, o),
    WITHOUT: lambda c, o: partial(_without, c, o),
    "peft": _peft,
    COMPILED: partial(_peft, compiled=True),
    SCHEME: _scheme(schemes.peft),
    "addmm_": _scheme(schemes.addmm),
    "unsloth": _scheme(schemes.unsloth),
    "lorafusion": _scheme(schemes.lorafusion),
    "vllm": _vllm,
}
