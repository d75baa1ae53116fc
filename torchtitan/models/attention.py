"""Grouped-query attention, and one interface to the kernels that compute it.

B batch, L sequence, D model, H query heads, G key/value heads, C head_dim, V channels of a value.

The mask decides the kernel: none means causal over the whole sequence (SDPA); a packed batch brings
a FlexAttention block mask, the offsets of the varlen kernel, or a dense boolean mask for SDPA.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from torchtitan.models.attention_mask import (
    AttentionMask,
    SeparateMasks,
    SpanMasks,
    VarlenMask,
    compiled,
)
from torchtitan.models.init import Constant, Init, Normal
from torchtitan.models.rope import apply_rope
from torchtitan.sharding import Fragment, Style

SDPA_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,  # the fastest on Hopper
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""For `torch.nn.attention.sdpa_kernel(..., set_priority=True)`: the first one that can run is used."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: AttentionMask,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of q (B, L, H, C) over k (B, K, G, C) and v (B, K, G, V), as (B, L, H, V).

    K is L, unless queries are a part of the sequence: then all places up to the last query. `scale`
    multiplies the products of queries and keys; None is C ** -0.5. `sinks` (H,) are scores, not
    scaled, of one more key that every token sees, whose value is zero (arXiv 2309.17453).
    """
    if isinstance(mask, SpanMasks):
        return _attend_by_span(q, k, v, mask, scale, sinks)
    if isinstance(mask, SeparateMasks):
        return _attend_separately(q, k, v, mask, scale, sinks)
    if isinstance(mask, VarlenMask):
        assert sinks is None, "the varlen kernel's log-sum-exp has no gradient (torch 2.11, 2.13)"
        return _attend_varlen(q, k, v, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        out = _attend_flex(q, k, v, mask, scale, sinks)
    elif sinks is None:
        out = _attend_dense(q, k, v, mask, scale)
    else:
        out = _attend_dense_with_sinks(q, k, v, mask, scale, sinks)
    return out.transpose(1, 2)


def _attend_by_span(q, k, v, mask: SpanMasks, scale: float | None, sinks) -> torch.Tensor:
    parts = q.split([stop - start for start, stop in mask.spans], dim=1)
    outs = [
        attend(part, k[:, :stop], v[:, :stop], of_span, scale, sinks)
        for part, (_, stop), of_span in zip(parts, mask.spans, mask.masks, strict=True)
    ]
    return torch.cat(outs, dim=1)


def _attend_separately(q, k, v, mask: SeparateMasks, scale: float | None, sinks) -> torch.Tensor:
    # cuDNN, the first of SDPA_PRIORITY, prepares itself anew for every length.
    with sdpa_kernel(SDPA_PRIORITY[1:], set_priority=True):
        outs = []
        for row, lengths in enumerate(mask.lengths):
            pieces = zip(*(x[row : row + 1].split(lengths, dim=1) for x in (q, k, v)), strict=True)
            # Copies: kernels are chosen by alignment, too.
            copies = ([x.clone(memory_format=torch.contiguous_format) for x in p] for p in pieces)
            parts = [attend(*p, mask.masks[p[0].shape[1]], scale, sinks) for p in copies]
            outs.append(torch.cat(parts, dim=1))
    return torch.cat(outs)


def _attend_dense(q, k, v, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    grouped, width = q.shape[1] != k.shape[1], v.shape[-1]
    if width < q.shape[-1] and q.device.type == "cpu":
        # The CPU's kernel that keeps no scores takes one width. At 1024 tokens it is three times as fast.
        v = F.pad(v, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out[..., :width]


def _attend_dense_with_sinks(q, k, v, mask, scale: float | None, sinks) -> torch.Tensor:
    """By a key before all others, so that causal attention stays causal and any kernel serves.

    A channel more gives it its scores: in queries it is the sink, in keys 1 for that one, else 0.
    """
    channels = q.shape[-1]
    scale = scale or channels**-0.5
    # On GPUs, kernels that take a mask take only multiples of eight.
    more = 8 - channels % 8 if q.is_cuda else 1
    channel = (sinks / scale).to(q.dtype).view(-1, 1, 1).expand(*q.shape[:3], 1)
    q = F.pad(torch.cat([q, channel], dim=-1), (0, more - 1, 1, 0))
    k, v = (F.pad(x, (0, more, 1, 0)) for x in (k, v))
    k[..., 0, channels] = 1
    if isinstance(mask, CausalBias):
        mask = causal_lower_right(mask.seq_len_q + 1, mask.seq_len_kv + 1)
    elif mask is not None:
        mask = F.pad(mask, (1, 0, 1, 0), value=True)
    return _attend_dense(q, k, v, mask, scale)[..., 1:, :channels]


def _attend_flex(q, k, v, mask: BlockMask, scale: float | None, sinks) -> torch.Tensor:
    options = {"block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if sinks is None:
        return compiled(flex_attention)(q, k, v, **options)
    return compiled(_flex_with_sinks)(q, k, v, sinks, options)


def _flex_with_sinks(q, k, v, sinks, options: dict[str, Any]) -> torch.Tensor:
    out, aux = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
    # exp(lse) / (exp(lse) + exp(sink)) is what the other keys keep of the softmax.
    kept = torch.sigmoid(aux.lse - sinks.view(-1, 1))
    return (out * kept.unsqueeze(-1)).to(out.dtype)


_VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.13; not 2.11


def _attend_varlen(q, k, v, mask: VarlenMask, scale: float | None) -> torch.Tensor:
    options = {"enable_gqa": q.shape[2] != k.shape[2]} if _VARLEN_TAKES_GQA else {}
    if scale is not None:
        options["scale"] = scale
    before = -1 if mask.window is None else mask.window - 1
    out = varlen_attn(
        *(x.flatten(0, 1) for x in (q, k, v)),
        mask.offsets,
        mask.key_offsets,
        mask.max_length,
        mask.max_keys,
        window_size=(before, 0),
        **options,
    )
    return out.view_as(q)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; key and value heads may be fewer than queries."""

    fragment: Fragment = {
        "": Style.GATHER,
        "wq": Style.COLWISE,
        "wk": Style.COLWISE,
        "wv": Style.COLWISE,
        "wo": Style.ROWWISE,
    }

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        residual_std: float,
        bias: bool = False,
    ):
        super().__init__()
        self.core = attend  # context parallelism puts its own here
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, n_heads * head_dim, bias)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias)
        inputs = Normal(0.02, cutoff=3)
        self.inits: dict[str, Init] = {
            "wq.weight": inputs,
            "wk.weight": inputs,
            "wv.weight": inputs,
            "wo.weight": Normal(residual_std, cutoff=3),
        }
        if bias:
            self.inits |= {f"{name}.bias": Constant(0.0) for name in ("wq", "wk", "wv", "wo")}

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, L, H, C), keys and values (B, L, G, C), before rotation."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return q, k, v

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        q, k, v = self.heads(x)
        out = self.core(apply_rope(q, rope), apply_rope(k, rope), v, mask)
        return self.wo(out.flatten(-2))
