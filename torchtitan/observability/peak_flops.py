"""How fast could this device be? Dense bf16 peak of the accelerators whose number is published."""

import re

# (pattern of the device's name, FLOP/s); the first match counts. Datasheets often print the rate
# with 2:4 sparsity, twice the dense one; that is halved here. A name that no pattern fits has no
# peak: parts of one family differ by up to 30 % (H100 SXM and PCIe), and guesses look like facts.
PEAKS = (
    # nvidia.com/en-us/data-center/h100: SXM 1,979 sparse; NVL 1,671 sparse; PCIe 1,513 sparse
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 80GB HBM3\b|\bGH200\b", 989e12),
    # nvidia.com/en-us/data-center/h200: SXM 1,979 sparse; NVL 1,671 sparse
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    # HGX B200 and GB200 NVL72 pages: 36 PFLOPS sparse over 8 GPUs; 360 PFLOPS sparse over 72
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    # nvidia.com/en-us/data-center/a100: 312 dense, PCIe and SXM alike
    (r"\bA100\b", 312e12),
    # nvidia.com/en-us/data-center/l40s: 362 dense
    (r"\bL40S\b", 362e12),
    # amd.com/en/products/accelerators/instinct: dense; the MI250X shows as two devices of 191.5
    (r"\bMI300X\b|\bMI325X\b", 1307e12),
    (r"\bMI250X\b", 191.5e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a whole device, by torch.cuda.get_device_name(); None if not known."""
    if re.search(r"\bMIG\b", device_name):  # a slice, with some unknown part of the peak
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)
