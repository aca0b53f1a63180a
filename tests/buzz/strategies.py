"""Policies of every kind and size, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from buzz import H2O, Buzz, Full, Streaming

modes = st.sampled_from(["in_cache", "original"])
buzzes = st.builds(
    Buzz,
    sink=st.integers(0, 6),
    window=st.integers(0, 12),
    threshold=st.integers(1, 20),
    stride=st.integers(3, 8),
    local_max=st.booleans(),
    accumulate=st.booleans(),
    log_n=st.none() | st.integers(2, 30),
    positions=modes,
)
h2os = st.integers(1, 12).flatmap(
    lambda heavy: st.builds(
        H2O, heavy=st.just(heavy), recent=st.integers(0, 8), block=st.integers(1, heavy), positions=modes
    )
)
streamings = st.integers(1, 12).flatmap(
    lambda window: st.builds(
        Streaming,
        sink=st.integers(0, 5),
        window=st.just(window),
        block=st.integers(1, window),
        positions=modes,
    )
)
policies = buzzes | h2os | streamings | st.builds(Full, bound=st.just(200), positions=modes)
