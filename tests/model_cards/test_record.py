"""What a run knows of itself."""

from __future__ import annotations

from model_cards import describe_captions


def test_captions_are_counted():
    assert describe_captions([["a red car", "car"], ["the moon"]]) == {
        "images": 2,
        "captions": 3,
        "captions_per_image": [1.5, 1, 2],
        "words_per_caption": [2.0, 1, 3],
    }
