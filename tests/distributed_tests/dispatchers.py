"""Any token dispatcher beside the all-to-all one: the same tokens and experts, every result and gradient."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.routing_decisions import decide_once

EXPERTS, TOP_K, DIM, HIDDEN = 8, 3, 16, 8
ROUTINGS = ("uniform", "one expert", "one rank")
RECOMPUTING = {
    "nothing": lambda function, *args: function(*args),
    "all": partial(checkpoint, use_reentrant=False, context_fn=decide_once),
}


def inputs(num_tokens, routing, seed, device="cpu", dtype=torch.float32, sizes=(EXPERTS, TOP_K, DIM)):
    """x, scores and expert ids; no id comes twice for a token, as with top-k."""
    num_experts, top_k, dim = sizes
    draw = torch.Generator().manual_seed(1000 * seed + num_tokens)
    x = torch.randn(num_tokens, dim, generator=draw)
    scores = torch.rand(num_tokens, top_k, generator=draw)
    order = torch.rand(num_tokens, num_experts, generator=draw).argsort(1)
    if routing == "one expert":  # the first choice of all is the same
        order = torch.arange(num_experts).roll(-5).expand(num_tokens, -1)
    elif routing == "one rank":
        order = torch.arange(num_experts).flip(0).expand(num_tokens, -1)
    x, scores = x.to(device, dtype), scores.to(device)
    return x.requires_grad_(), scores.requires_grad_(), order[:, :top_k].contiguous().to(device)


def local_experts(num_local, device="cpu", dtype=torch.float32, dim=DIM, hidden=HIDDEN):
    """On a CPU those whose rows have the same bits however many there are."""
    torch.manual_seed(7)
    backend = "reference" if device == "cpu" else "auto"
    experts = GroupedExperts(dim, hidden, num_local, 0.02, backend, bias=True)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return experts.to(device, dtype)


def results(dispatcher, experts, tensors, recomputing="nothing", layers=1):
    """The output of some layers in a row, and gradients of tokens, scores and all weights."""
    x, scores, ids = (tensor.detach().clone() for tensor in tensors)
    leaves = [x.requires_grad_(), scores.requires_grad_(), *experts.parameters()]

    def layer(x, scores):
        rows, counts, metadata = dispatcher.dispatch(x, scores, ids)
        assert counts.dtype == torch.int64 and len(counts) == len(experts.w13)
        y = experts(rows, counts, metadata.routed_scores)
        return dispatcher.combine(y, metadata, x)

    hidden = x
    for _ in range(layers):
        hidden = hidden + RECOMPUTING[recomputing](layer, hidden, scores).tanh()
    upstream = torch.linspace(-1, 1, hidden.numel(), device=x.device).view_as(hidden).to(x.dtype)
    return [hidden.detach(), *torch.autograd.grad(hidden, leaves, upstream)]


def differences(ours, theirs):
    """Relative L2 of each result."""
    return [
        ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)).item()
        for a, b in zip(ours, theirs, strict=True)
    ]
