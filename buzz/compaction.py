"""Applying a policy's rule, to all but the pinned entries, until it is content."""

from __future__ import annotations

import torch
from torch import Tensor

from buzz.merging import goals
from buzz.policy import Compaction, Policy, View
from buzz.regions import Kind, Region


def due(policy: Policy, n: int, sampled: int) -> bool:
    """Whether a cache of `n` entries, `sampled` of them sampled already, must be compacted."""
    return n > policy.pins and policy.rule.due(n - policy.pins, sampled)


def regions(policy: Policy, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
    """Why the entries of a cache at rest are there: the pinned ones, and `Policy.regions` of the others."""
    pins = min(policy.pins, n)
    if not pins:
        return policy.regions(n, sampled, seen)
    others = policy.rule.regions(n - pins, sampled, seen - pins)
    moved = (Region(each.kind, each.start + pins, each.stop + pins) for each in others)
    return Region(Kind.PINNED, 0, pins), *moved


def compact(policy: Policy, view: View) -> Compaction:
    """What a policy that is due leaves of a cache at rest, in as many rounds as it takes.

    Args:
        policy: the rule.
        view: the cache, `[..., kv_heads, n]`.

    Returns:
        All rounds in one: `index` is of the entries in `view`, and every state of the policy is given.

    Raises:
        RuntimeError: the policy is not as `Policy.compact` asks for, or would never be content.
    """
    pins, rule = min(policy.pins, view.n), policy.rule
    if pins:
        return _beside(view, pins, compact(rule, _beyond(view, pins)))
    if not rule.due(view.n, view.sampled):
        return Compaction(view.span(0, view.n), view.sampled, view.state)
    n, whole = view.n, _round(rule, view)
    step = whole
    while rule.due(step.index.shape[-1], step.sampled):
        view = _left(view, step)
        step = _round(rule, view)
        whole = _then(n, whole, step)
    return whole


def _round(policy: Policy, view: View) -> Compaction:
    """What one application of the rule leaves, with every state."""
    step = policy.compact(view)
    if wrong := _wrong(view, step) or _astray(view, step):
        raise RuntimeError(f"policy {policy} at {view.n} entries: {wrong}")
    state = {
        name: step.state[name] if name in step.state else old.gather(-1, step.index)
        for name, old in view.state.items()
    }
    return Compaction(step.index, step.sampled, state, step.merge)


def _left(view: View, step: Compaction) -> View:
    """What a round left, as the next one sees it."""
    norm = None if view.value_norm is None else view.value_norm.gather(-1, step.index)
    position = view.position.gather(-1, step.index)
    return View(step.sampled, view.seen, position, step.state, norm, view.pinned)


def _then(n: int, first: Compaction, second: Compaction) -> Compaction:
    """One round, of `n` entries, and another of what it left: both in one."""
    merge = None
    if first.merge is not None or second.merge is not None:
        past = goals(first.index, n) if first.merge is None else first.merge
        goal = goals(second.index, first.index.shape[-1]) if second.merge is None else second.merge
        merge = goal.gather(-1, past.clamp(min=0)).where(past >= 0, past)
    return Compaction(first.index.gather(-1, second.index), second.sampled, second.state, merge)


def _beyond(view: View, pins: int) -> View:
    """What is not pinned."""
    state = {name: old[..., pins:] for name, old in view.state.items()}
    norm = None if view.value_norm is None else view.value_norm[..., pins:]
    return View(view.sampled, view.seen, view.position[..., pins:], state, norm, pins)


def _beside(view: View, pins: int, outcome: Compaction) -> Compaction:
    """What is left of a view: the pinned entries as they are, and the outcome for the others."""
    first, merge = view.span(0, pins), outcome.merge
    if merge is not None:
        merge = torch.cat([first, torch.where(merge < 0, merge, merge + pins)], dim=-1)
    state = {
        name: torch.cat([view.state[name][..., :pins], new], dim=-1) for name, new in outcome.state.items()
    }
    index = torch.cat([first, outcome.index + pins], dim=-1)
    return Compaction(index, outcome.sampled, state, merge)


def _wrong(view: View, step: Compaction) -> str | None:
    """What is wrong with what a policy returned, if anything is."""
    if not isinstance(step, Compaction):
        return f"compact returned {_kind(step)}, and not a Compaction"
    index, merge = step.index, step.merge
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        return f"the index of survivors is {_kind(index)}, and not a tensor of int64"
    heads = view.position.shape[:-1]
    if index.shape[:-1] != heads or not index.shape[-1]:
        words = ", ".join(map(str, heads))
        return f"survivors have the shape {list(index.shape)}, and not [{words}, m], m at least 1"
    count = index.shape[-1]
    if not 0 <= step.sampled <= count:
        return f"{step.sampled} of {count} survivors cannot be sampled"
    if (count, step.sampled) == (view.n, view.sampled):
        return "it is due, and its compaction changes nothing"
    for name, state in step.state.items():
        if name not in view.state:
            return f"it changes the state {name!r}, which it does not declare"
        if not isinstance(state, Tensor) or state.dtype != view.state[name].dtype:
            return f"the state {name!r} is {_kind(state)}, and not {_kind(view.state[name])}"
        if state.shape != index.shape:
            return f"the state {name!r} has the shape {list(state.shape)}, and not {list(index.shape)}"
    if merge is not None and merge.shape != view.position.shape:
        return f"the merge has the shape {list(merge.shape)}, and not {list(view.position.shape)}"
    return None


def _astray(view: View, step: Compaction) -> str | None:
    """Which survivors are none, or come in the wrong order, if any: what the values show."""
    index, merge, count = step.index, step.merge, step.index.shape[-1]
    outside = (index[..., 0] < 0) | (index[..., -1] >= view.n)
    if bool((outside | (index[..., 1:] <= index[..., :-1]).any(dim=-1)).any()):
        return f"survivors must be strictly ascending, from 0 to {view.n - 1}"
    if merge is None:
        return None
    if int(merge.min()) < -1 or int(merge.max()) >= count:
        return f"entries can be merged into the survivors 0 to {count - 1} or nowhere, -1"
    if bool((merge.gather(-1, index) != torch.arange(count, device=index.device)).any()):
        return "a survivor must be merged into itself"
    return None


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
