"""Causal attention over a bounded cache that also records what policies want to know about it.

Both functions run without gradients, serve grouped query heads (query head i reads KV head
i // group), take their softmax in float32 at least, and compute their products in the wider of the
queries' and the cache's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from buzz.policy import State

_LOGITS = 2**18  # at a time: memory stays bounded, and a CPU keeps them in its cache


@dataclass(frozen=True, slots=True)
class Record:
    """Where attention records one state of the entries, in place.

    Attributes:
        state: what is recorded.
        into: `[kv_heads, n]` for a chunk, `[B, kv_heads, N]` for decoding; any strides.
    """

    state: State
    into: Tensor


@torch.no_grad()
def attend_chunk(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    records: Sequence[Record] = (),
    seen: int = 0,
    log_n: int | None = None,
) -> Tensor:
    """Attention of one session's new tokens to its cache, themselves included.

    Args:
        query: floating `[query_heads, T, head_dim]`, the last T of the n entries.
        keys: `[kv_heads, n, head_dim]`; any strides.
        values: `[kv_heads, n, head_dim]`; any strides.
        scale: factor on the logits.
        records: what to record of the n entries.
        seen: tokens of the session before these, for votes.
        log_n: multiply a query's logits by `max(1, log(m) / log(log_n))`, m the keys in its view.

    Returns:
        `[query_heads, T, head_dim]` in the queries' dtype.
    """
    query_heads, count, head_dim = query.shape
    kv_heads, n, _ = keys.shape
    compute, wide = _dtypes(query, keys)
    in_view = torch.arange(n - count + 1, n + 1, device=query.device)
    grouped = _scaled(query, scale, in_view, log_n, wide).to(compute).view(kv_heads, -1, count, head_dim)
    keys, values = keys.to(compute), values.to(compute)
    output = query.new_empty(kv_heads, grouped.shape[1], count, head_dim)
    most = max(16, _LOGITS // (query_heads * n))
    for start in range(0, count, most):
        rows = min(most, count - start)
        view = n - count + start + rows  # keys that the last of these rows sees
        block = grouped[:, :, start : start + rows].reshape(kv_heads, -1, head_dim)
        logits = torch.bmm(block, keys[:, :view].transpose(1, 2)).to(wide).view(kv_heads, -1, rows, view)
        future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        logits[..., view - rows :].masked_fill_(future, float("-inf"))
        weights = logits.softmax(dim=-1)
        for record in records:
            into = record.into[:, :view]
            if record.state.kind == "mass":
                _add_mass(into, weights, record.state.decay)
            else:
                _vote(into, weights, in_view[start : start + rows, None], seen + start)
        weights = weights.view(kv_heads, -1, view).to(compute)
        attended = torch.bmm(weights, values[:, :view])
        output[:, :, start : start + rows] = attended.view(kv_heads, -1, rows, head_dim)
    return output.view(query_heads, count, head_dim)


@torch.no_grad()
def attend_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    records: Sequence[Record] = (),
    seen: Tensor | None = None,
    log_n: int | None = None,
    *,
    finite: bool = False,
) -> Tensor:
    """Attention of one new token in each of B sessions to that session's cache, itself included.

    Keys and values are read where they lie, at any stride: a batch over slots of a pool is not copied.
    Where nothing is recorded, torch's fused kernel does it.
    Memory beyond a row's length may hold anything, NaN included; what is recorded there means nothing.
    To see whether it does, the host waits for the output, unless the caller knows.

    Args:
        query: floating `[B, query_heads, head_dim]`.
        keys: `[B, kv_heads, N, head_dim]`, N at least the longest length.
        values: `[B, kv_heads, N, head_dim]`.
        lengths: int64 `[B]` on the queries' device, each at least 1: row b attends to its first
            `lengths[b]` entries.
        scale: factor on the logits.
        records: what to record of the entries.
        seen: int64 `[B]`, tokens of each session before this one; required for votes.
        log_n: multiply a row's logits by `max(1, log(length) / log(log_n))`.
        finite: no key or value beyond a row's length is infinite or NaN.

    Returns:
        `[B, query_heads, head_dim]` in the queries' dtype.
    """
    batch, query_heads, head_dim = query.shape
    kv_heads, n = keys.shape[1:3]
    compute, wide = _dtypes(query, keys)
    scaled = _scaled(query, scale, lengths.unsqueeze(1), log_n, wide).to(compute)
    grouped = scaled.view(batch, kv_heads, -1, head_dim)
    beyond = (torch.arange(n, device=query.device) >= lengths.unsqueeze(1)).view(batch, 1, 1, n)
    if records or keys.dtype != compute:
        output, weights = _weighed(grouped, keys, values, beyond, wide)
        for record in records:
            if record.state.kind == "mass":
                _add_mass(record.into, weights.unsqueeze(3), record.state.decay)
            elif seen is not None:
                _vote(record.into, weights.unsqueeze(3), lengths.view(-1, 1, 1, 1, 1), seen.view(-1, 1, 1))
            else:
                raise ValueError("votes need the tokens seen before")
    else:
        mask = torch.zeros_like(beyond, dtype=compute).masked_fill_(beyond, float("-inf"))
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=1.0)
    if not finite:
        _forget_garbage(output, grouped, keys, values, lengths)
    return output.reshape(batch, query_heads, head_dim).to(query.dtype)


def _weighed(
    queries: Tensor, keys: Tensor, values: Tensor, beyond: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attention of `queries` `[B, kv_heads, group, head_dim]`, and its weights `[B, kv_heads, group, n]`."""
    parts = (queries, keys, values, beyond.expand(-1, keys.shape[1], -1, -1))
    if keys.is_contiguous() and values.is_contiguous():  # batch and heads are one dimension: one product
        output, weights = _looped(*(part.flatten(0, 1)[None] for part in parts), wide=wide)
        return output.view(queries.shape), weights.view(*queries.shape[:3], -1)
    if keys.shape[1] < keys.shape[0]:
        output, weights = _looped(*(part.transpose(0, 1) for part in parts), wide=wide)
        return output.transpose(0, 1), weights.transpose(0, 1)
    return _looped(*parts, wide=wide)


def _looped(
    queries: Tensor, keys: Tensor, values: Tensor, beyond: Tensor, *, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same with a product for each of the first dimension; any strides."""
    weights = torch.empty(*queries.shape[:3], keys.shape[2], dtype=queries.dtype, device=queries.device)
    for q, k, out in zip(queries, keys, weights, strict=True):
        torch.bmm(q, k.to(q.dtype).transpose(1, 2), out=out)
    weights = weights.to(wide).masked_fill_(beyond, float("-inf")).softmax(dim=-1)
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    for w, v, out in zip(weights.to(queries.dtype), values, output, strict=True):
        torch.bmm(w, v.to(w.dtype), out=out)
    return output, weights


def _add_mass(into: Tensor, weights: Tensor, decay: float) -> None:
    """Add weights `[..., kv_heads, group, rows, n]` to `into` `[..., kv_heads, n]`, older rows decayed."""
    rows = weights.shape[-2]
    if decay == 1:
        into += weights.sum(dim=(-3, -2))
        return
    factors = decay ** torch.arange(rows - 1, -1, -1, device=weights.device, dtype=weights.dtype)
    torch.add((factors @ weights).sum(dim=-2), into, alpha=decay**rows, out=into)


def _vote(into: Tensor, weights: Tensor, in_view: Tensor, seen: int | Tensor) -> None:
    """Set `into` `[..., kv_heads, n]` to the token of the last row to which an entry mattered.

    Weights are `[..., kv_heads, group, rows, n]`; `in_view`, the keys that each row sees, `[..., rows, 1]`.
    """
    rows = weights.shape[-2]
    mattered = (weights * in_view >= 1).any(dim=-3)
    row = torch.arange(1, rows + 1, device=weights.device, dtype=into.dtype).unsqueeze(-1)
    last = (mattered * row).amax(dim=-2)  # 0: to none
    into.copy_(torch.where(last > 0, (last + (seen - 1)).to(into.dtype), into))


def _forget_garbage(output: Tensor, queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Recompute the rows of `[B, kv_heads, group, head_dim]` where 0 x NaN from beyond the length leaked in.

    Masking the values would read and write the whole cache at every step; garbage that is not finite
    is rare (memory that was never written), and shows in the output.
    """
    clean = output.isfinite().flatten(1).all(dim=1)
    if not bool(clean.all()):
        for row in (~clean).nonzero().flatten().tolist():
            live = slice(0, int(lengths[row]))
            k, v = (t[row, :, live].to(queries.dtype) for t in (keys, values))
            output[row] = scaled_dot_product_attention(queries[row], k, v, scale=1.0)


def _dtypes(query: Tensor, keys: Tensor) -> tuple[torch.dtype, torch.dtype]:
    compute = torch.promote_types(query.dtype, keys.dtype)
    return compute, torch.promote_types(compute, torch.float32)


def _scaled(query: Tensor, scale: float, in_view: Tensor, log_n: int | None, wide: torch.dtype) -> Tensor:
    """Queries `[..., head_dim]` times scale and, if asked, the log-n factor of the keys in view (`[...]`)."""
    scaled = query.to(wide) * scale
    if log_n is None:
        return scaled
    factor = (in_view.to(wide).log() / math.log(log_n)).clamp_(min=1)
    return scaled * factor.unsqueeze(-1)
