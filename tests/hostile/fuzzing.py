"""How the fuzz tests run: seeded, each example on a clock; 500 in all, twenty times as many in `make soak`."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


SECONDS = 30  # for one example: far more than any needs on a loaded machine
# For `@pytest.mark.parametrize("times", TIMES)`.
TIMES = [pytest.param(1, id="sample"), pytest.param(20, id="whole", marks=pytest.mark.soak)]
# What may stand in a file that a stranger sends.
NASTY = st.sampled_from(
    ["", " ", "\0", "\ud800", "\u202egnp.exe", "\x1b[31m", "a\nb", "---", "🐈", "م", "../x", "/etc/passwd", "x" * 9999]
)
TEXT = st.text(max_size=20) | NASTY
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def fuzz(count: int, **strategies) -> Callable:
    """Calls the decorated check with `count` examples, at once."""

    def run(check: Callable) -> None:
        def on_a_clock(**values):
            with at_most(SECONDS):
                check(**values)

        settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # the examples are small, and shrinking one takes minutes
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(on_a_clock))()

    return run


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises in the middle of what takes longer."""

    def stop(number, frame):
        raise TimeoutError(f"this takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutations(files: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the files, cut, or with some bytes changed, dropped, doubled or put in."""

    @st.composite
    def mutated(draw) -> bytes:
        data = bytearray(draw(st.sampled_from(files)))
        for _ in range(draw(st.integers(1, 6))):
            if not data:
                break
            at = draw(st.integers(0, len(data) - 1))
            # The first bytes hold what lies.
            at = at % min(len(data), 64) if draw(st.booleans()) else at
            kind = draw(st.sampled_from(["flip", "set", "cut", "drop", "double", "put"]))
            if kind == "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            elif kind == "set":
                data[at : at + 4] = draw(st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]))
            elif kind == "cut":
                del data[at:]
            elif kind == "drop":
                del data[at : at + draw(st.integers(1, 40))]
            elif kind == "double":
                data[at:at] = data[at : at + 40]
            else:
                data[at:at] = draw(st.binary(max_size=8))
        return bytes(data)

    return mutated()
