"""Pure functions of routing: counts, the order of rows, and sums over a token's rows.

T tokens, K top-k, E experts, N = T * K routed rows, D model. Everything is deterministic, forward and
backward: sums are gathers in a fixed order, never atomic additions.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from torchtitan.ops.rows import sum_rows, take_rows


def count_tokens(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert is named in expert_ids (any shape, int64): (E,) int64."""
    ids = expert_ids.flatten()
    if ids.is_cuda and num_experts > 1:  # a range of one value is taken for none given
        # Counts integers in shared memory; scatter_add does so in global memory, ten times slower.
        return ids.histc(num_experts, min=0, max=num_experts - 1)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(0, ids, torch.ones_like(ids))


@dataclass(frozen=True)
class RowOrder:
    """Where the rows of each token lie once they are sorted by expert. All int32: layers keep these."""

    slots: torch.Tensor
    """(N,): the place of each row in the flattened (T, K)."""
    rows: torch.Tensor
    """(T, K): the row of each choice; the inverse of `slots`."""
    gaps: bool = False
    """Whether there are rows of no token: slots are -1 there, and N is larger."""

    @property
    def tokens(self) -> torch.Tensor:
        """(N,): the token of each row, or -1."""
        return self.slots // max(self.rows.shape[1], 1)

    def aligned(self, alignment: "Alignment") -> "RowOrder":
        """The same rows with gaps between the groups of experts."""
        slots, rows = alignment.spread(self.slots), alignment.moved(self.rows)
        return replace(self, slots=slots, rows=rows, gaps=True)


@dataclass(frozen=True)
class Alignment:
    """Rows of e groups, moved apart so that each group fills whole blocks of rows, at least one.

    Empty groups get a block too: a sum over rows of zeros is zero, whatever products make of no rows.
    """

    places: torch.Tensor
    """(R,) int64: where each row moves to."""
    counts: torch.Tensor
    """(e,) int64: rows of each group, gaps included."""
    num_rows: int
    """The most that there can be: which expert a row goes to, the host does not know."""

    @classmethod
    def of(cls, counts: torch.Tensor, num_rows: int, block: int) -> "Alignment":
        """For counts (e,) int64 of num_rows rows in all, in blocks of `block` rows."""
        aligned = counts.clamp(min=1).add(block - 1).div(block, rounding_mode="floor") * block
        shift = (aligned.cumsum(0) - aligned) - (counts.cumsum(0) - counts)
        places = torch.arange(num_rows, device=counts.device)
        places = places + shift.repeat_interleave(counts, output_size=num_rows)
        num_blocks = len(counts) + max(num_rows - 1, 0) // block  # if all are in one group
        return cls(places, aligned, num_blocks * block)

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """Where these rows (int32, any shape) move to, in their dtype."""
        return self.places[rows].to(rows.dtype)

    def spread(self, index: torch.Tensor) -> torch.Tensor:
        """index (R,) int32 at its rows' new places, -1 in the gaps."""
        return index.new_full((self.num_rows,), -1).scatter(0, self.places, index)


def narrow(expert_ids: torch.Tensor) -> torch.Tensor:
    """The same ids in 2 bytes each: nobody has more than 32767 experts."""
    return expert_ids.to(torch.int16)


def sort_by_expert(expert_ids: torch.Tensor) -> RowOrder:
    """Order the T * K choices (T, K) by expert; among equals the earlier token comes first."""
    ids = narrow(expert_ids.flatten())  # GPUs sort by bytes, these in 2 passes for 8
    rows = torch.empty(expert_ids.shape, dtype=torch.int32, device=ids.device)
    return row_order(ids.argsort(stable=True), rows)


def row_order(slots: torch.Tensor, rows: torch.Tensor) -> RowOrder:
    """Slots (N,) int64 become rows in this order; fills in rows (T, K) int32 where there is one."""
    rows.view(-1)[slots] = torch.arange(len(slots), dtype=rows.dtype, device=rows.device)
    return RowOrder(slots.to(rows.dtype), rows)


def take(x: torch.Tensor, index: torch.Tensor, gaps: bool) -> torch.Tensor:
    """x[index] of x (R,) or (R, D); with `gaps`, zeros where the index is -1. Without autograd."""
    if not gaps:
        return x.index_select(0, index)
    return take_rows(x, index) if x.ndim == 2 else F.pad(x, (0, 1))[index]


class _OfChosen(torch.autograd.Function):
    """`gather` would keep all that it gathers from, and the ids in 8 bytes each."""

    @staticmethod
    def forward(ctx, values, expert_ids):
        ctx.num_experts = values.shape[1]
        ctx.save_for_backward(narrow(expert_ids))
        return values.gather(1, expert_ids)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        zeros = grad.new_zeros(len(grad), ctx.num_experts)
        return zeros.scatter(1, ids.long(), grad), None  # a token's experts differ


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tokens, rows, gaps):
        ctx.save_for_backward(rows)
        return take(x, tokens, gaps)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return sum_rows(grad, rows), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, tokens, rows, gaps):
        ctx.save_for_backward(tokens)
        ctx.gaps = gaps
        return sum_rows(y, rows)

    @staticmethod
    def backward(ctx, grad):
        (tokens,) = ctx.saved_tensors
        return take(grad, tokens, ctx.gaps), None, None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, slots, rows, gaps):
        ctx.save_for_backward(rows)
        return take(scores.flatten(), slots, gaps)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows.flatten()).view_as(rows), None, None, None


def of_chosen(values: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """values (T, E) of each token's experts expert_ids (T, K) int64, which differ: (T, K)."""
    return _OfChosen.apply(values, expert_ids)


def spread(x: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Each token's row K times, in the order of experts: x (T, D) to (N, D)."""
    return _Spread.apply(x, order.tokens, order.rows, order.gaps)


def reorder(scores: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """The score of each row: (T, K) to (N,)."""
    return _Reorder.apply(scores, order.slots, order.rows, order.gaps)


def weight(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """rows (N, D) times scores (N,) in fp32, rounded once to rows' dtype."""
    return (rows * scores.unsqueeze(1)).to(rows.dtype)


def collect(y: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """The transpose of `spread`: out[t] = sum over k of y[rows[t, k]], in fp32, rounded once."""
    return _Collect.apply(y, order.tokens, order.rows, order.gaps)


class WholeDispatch:
    """A token dispatcher whose `start` does all of `dispatch`: nothing is on its way meanwhile."""

    def start(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> tuple:
        return self.dispatch(x, top_scores, selected_experts_indices)

    def finish(self, started: tuple) -> tuple:
        return started
