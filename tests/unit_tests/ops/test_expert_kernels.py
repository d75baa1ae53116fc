"""Which products experts are multiplied by: of backend, shape and device, without the device."""

import pytest
import torch

from torchtitan.ops import expert_kernels
from torchtitan.ops.expert_kernels import choose

SMALL, LARGE, ODD = (768, 2048), (14336, 4096), (760, 2048)  # F, D
FUSED = {"auto": [SMALL], "fused": [SMALL, LARGE], "unfused": []}
"""By backend the widths that are multiplied by fused products on Hopper, in bf16."""


@pytest.fixture
def gpu(monkeypatch):
    """A device of this capability, whose kernels have names only."""

    def use(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(expert_kernels, "_has_grouped_mm", lambda dtype, device: True)
        monkeypatch.setattr(expert_kernels, "_fused", lambda: "fused")
        monkeypatch.setattr(expert_kernels, "_on_gpu", lambda products: "unfused")
        expert_kernels.can_fuse.cache_clear()
        return torch.device("cuda")

    yield use
    expert_kernels.can_fuse.cache_clear()


@pytest.mark.parametrize("widths", [SMALL, LARGE, ODD])
@pytest.mark.parametrize("backend", FUSED)
def test_fused_products_are_taken_where_they_are_wanted_and_can_be(backend, widths, gpu):
    hopper, name = gpu(9, 0), "fused" if widths in FUSED[backend] else "unfused"
    assert choose(backend, torch.bfloat16, hopper, *widths, fusible=True) == name
    assert choose(backend, torch.bfloat16, hopper, *widths) == "unfused"
    assert choose(backend, torch.float16, hopper, *widths, fusible=True) == "unfused"
    assert choose(backend, torch.bfloat16, gpu(8, 0), *widths, fusible=True) == "unfused"


def test_a_cpu_has_nothing_to_fuse():
    cpu = torch.device("cpu")
    assert not expert_kernels.can_fuse(torch.bfloat16, cpu, *SMALL)
    for backend in FUSED:
        assert choose(backend, torch.bfloat16, cpu, *SMALL, fusible=True) is expert_kernels.GROUPED_MM


def test_a_backend_that_nobody_knows_is_a_mistake():
    with pytest.raises(AssertionError, match="fuesd"):
        choose("fuesd", torch.bfloat16, torch.device("cpu"), *SMALL)
