"""The parts of a step's time."""

from __future__ import annotations

import enum


class Part(enum.StrEnum):
    """Where a step's time goes. Operations of the first five have a floor."""

    LINEAR = "linear"
    """Linear layers, the head among them."""
    ATTENTION = "attention"
    """Writing new keys and values, reading all, and the attention itself."""
    SCORES = "scores"
    """Recording what the policy asks for, where the attention's own kernel does not do it."""
    SAMPLING = "sampling"
    """From the logits to tokens."""
    EMBEDDING = "embedding"
    """From tokens to rows."""
    DISPATCH = "dispatch"
    """The rest of the forward pass: norms, rotations, activations, residuals, packing, and Python."""
    COMPACTION = "compaction"
    """Beginning and ending segments: eviction, the moving of survivors, quantisation."""
    DELIVERY = "delivery"
    """Detokenising, and the hand-off to the readers' event loop."""
    OTHER = "other"
    """The rest of the step: commands, scheduling, books."""
