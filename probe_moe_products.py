"""python probe_moe_products.py: each product of the MoE layer in several configurations beside what it replaces."""
import sys, torch, triton, triton.language as tl
sys.path.insert(0, ".")
from torchtitan import routing
from torchtitan.ops import triton_products as tp, triton_kernels as tk, expert_kernels as ek
from torchtitan.ops.swiglu import Gating
from torchtitan.ops.triton_kernels import gated
from torchtitan.ops.triton_products import _tile

@triton.jit
def _grouped_up_persistent(x, x_desc, index, w13, scores, tiles, num_tiles, z, act, dim: tl.constexpr, width: tl.constexpr, block: tl.constexpr, step: tl.constexpr, gathered: tl.constexpr, flat: tl.constexpr):
    num_columns: tl.constexpr = width // block
    stop_at = tl.load(num_tiles) * num_columns
    for place in tl.range(tl.program_id(0), stop_at, tl.num_programs(0), flatten=flat):
        tile, column = place // num_columns, place % num_columns * block
        expert, first, stop = _tile(tiles, tile)
        row = first + tl.arange(0, block)
        inside = row < stop
        if gathered:
            source = tl.load(index + row, inside, other=0)
            a_at = x + source.to(tl.int64)[:, None] * dim + tl.arange(0, step)[None, :]
        gate_row = expert * 2 * width + column
        gate = tl.zeros([block, block], dtype=tl.float32)
        up = tl.zeros([block, block], dtype=tl.float32)
        for k in range(0, dim, step):
            if gathered:
                a = tl.load(a_at + k)
            else:
                a = x_desc.load([first, k])
            gate = tl.dot(a, w13.load([gate_row, k]).T, gate)
            up = tl.dot(a, w13.load([gate_row + width, k]).T, up)
        gate, up = gate.to(z.dtype.element_ty), up.to(z.dtype.element_ty)
        columns = column + tl.arange(0, block)[None, :]
        z_at = z + row.to(tl.int64)[:, None] * (2 * width) + columns
        tl.store(z_at, gate, inside[:, None])
        tl.store(z_at + width, up, inside[:, None])
        result = gated(gate.to(tl.float32), up.to(tl.float32), 1.0, float("inf"), 0.0)
        result *= tl.load(scores + row, inside, other=0.0)[:, None]
        tl.store(act + row.to(tl.int64)[:, None] * width + columns, result.to(act.dtype.element_ty), inside[:, None])

def t(name, f, flop=0, n=10):
    try:
        for _ in range(3): f()
        torch.cuda.synchronize()
    except Exception as e:
        print(f"{name:46s} FAILED {type(e).__name__} {str(e)[:80]}", flush=True); return
    best = []
    for _ in range(3):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(n): f()
        b.record(); torch.cuda.synchronize(); best.append(a.elapsed_time(b) / n)
    ms = sorted(best)[1]
    print(f"{name:46s} {ms:7.3f} {flop/ms/1e9 if flop else 0:5.0f}", flush=True)
G = Gating()
def run(D, Fw, E, K, T):
    torch.manual_seed(0)
    dev, dt = "cuda", torch.bfloat16
    x = torch.randn(T, D, device=dev, dtype=dt); d_out = torch.randn_like(x)
    logits = (x @ torch.randn(D, E, device=dev, dtype=dt)).float(); ids = logits.topk(K).indices
    order = routing.sort_by_expert(ids); counts = routing.count_tokens(ids, E); idx = order.tokens
    R = T * K
    w13 = torch.randn(E, 2, Fw, D, device=dev, dtype=dt) / 45; w2 = torch.randn(E, D, Fw, device=dev, dtype=dt) / 30
    s = torch.rand(R, device=dev)
    z, act = tp.up(x, idx, w13, counts, s, G)
    rows = x[idx]; d_z = torch.randn_like(z)
    f = 2 * R * D * Fw
    print(f"--- D {D} F {Fw} E {E} K {K} T {T}", flush=True)
    wide = w13.view(-1, D); tiles, used = tp._tiles(counts, R)
    t("up unfused: gather, grouped_mm, swiglu", lambda: tk.swiglu(ek._grouped_mm(x.index_select(0, idx), w13.flatten(1, 2).mT, counts), s, G), 2 * f)
    t("up fused", lambda: tp.up(x, idx, w13, counts, s, G), 2 * f)
    t("up fused, no gather", lambda: tp.up(rows, None, w13, counts, s, G), 2 * f)
    for gathered, stages, flat in ((True, 3, True), (True, 4, False), (False, 3, True), (False, 4, False)):
        t(f"  up persistent gathered {gathered} stages {stages} flat {flat}", lambda: _grouped_up_persistent[(132,)](x, tp._tma(rows, 128, 64), idx, tp._tma(wide, 128, 64), s, tiles, used, z, act, D, Fw, 128, 64, gathered, flat, num_warps=8, num_stages=stages), 2 * f)
    t("d_z fused", lambda: tp.down_backward(d_out, idx, w2, counts, z, s, G), f)
    ends = counts.cumsum(0)
    for name, (a, b, tr) in {"dW2": (d_out, act, False), "dW13": (x, d_z, True)}.items():
        M, N = a.shape[1], b.shape[1]; fl = 2 * R * M * N; out = a.new_empty(E, *((N, M) if tr else (M, N)))
        for stages, step in ((8, 32), (10, 32), (12, 32), (14, 32), (8, 64)):
            t(f"  {name} stages {stages} step {step}", lambda: tp._grouped_weights[(E * (M // 128) * triton.cdiv(N, 256),)](a, idx, b, tp._tma(b, step, 256), ends, out, M, N, tr, 128, 256, step, num_warps=8, num_stages=stages), fl)
    for name, a, b in (("down", act, w2.mT), ("d_rows", d_z, w13.flatten(1, 2))):
        _, depth, width = b.shape; fl = 2 * R * depth * width; out = a.new_empty(R, width); bc = b.stride(1) == 1
        m = tp._tma(b.mT.reshape(-1, depth), 256, 64) if bc else tp._tma(b.reshape(-1, width), 64, 256)
        t(f"{name} grouped_mm", lambda: ek._grouped_mm(a, b, counts), fl)
        for stages in (3, 4):
            t(f"  {name} persistent stages {stages}", lambda: tp._grouped_rows[(132,)](tp._tma(a, 128, 64), m, tiles, used, out, depth, width, bc, 128, 256, 64, num_warps=8, num_stages=stages), fl)
    t("topk torch", lambda: logits.topk(K)); t("topk ours", lambda: tk.top_k(logits, K)); t("sort_by_expert", lambda: routing.sort_by_expert(ids))
for shape in ((2048, 768, 128, 8, 32768), (2048, 1408, 64, 6, 32768), (2048, 768, 128, 8, 16384)): run(*shape)
