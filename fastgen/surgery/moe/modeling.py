"""A diffusers transformer with mixtures of experts in place of feed-forward layers (Dense2MoE, arXiv:2510.09094), in plain PyTorch.

fastgen writes this file beside the weights of a student, with the name of the student's own class in place of SD3Transformer2DModel, so that
diffusers loads it with `trust_remote_code=True`. It needs torch and diffusers only. The configuration's `experts` describes each layer.

In a layer, shared(x) + sum over chosen experts of gate * expert(x): scores P are softmax probabilities in fp32 or wider, gates are
num_experts * P. Where tokens choose, each takes the `active` experts that it scores highest; where experts choose, each takes, in each sample,
the ceil(tokens * active / experts) tokens that score it highest. Equal scores go to lower indices.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel as Dense
from torch import Tensor, nn


class SD3Transformer2DModelWithExperts(Dense):
    _keep_in_fp32_modules = [*(getattr(Dense, "_keep_in_fp32_modules", None) or ()), "router", "selection_bias"]  # noqa: RUF012

    def __init__(self, *args: Any, experts: dict[str, Any], **options: Any) -> None:
        super().__init__(*args, **options)
        for layer in experts["layers"]:
            _put(self, layer)
        self.register_to_config(experts=experts)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        found = super().load_config(*args, **kwargs)
        config: Any = found[0] if isinstance(found, tuple) else found
        config.pop("quantization_config", None)  # which keeps the class without experts from loading the weights
        return found


_options = inspect.signature(Dense.__init__)
SD3Transformer2DModelWithExperts.__init__.__signature__ = _options.replace(  # type: ignore[attr-defined]
    parameters=[*_options.parameters.values(), inspect.Parameter("experts", inspect.Parameter.KEYWORD_ONLY)]
)


def _put(network: nn.Module, layer: dict[str, Any]) -> None:
    experts = Experts(layer)
    if not layer["beside"]:
        network.set_submodule(layer["name"], experts)
        return
    block: Any = network.get_submodule(layer["name"])
    block.proj_out = BesideAttention(layer["beside"], block.proj_out.out_features, block.proj_out.bias is not None, experts)
    block.proj_mlp = block.act_mlp = nn.Identity()


class BesideAttention(nn.Module):
    """The last layer of a single block, of [attention; tokens] (..., A + D)."""

    def __init__(self, attention: int, outputs: int, bias: bool, experts: nn.Module) -> None:
        super().__init__()
        self.attention = nn.Linear(attention, outputs, bias)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        width = self.attention.in_features
        return self.attention(x[..., :width]) + self.experts(x[..., width:])


class Shared(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, layer: dict[str, Any]) -> None:
        super().__init__()
        self.activation = layer["activation"]
        self.up = nn.Linear(inputs, hidden * (1 + _is_gated(self.activation)), layer["bias"])
        self.down = nn.Linear(hidden, outputs, layer["out_bias"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_activate(self.up(x), self.activation))


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """Tokens x (..., D), where experts choose (B, ..., D) with samples first."""

    selection_bias: Tensor

    def __init__(self, layer: dict[str, Any]) -> None:
        super().__init__()
        count, inputs, outputs, routed = (layer[key] for key in ("experts", "inputs", "outputs", "routed"))
        self.activation, self.choice = layer["activation"], layer["choice"]
        self.count, self.active = count, layer["active"]
        self.shared = Shared(inputs, layer["shared"], outputs, layer)
        self.router = Router(inputs, count, bias=False)
        rows = routed * (1 + _is_gated(self.activation))
        self.w1, self.w2 = nn.Parameter(torch.empty(count, rows, inputs)), nn.Parameter(torch.empty(count, outputs, routed))
        self.b1 = nn.Parameter(torch.empty(count, rows)) if layer["bias"] else None
        self.register_buffer("selection_bias", torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        out = self.shared(x)
        if self.active == 0:
            return out
        probabilities = self.router(x).softmax(-1)
        tokens = x.flatten(0, -2)
        routed = self._by_token(tokens, probabilities.flatten(0, -2)) if self.choice == "token" else self._by_expert(tokens, probabilities)
        return out + routed.view(out.shape)

    def _by_token(self, x: Tensor, probabilities: Tensor) -> Tensor:
        ids = (probabilities + self.selection_bias).argsort(dim=-1, descending=True, stable=True)[:, : int(self.active)]
        gates = self.count * probabilities.gather(-1, ids)
        parts = x.new_zeros(*ids.shape, self.w2.shape[1], dtype=self._compute_dtype(x))
        for e in range(self.count):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if len(token):
                parts[token, slot] = self._expert(e, x[token], gates[token, slot])
        return parts.sum(1)

    def _by_expert(self, x: Tensor, probabilities: Tensor) -> Tensor:
        probabilities = probabilities.flatten(1, -2)
        batch, num_tokens, _ = probabilities.shape
        each = min(num_tokens, math.ceil(round(num_tokens * self.active / self.count, 6)))
        chosen = probabilities.argsort(dim=1, descending=True, stable=True)[:, :each]
        tokens = (chosen + num_tokens * torch.arange(batch, device=x.device)[:, None, None]).flatten(0, 1)
        out = x.new_zeros(len(x), self.w2.shape[1], dtype=self._compute_dtype(x))
        for e, gates in enumerate(self.count * probabilities.flatten(0, 1).T):
            out = out.index_add(0, tokens[:, e], self._expert(e, x[tokens[:, e]], gates[tokens[:, e]]))
        return out

    def _expert(self, e: int, x: Tensor, gates: Tensor) -> Tensor:
        dtype = self._compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(dtype) @ self.w1[e].to(dtype).T
            h = h if self.b1 is None else h + self.b1[e].to(dtype)
            return (_activate(h, self.activation) * gates[:, None]).to(dtype) @ self.w2[e].to(dtype).T

    @staticmethod
    def _compute_dtype(x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else x.dtype


def _is_gated(activation: str) -> bool:
    return activation in ("geglu", "swiglu")


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation in ("gelu", "gelu-approximate"):
        return F.gelu(h, approximate="tanh" if activation == "gelu-approximate" else "none")
    value, gate = h.chunk(2, -1)  # values first
    return value * (F.gelu(gate) if activation == "geglu" else F.silu(gate))
