from collections import deque

import pytest
import torch

from trainers.feature_queue import UNKNOWN_TEXT, FeatureQueue


def contents(queue):
    return sorted(zip(queue.features.tolist(), queue.groups.tolist(), strict=True))


def random_rows(generator, count, dim=3):
    features = torch.randn(count, dim, generator=generator)
    return features, torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


@pytest.mark.parametrize("size", [0, 1, 5, 16])
def test_against_a_deque(size):
    generator = torch.Generator().manual_seed(size)
    queue, reference = FeatureQueue(size, 3), deque(maxlen=size)
    assert len(queue) == 0 and queue.features.shape == (0, 3) and queue.groups.shape == (0,)
    for _ in range(200):
        count = int(torch.randint(0, 2 * size + 3, (1,), generator=generator))
        features, groups = random_rows(generator, count)
        queue.push(features, groups)
        reference.extend(zip(features.tolist(), groups.tolist(), strict=True))
        assert len(queue) == len(reference) == len(queue.features)
        assert contents(queue) == sorted(reference)


def test_wraps_by_hand():
    queue = FeatureQueue(3, 1)
    for value in range(5):
        queue.push(torch.tensor([[float(value)]]), torch.tensor([10 * value]))
    assert contents(queue) == [([2.0], 20), ([3.0], 30), ([4.0], 40)]
    queue.push(torch.arange(7.0)[:, None], torch.arange(7))
    assert contents(queue) == [([4.0], 4), ([5.0], 5), ([6.0], 6)]


@pytest.mark.parametrize("pushes", [(), (2,), (5,), (3, 4), (7,), (5, 5, 3)])
def test_state_round_trip_is_exact(pushes):
    generator = torch.Generator().manual_seed(0)
    queue = FeatureQueue(5, 3)
    for count in pushes:
        queue.push(*random_rows(generator, count))
    state = queue.state_dict()
    assert all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in state.values())

    copy = FeatureQueue(5, 3)
    copy.push(*random_rows(generator, 4))
    copy.load_state_dict(state)
    for count in (0, 1, 3, 2, 9, 1):
        features, groups = random_rows(generator, count)
        queue.push(features, groups)
        copy.push(features, groups)
        assert torch.equal(copy.features, queue.features)
        assert torch.equal(copy.groups, queue.groups)


def test_texts_go_with_their_rows_and_widen_the_queue():
    generator = torch.Generator().manual_seed(1)
    queue, reference = FeatureQueue(5, 3), deque(maxlen=5)
    for count, width in ((2, 0), (2, 1), (3, 3), (0, 2), (2, 1), (9, 2), (4, 0)):
        features, groups = random_rows(generator, count)
        texts = torch.randint(0, 2**63 - 1, (count, width), generator=generator)
        queue.push(features, groups, texts if width else None)
        reference.extend(zip(features.tolist(), groups.tolist(), texts.tolist(), strict=True))
        stored = [[]] * len(queue) if queue.texts is None else queue.texts.tolist()
        widest = len(stored[0])
        expected = [(*row, [*own, *[UNKNOWN_TEXT] * (widest - len(own))]) for *row, own in reference]
        assert sorted(zip(queue.features.tolist(), queue.groups.tolist(), stored, strict=True)) == sorted(expected)
    assert widest == 3  # of rows that are gone: it never gets narrower

    for size in (5, 3, 8):
        copy = FeatureQueue(size, 3)
        copy.push(*random_rows(generator, 2), torch.ones(2, 7, dtype=torch.int64))
        copy.load_state_dict(queue.state_dict())
        rows = sorted(zip(copy.features.tolist(), copy.groups.tolist(), copy.texts.tolist(), strict=True))
        assert rows == sorted(expected[-size:])  # and nothing of the seven texts that it had before
    state = queue.state_dict()
    del state["texts"]  # of an earlier release
    copy = FeatureQueue(5, 3)
    copy.load_state_dict(state)
    assert copy.texts is None and torch.equal(copy.features, queue.features)
    copy.push(*random_rows(generator, 1), torch.tensor([[7]]))
    assert sorted(copy.texts.flatten().tolist()) == [UNKNOWN_TEXT] * 4 + [7]
    for wrong in (torch.zeros(2, 1), torch.zeros(3)):
        with pytest.raises(ValueError, match="texts has shape"):
            copy.push(*random_rows(generator, 3), wrong.long())


def test_state_is_a_snapshot():
    queue = FeatureQueue(2, 1)
    queue.push(torch.ones(2, 1), torch.ones(2, dtype=torch.int64))
    state = queue.state_dict()
    queue.push(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    assert state["features"].tolist() == [[1.0], [1.0]] and state["groups"].tolist() == [1, 1]


@pytest.mark.parametrize("new_size", [0, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("rows", [3, 5, 8])
def test_a_queue_of_another_size_keeps_the_newest(new_size, rows):
    old, new, reference = FeatureQueue(5, 1), FeatureQueue(new_size, 1), deque(maxlen=5)
    for value in range(rows):
        old.push(torch.tensor([[float(value)]]), torch.tensor([value]))
        reference.append(value)
    new.load_state_dict(old.state_dict())
    reference = deque(reference, maxlen=new_size)
    assert contents(new) == [([float(value)], value) for value in sorted(reference)]
    for value in range(100, 100 + 2 * new_size + 1):
        new.push(torch.tensor([[float(value)]]), torch.tensor([value]))
        reference.append(value)
        assert contents(new) == [([float(value)], value) for value in sorted(reference)]


def test_rows_are_exact_in_the_stored_dtype():
    features = torch.randn(4, 3, requires_grad=True)
    queue, half = FeatureQueue(4, 3), FeatureQueue(4, 3, dtype=torch.float16)
    for each in (queue, half):
        each.push(features, torch.arange(4))
        assert not each.features.requires_grad
    assert torch.equal(queue.features, features.detach())
    assert torch.equal(half.features, features.detach().half())


def test_bad_input_is_refused():
    queue = FeatureQueue(4, 3)
    for shape in ((2, 4), (3,), (1, 2, 3)):
        with pytest.raises(ValueError, match="expected .rows, 3."):
            queue.push(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    with pytest.raises(ValueError, match="groups"):
        queue.push(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected .rows, 3."):
        queue.load_state_dict(FeatureQueue(4, 2).state_dict())
    with pytest.raises(ValueError, match="-1"):
        FeatureQueue(-1, 3)
    assert len(queue) == 0
