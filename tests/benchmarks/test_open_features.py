"""Teacher features stay in their files: neither opening nor reading them takes memory of their size."""

from benchmarks.open_features import measure


def test_features_are_not_copied_to_memory():
    figures = measure(0.06)
    assert figures["features_bytes"] > 50e6 and figures["read_bytes"] > 40e6
    for name in ("opening_bytes", "main_bytes", "worker_bytes"):
        assert figures[name] < 15e6, name
