"""Splits by a hash: the same for an image whatever else there is, and none empty."""

import hashlib
import random

import pytest

from datasets_scripts.arrow_files import Row
from datasets_scripts.splits import assign_splits, given_splits


def test_shares():
    rows = [Row(str(i), ["x"], bytes) for i in range(20_000)]
    parts = assign_splits({None: rows}, 0.1, 0.2)
    assert abs(len(parts["validation"]) - 2000) < 150 and abs(len(parts["test"]) - 4000) < 200
    assert sum(map(len, parts.values())) == 20_000
    # With a test split of its own, only validation is taken, and from training alone.
    parts = assign_splits({"train": rows[:10_000], "test": rows[10_000:]}, 0.1, 0.2)
    assert parts["test"] == rows[10_000:] and abs(len(parts["validation"]) - 1000) < 100


def rows_of(ids, groups=None) -> list[Row]:
    return [Row(one, ["x"], bytes, groups and groups[i]) for i, one in enumerate(ids)]


def ids_of(parts: dict[str, list[Row]]) -> dict[str, list[str]]:
    return {split: [row.image_id for row in rows] for split, rows in parts.items()}


def number(name: str) -> float:
    return int(hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), 16) / 16**16


def by_threshold(name: str, validation: float, test: float) -> str:
    return "test" if number(name) < test else "validation" if number(name) < test + validation else "train"


@pytest.mark.parametrize("count", [3, 4, 5, 7, 10, 15, 20, 30, 50])
def test_small_sets_have_no_empty_split_and_only_what_must_moves(count):
    rng = random.Random(count)
    were_empty = 0
    for _ in range(60):
        names = [f"{rng.randrange(10**9)}.jpg" for _ in range(count)]
        parts = ids_of(assign_splits({None: rows_of(names)}, 0.1, 0.1))
        assert list(parts) == ["train", "validation", "test"] and all(parts.values())
        assert sorted(sum(parts.values(), [])) == sorted(names)
        if count == 3:
            assert {len(part) for part in parts.values()} == {1}
        expected = {name: by_threshold(name, 0.1, 0.1) for name in names}
        empty = {"train", "validation", "test"} - {*expected.values()}
        were_empty += bool(empty)
        moved = {name: split for split, part in parts.items() for name in part if expected[name] != split}
        # As many as there were empty splits, each of them in one of those.
        assert sorted(moved.values()) == sorted(empty)
    assert count > 20 or were_empty > 5


def test_an_empty_split_takes_the_nearest(capsys):
    """The smallest number above the interval of test, and then the nearest to [0.001, 0.002) of the rest."""
    names = sorted((f"{i}.jpg" for i in range(12)), key=number)
    assert number(names[0]) > 0.002
    parts = ids_of(assign_splits({None: rows_of(names[::-1])}, 0.001, 0.001))
    assert parts["test"] == names[:1] and parts["validation"] == names[1:2]
    printed = capsys.readouterr().out
    assert f"test would be empty: it takes what is nearest to it by hash, '{names[0]}' of train" in printed
    # Train is the end of [0, 1): it takes the largest numbers, from whatever split has more than one.
    parts = ids_of(assign_splits({None: rows_of(names)}, 0.4995, 0.4995))
    assert number(names[-1]) < 0.999 and parts["train"] == names[-1:]
    assert set(parts["test"]) == {name for name in names if number(name) < 0.4995}


def test_the_order_of_rows_does_not_matter():
    rng = random.Random(1)
    for count in (3, 4, 8):
        names = [f"{rng.randrange(10**9)}" for _ in range(count)]
        parts = ids_of(assign_splits({None: rows_of(names)}, 0.1, 0.1))
        turned = ids_of(assign_splits({None: rows_of(names[::-1])}, 0.1, 0.1))
        assert turned == {split: part[::-1] for split, part in parts.items()}


def test_more_photos_move_none():
    names = [f"{i}.jpg" for i in range(500)]
    few, many = (ids_of(assign_splits({None: rows_of(names[:n])}, 0.1, 0.2)) for n in (200, 500))
    assert all(set(few[split]) <= set(many[split]) for split in few)


def test_splits_of_the_thresholds_stay_as_they_are():
    """Drawn at 8b01c16, of these names and shares."""
    parts = ids_of(assign_splits({None: rows_of([f"photos/{i}.jpg" for i in range(40)])}, 0.1, 0.15))
    numbers = {split: [int(name[7:-4]) for name in part] for split, part in parts.items()}
    assert numbers["validation"] == [0, 2, 13, 32, 39] and numbers["test"] == [1, 5, 6, 16, 20]


def test_groups_stay_together_and_count_once():
    groups = [f"g{i // 4}" for i in range(12)]
    parts = assign_splits({None: rows_of(map(str, range(12)), groups)}, 0.1, 0.1)
    assert sorted(len(rows) for rows in parts.values()) == [4, 4, 4]
    assert all(len({row.group_id for row in rows}) == 1 for rows in parts.values())
    with pytest.raises(ValueError, match="a split is empty: there are 2 images, .* expected 3 at least"):
        assign_splits({None: rows_of(map(str, range(8)), groups[:8])}, 0.1, 0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_to_split(count):
    with pytest.raises(
        ValueError, match=f"there are {count} images.*for test, validation, train; expected 3"
    ) as caught:
        assign_splits({"train": rows_of(map(str, range(count)))}, 0.1, 0.1)
    assert "\n" not in str(caught.value)
    # With a test split of its own, two are enough.
    parts = {"train": rows_of(map(str, range(count))), "test": rows_of(["t"])}
    if count == 2:
        assert {split: len(rows) for split, rows in assign_splits(parts, 0.1, 0.1).items()} == {
            "train": 1, "validation": 1, "test": 1
        }  # fmt: skip
    else:
        with pytest.raises(ValueError, match="there are 1 images.*for validation, train; expected 2"):
            assign_splits(parts, 0.1, 0.1)


def test_what_a_source_may_not_say():
    a, b = rows_of(["a"]), rows_of(["b"])
    for parts in ({}, {"train": []}, {None: []}):
        with pytest.raises(ValueError, match="there are no rows"):
            given_splits(parts)
    with pytest.raises(ValueError, match="the image 'b' has no split, others have"):
        given_splits({"train": a, None: b})
    with pytest.raises(ValueError, match="the splits validation, test and none for training"):
        given_splits({"validation": a, "test": b})
    with pytest.raises(ValueError, match="a split is empty .*validation: 0 images"):
        assign_splits({"train": a, "validation": [], "test": b}, 0.1, 0.1)
    assert given_splits({"test": a}) == {"train": a} == given_splits({None: [], "dev": a})


def test_nearest_is_nearest_to_the_whole_interval():
    """To [0.1, 0.2), 0.205 is nearer than 0.09, though farther from where it starts."""

    def name_at(place: float) -> str:
        return next(name for name in map(str, range(10**6)) if abs(number(name) - place) < 0.001)

    names = [name_at(place) for place in (0.03, 0.09, 0.205, 0.5, 0.8)]
    parts = ids_of(assign_splits({None: rows_of(names)}, 0.1, 0.1))
    assert parts == {"train": names[3:], "validation": names[2:3], "test": names[:2]}
    names[2] = name_at(0.25)
    parts = ids_of(assign_splits({None: rows_of(names)}, 0.1, 0.1))
    assert parts == {"train": names[2:], "validation": names[1:2], "test": names[:1]}


def test_a_split_group_stays_together_and_joins_no_groups():
    """40 films of 10 frames; frames of the films 0 and 1 show one thing, so these two films share a split."""
    rows = [Row(f"{film}/{i}", ["x"], bytes, split_group=f"film {film}") for film in range(40) for i in range(10)]
    rows[3].group_id = rows[17].group_id = "a castle"
    parts = assign_splits({None: rows}, 0.2, 0.2)
    splits = {}
    for split, own in parts.items():
        for row in own:
            splits.setdefault(row.split_group, set()).add(split)
    assert all(len(of) == 1 for of in splits.values()) and splits["film 0"] == splits["film 1"]
    assert all(parts.values()) and sum(map(len, parts.values())) == 400
    assert {row.group_id for row in rows} == {None, "a castle"}
    more = [Row(f"{film}/!", ["x"], bytes, split_group=f"film {film}") for film in range(40)]
    for split, own in assign_splits({None: more + rows}, 0.2, 0.2).items():
        assert [row for row in own if row in rows] == parts[split]  # more frames move no film
    assert ids_of(assign_splits({None: rows[::-1]}, 0.2, 0.2)) == {
        split: ids[::-1] for split, ids in ids_of(parts).items()
    }


def test_without_a_split_group_no_image_moves():
    rows = rows_of([str(i) for i in range(300)], [f"g{i // 3}" for i in range(300)])
    expected = {split: [] for split in ("train", "validation", "test")}
    for row in rows:
        expected[by_threshold(row.group_id, 0.1, 0.1)].append(row.image_id)
    assert ids_of(assign_splits({None: rows}, 0.1, 0.1)) == expected


def test_only_a_test_split_is_lacking_it_comes_of_what_is_held_out(capsys):
    """COCO has train2017 and val2017: its training images stay whole."""
    train, held_out = rows_of([f"t{i}" for i in range(100)]), rows_of([f"v{i}" for i in range(40)])
    parts = assign_splits({"train": train, "validation": held_out}, 0.1, 0.3)
    assert parts["train"] == train
    assert ids_of(parts)["test"] == [f"v{i}" for i in range(40) if number(f"v{i}") < 0.75]
    assert sorted(ids_of(parts)["test"] + ids_of(parts)["validation"]) == sorted(row.image_id for row in held_out)
    assert "test taken from 40 images of validation by a hash" in capsys.readouterr().out
    # Two can be divided; one cannot, and test comes of train.
    parts = assign_splits({"train": train, "validation": held_out[:2]}, 0.1, 0.1)
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 100, "validation": 1, "test": 1}
    same = rows_of(["v0", "v1"], ["g", "g"])
    parts = assign_splits({"train": train, "validation": same}, 0.1, 0.1)
    assert parts["validation"] == same
    assert ids_of(parts)["test"] == [row.image_id for row in train if number(row.image_id) < 0.1]
