"""Policies of every kind and size, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from buzz import H2O, Buzz, Buzz2, Cascade, Corm, Elastic, Full, Streaming, Window

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
windows = st.integers(1, 12).flatmap(
    lambda window: st.builds(Window, window=st.just(window), block=st.integers(1, window), positions=modes)
)
corms = st.tuples(st.integers(0, 6), st.integers(1, 10)).flatmap(
    lambda sizes: st.builds(
        Corm,
        budget=st.just(sum(sizes)),
        recent=st.just(sizes[0]),
        queries=st.integers(1, 8),
        block=st.integers(1, sizes[1]),
        positions=modes,
    )
)
cascades = st.integers(1, 6).flatmap(
    lambda size: st.builds(
        Cascade,
        sink=st.integers(0, 4),
        cascades=st.integers(1, 4),
        size=st.just(size),
        halve=st.booleans(),
        block=st.integers(1, size),
        positions=modes,
    )
)


@st.composite
def _elastics(draw: st.DrawFn) -> Elastic:
    heavy, recent = draw(st.integers(1, 12)), draw(st.integers(0, 6))
    distance = draw(st.integers(0, heavy + recent))
    return Elastic(
        sink=draw(st.integers(0, 4)),
        heavy=heavy,
        recent=recent,
        distance=distance,
        block=draw(st.integers(1, min(heavy, heavy + recent + 1 - distance))),
        positions=draw(modes),
    )


elastics = _elastics()
buzz2s = st.integers(1, 12).flatmap(
    lambda hot: st.integers(0, 12).flatmap(
        lambda cells: st.builds(
            Buzz2,
            sink=st.integers(0, 5),
            window=st.integers(0, 8),
            hot=st.just(hot),
            cells=st.just(cells),
            horizon=st.none() | st.integers(2, 40),
            mean=st.booleans(),
            values=st.booleans(),
            block=st.integers(1, hot + cells),
            positions=modes,
        )
    )
)
fulls = st.builds(Full, bound=st.just(200), positions=modes)
policies = buzzes | buzz2s | cascades | corms | elastics | fulls | h2os | streamings | windows
