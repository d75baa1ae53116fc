"""What each GPU of tests/gpu_tests/test_float8_exchange.py does; started by torch.distributed.run."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed_tests.dispatchers import differences, inputs
from torchtitan.distributed.expert_parallel.torchao import TorchAOTokenDispatcher
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE
from torchtitan.ops.quantized_kernels import EMULATED

DIM = 512
CONFIG = MoEConfig(num_experts=16, top_k=4, ffn_dim=256)
RECIPES = ("float8_rowwise", "float8_rowwise_with_gw_hp")
SIZES = ((777, 1000), (0, 5))
"""Tokens of each rank."""


def layer(backend, device):
    """All experts, on one process."""
    moe = MoE(DIM, CONFIG, residual_std=0.02).to(device, torch.bfloat16)
    torch.manual_seed(0)
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.04)
    moe.quantize_experts(backend)
    return moe


def own_experts(weight, mesh):
    return weight.chunk(mesh.size())[mesh.get_local_rank()].detach()


def spread(moe, mesh, exchange_in_float8):
    """The layer with this rank's experts alone."""
    for name, weight in list(moe.experts.named_parameters()):
        own = torch.nn.Parameter(own_experts(weight, mesh).clone())
        moe.experts.register_parameter(name, own)
    alignment = moe.dispatcher.row_alignment
    options = {"row_alignment": alignment, "exchange_in_float8": exchange_in_float8}
    moe.dispatcher = TorchAOTokenDispatcher(mesh, CONFIG.num_experts, False, **options)
    return moe


def step(moe, num_tokens, rank, device):
    """The output and gradients of tokens and scores; and those of experts."""
    sizes = CONFIG.num_experts, CONFIG.top_k, DIM
    x, scores, ids = inputs(num_tokens, "uniform", rank, device, torch.bfloat16, sizes)
    out = moe.apply_experts(x, scores, ids)
    leaves = [x, scores, *moe.experts.parameters()]
    grads = torch.autograd.grad(out, leaves, x.detach().roll(1, 1))
    return [out.detach(), *grads[:2]], grads[2:]


def compare(mesh, device, prefix=""):
    for recipe in RECIPES:
        alone = layer(EMULATED + recipe, device)
        for exchange in (False, True):
            moe = spread(layer(prefix + recipe, device), mesh, exchange)
            for sizes in SIZES:
                of_tokens, of_experts = step(moe, sizes[mesh.get_local_rank()], dist.get_rank(), device)
                expected = [step(alone, size, rank, device) for rank, size in enumerate(sizes)]
                of_all = (sum(grads) for grads in zip(*(grads for _, grads in expected), strict=True))
                theirs = [*expected[dist.get_rank()][0], *(own_experts(grad, mesh) for grad in of_all)]
                found = differences([*of_tokens, *of_experts], theirs)
                assert all(error < 0.05 for error in found), (recipe, exchange, sizes, found)
    print(f"rank {dist.get_rank()}: as one process emulates it", flush=True)


def main():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    compare(init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("ep",)), device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
