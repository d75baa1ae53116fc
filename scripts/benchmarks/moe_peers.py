"""Other versions of the MoE layer that moe_layer.py measures: a plain one, and those of other libraries.

Each has the router's and the experts' weights of a layer of ours, and so its loads; of the scores of
softmax the chosen are normalised. T tokens, D model, E experts, K top-k.
"""

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE


class Missing(Exception):
    """A library's layer cannot run here; the message says why."""


def choose(logits: torch.Tensor, config: MoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (T, K) fp32 and experts (T, K) int64 from logits (T, E), balanced where the config asks."""
    scores = logits.softmax(-1, dtype=torch.float32)
    if config.force_load_balance:
        turns = torch.arange(len(logits) * config.top_k, device=logits.device) % config.num_experts
        ids = turns.view(-1, config.top_k)
    else:
        ids = scores.topk(config.top_k).indices
    top_scores = scores.gather(1, ids)
    return top_scores / top_scores.sum(-1, keepdim=True), ids


class PlainMoE(nn.Module):
    """What one would write first: the same arithmetic, left to autograd."""

    def __init__(self, moe: MoE, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(moe.router.gate.weight.detach().clone())
        w1, w3 = moe.experts.w13.detach().unbind(1)
        self.w1, self.w3 = nn.Parameter(w1.clone()), nn.Parameter(w3.clone())
        self.w2 = nn.Parameter(moe.experts.w2.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config, tokens = self.config, x.flatten(0, 1)
        top_scores, ids = choose(tokens @ self.gate.t(), config)
        order = ids.flatten().argsort(stable=True)
        index = order // config.top_k
        ends = F.one_hot(ids.flatten(), config.num_experts).sum(0).cumsum(0).int()
        rows = tokens[index]
        gate = F.grouped_mm(rows, self.w1.mT, offs=ends)
        up = F.grouped_mm(rows, self.w3.mT, offs=ends)
        y = F.grouped_mm(F.silu(gate) * up, self.w2.mT, offs=ends)
        y = (y * top_scores.flatten()[order].unsqueeze(1)).to(x.dtype)
        index = index.unsqueeze(1).expand_as(y)
        return torch.zeros_like(tokens).scatter_add(0, index, y).view_as(x)


def transformers_moe(moe: MoE, config: MoEConfig) -> nn.Module:
    """transformers' Qwen3-MoE block of these sizes, with its grouped_mm experts; raises Missing."""
    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError as error:
        raise Missing(str(error)) from error
    w13, w2 = moe.experts.w13.detach(), moe.experts.w2.detach()
    theirs = Qwen3MoeConfig(
        hidden_size=w2.shape[1],
        moe_intermediate_size=config.ffn_dim,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    with w2.device:
        block = Qwen3MoeSparseMoeBlock(theirs).to(w2.dtype)
    weights = {"gate.weight": moe.router.gate.weight.detach()}
    weights |= {"experts.gate_up_proj": w13.flatten(1, 2), "experts.down_proj": w2}
    block.load_state_dict(weights)
    if config.force_load_balance:

        def take_turns(gate: nn.Module, inputs: object, chosen: tuple[torch.Tensor, ...]):
            logits = chosen[0]
            scores, ids = choose(logits, config)
            return logits, scores.to(logits.dtype), ids

        block.gate.register_forward_hook(take_turns)
    return block


class LigerMoE(nn.Module):
    """The experts of the library liger-kernel (Triton), behind a router as the plain version's.

    Raises Missing where there is no such library, or no GPU.
    """

    def __init__(self, moe: MoE, config: MoEConfig):
        super().__init__()
        w13, w2 = moe.experts.w13.detach(), moe.experts.w2.detach()
        if not w2.is_cuda:
            raise Missing("liger-kernel needs a GPU")
        try:
            from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
        except ImportError as error:
            raise Missing(str(error)) from error
        self.config, self.experts = config, LigerFusedMoEFunction.apply
        self.gate = nn.Parameter(moe.router.gate.weight.detach().clone())
        self.w13, self.w2 = nn.Parameter(w13.flatten(1, 2).clone()), nn.Parameter(w2.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        scores, ids = choose(tokens @ self.gate.t(), self.config)
        return self.experts(tokens, self.w13, self.w2, ids.int(), scores).view_as(x)
