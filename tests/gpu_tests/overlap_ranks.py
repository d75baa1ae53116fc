"""What each GPU of tests/gpu_tests/test_overlap.py does; started by torch.distributed.run."""

import os
import re
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed_tests.dispatchers import RECOMPUTING, inputs
from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE

TOKENS, DIM = 16384, 2048
CONFIG = MoEConfig(num_experts=16, top_k=4, ffn_dim=1024, num_shared_experts=2)


def layer(mesh, device):
    """An MoE layer with as many experts as this rank has."""
    moe = MoE(DIM, CONFIG, residual_std=0.02).to(device, torch.bfloat16)
    for name, weight in moe.experts.named_parameters():
        own = torch.nn.Parameter(weight.detach()[: CONFIG.num_experts // mesh.size()].clone())
        moe.experts.register_parameter(name, own)
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    moe.dispatcher = AllToAllTokenDispatcher(mesh, CONFIG.num_experts, False)
    return moe


def waits(work):
    """How often the host waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        result = work()
        torch.cuda.set_sync_debug_mode("default")
    return result, sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


def kernels(work):
    """(name, start, end) of all that the GPU ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    on_gpu = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.start, e.time_range.end) for e in on_gpu]


def num_overlapped(events):
    """How many all-to-alls there are, during which a matrix product ran: only the shared experts' can."""
    flying = [e for e in events if "SendRecv" in e[0]]
    products = [e for e in events if re.search("gemm|nvjet|cutlass", e[0], re.IGNORECASE)]
    return sum(any(p[1] < f[2] and f[1] < p[2] for p in products) for f in flying)


def main():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("ep",))
    moe, rank = layer(mesh, device), dist.get_rank()
    sizes = CONFIG.num_experts, CONFIG.top_k, DIM
    x, scores, ids = inputs(TOKENS, "uniform", rank, device, torch.bfloat16, sizes)
    for mode, recompute in RECOMPUTING.items():
        for _ in range(3):
            recompute(moe.apply_experts, x, scores, ids).sum().backward()
        out, forward = waits(lambda: recompute(moe.apply_experts, x, scores, ids))
        _, backward = waits(out.sum().backward)
        assert (forward, backward) == (1, 0), (rank, mode, forward, backward)
    print(f"rank {rank}: one host sync", flush=True)
    forward = num_overlapped(kernels(lambda: moe.apply_experts(x, scores, ids)))
    out = moe.apply_experts(x, scores, ids)
    backward = num_overlapped(kernels(out.sum().backward))
    assert forward >= 1 and backward >= 1, (rank, forward, backward)
    print(f"rank {rank}: rows fly while shared experts compute", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
