"""What the server of local ranks holds warm before it forks them (imported by the server only).

One FSDP step over a fake process group of a size that no test has: it imports what torch imports
late, and leaves no DTensor cache entry that a real mesh could meet. No thread may be running when
ranks are forked, hence one compute thread and no GPU. PyTorch's builds for GPUs start autograd's
threads with the first backward, GPU or not, and refuse one after a fork then: no backward there.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
import torch.distributed.algorithms._checkpoint.checkpoint_wrapper
import torch.distributed.checkpoint.state_dict
import torch.distributed.tensor.parallel
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

FAKE_WORLD_SIZE = 11


def _warm_up() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=FAKE_WORLD_SIZE)
    model = torch.nn.Sequential(torch.nn.Linear(FAKE_WORLD_SIZE, FAKE_WORLD_SIZE))
    mesh = dist.device_mesh.init_device_mesh("cpu", (FAKE_WORLD_SIZE,))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(1, FAKE_WORLD_SIZE)).sum()
    if torch.version.cuda is None:
        loss.backward()
    optimizer.step()
    dist.destroy_process_group()


_warm_up()
