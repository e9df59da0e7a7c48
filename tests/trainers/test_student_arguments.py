"""Settings of a student that contradict each other are refused by name."""

import pytest

from trainers.student_arguments import StudentArguments


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vision_layers": 0}, "vision_layers=0: expected 1 or more"),
        ({"text_layers": -1}, "text_layers=-1: expected 0 or more"),
        ({"text_layers": 2, "text_layer_indices": [0, 1]}, "say the same"),
        ({"text_layer_indices": [2, 0]}, "expected numbers from 0 that rise"),
        ({"text_layer_indices": [0, 0]}, "expected numbers from 0 that rise"),
        ({"text_layer_indices": []}, "expected numbers from 0 that rise"),
        ({"vision_layer_indices": [-1]}, "expected numbers from 0 that rise"),
        ({"text_config": {"model_type": "bert"}, "text_layers": 1}, "are for a pre-trained tower"),
        ({"text_config": {"model_type": "bert"}, "trim_vocabulary": 9}, "is for a pre-trained text tower"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StudentArguments(**settings)
