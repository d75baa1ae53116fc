"""Stands in for the DeepEP library, which needs GPUs: its calls and what they return, over gloo."""

import torch
import torch.distributed as dist


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0


class Buffer:
    """A token goes once to each rank that has an expert of its own; sums come back."""

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.layouts = 0

    @staticmethod
    def get_dispatch_config(num_ranks):
        return Config()

    @staticmethod
    def get_combine_config(num_ranks):
        return Config()

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        self.layouts += 1
        world = self.group.size()
        ranks = topk_idx // (num_experts // world)
        in_rank = (ranks.unsqueeze(2) == torch.arange(world)).any(1)
        per_expert = topk_idx.flatten().bincount(minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
    ):
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            in_rank, sent, received = handle
            return self._send(x, in_rank, sent, received), None, None, None, None, None
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None
        sent, received = num_tokens_per_rank.long(), torch.empty(self.group.size(), dtype=torch.int64)
        dist.all_to_all_single(received, sent, group=self.group)
        handle = is_token_in_rank, sent, received
        tokens, ids, weights = (self._send(t, *handle) for t in (x, topk_idx, topk_weights))
        num_local = len(num_tokens_per_expert) // self.group.size()
        ids = ids - self.group.rank() * num_local
        absent = (ids < 0) | (ids >= num_local)
        ids, weights = ids.masked_fill(absent, -1), weights.masked_fill(absent, 0)
        counts = ids[~absent].bincount(minlength=num_local).tolist()
        return tokens, ids, weights, counts, handle, None

    def combine(self, x, handle, topk_weights=None):
        assert x.is_contiguous()
        weights = None if topk_weights is None else self._add(topk_weights, *handle)
        return self._add(x, *handle), weights, None

    def _send(self, x, in_rank, sent, received):
        out = x.new_empty(int(received.sum()), x.shape[1])
        rows = torch.cat([x[of_rank] for of_rank in in_rank.T])
        dist.all_to_all_single(out, rows, received.tolist(), sent.tolist(), group=self.group)
        return out

    def _add(self, x, in_rank, sent, received):
        rows = x.new_empty(int(sent.sum()), x.shape[1])
        dist.all_to_all_single(rows, x, sent.tolist(), received.tolist(), group=self.group)
        total = torch.zeros(len(in_rank), x.shape[1])
        for of_rank, part in zip(in_rank.T, rows.split(sent.tolist()), strict=True):
            total[of_rank] += part
        return total.to(x.dtype)
