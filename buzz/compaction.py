"""Applying a policy's rule until it is content."""

from __future__ import annotations

from buzz.merging import goals
from buzz.policy import Compaction, Policy, View


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
    first, keep, merge = view, view.span(0, view.n), None
    while policy.due(view.n, view.sampled):
        step = policy.compact(view)
        index = step.index
        if index.shape[:-1] != keep.shape[:-1] or not index.shape[-1]:
            heads = ", ".join(map(str, keep.shape[:-1]))
            raise RuntimeError(
                f"policy {policy} returned survivors of shape {list(index.shape)}, and not [{heads}, m], "
                "m at least 1"
            )
        if (index.shape[-1], step.sampled) == (view.n, view.sampled):
            raise RuntimeError(
                f"policy {policy} is due at {view.n} entries and its compaction changes nothing"
            )
        if step.merge is not None or merge is not None:
            past = goals(keep, first.n) if merge is None else merge
            goal = goals(index, view.n) if step.merge is None else step.merge
            merge = goal.gather(-1, past.clamp(min=0)).where(past >= 0, past)
        keep = keep.gather(-1, index)
        state = {name: step.state.get(name, old.gather(-1, index)) for name, old in view.state.items()}
        norm = None if view.value_norm is None else view.value_norm.gather(-1, index)
        view = View(step.sampled, view.seen, view.position.gather(-1, index), state, norm)
    return Compaction(keep, view.sampled, view.state, merge)
