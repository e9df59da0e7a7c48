"""How long a call takes."""

from __future__ import annotations

from trainers import timing


def test_the_median_leaves_out_the_two_runs_that_warm_up(monkeypatch):
    now, takes = [0.0], iter([100.0, 90.0, 1.0, 5.0, 2.0])

    def call():
        now[0] += next(takes)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.median_seconds(call, runs=3) == 2.0
    assert next(takes, None) is None
