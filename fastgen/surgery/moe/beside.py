"""The feed-forward half of a single block, such as FLUX.1's, whose last layer reads attention and hidden activations side by side."""

from __future__ import annotations

from torch import Tensor, nn


class BesideAttention(nn.Module):
    """The last layer of a single block whose feed-forward part is another module now: of [attention; tokens] (…, A + D), the same sum as before."""

    def __init__(self, both: nn.Linear, attention: int, experts: nn.Module) -> None:
        super().__init__()
        self.attention = nn.Linear(attention, both.out_features, both.bias is not None, device="meta")
        self.attention.weight = nn.Parameter(both.weight.detach()[:, :attention].clone(), both.weight.requires_grad)
        if both.bias is not None:
            self.attention.bias = both.bias
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        width = self.attention.in_features
        return self.attention(x[..., :width]) + self.experts(x[..., width:])
