"""Agreement with the teacher against loops, and what a perfect, a constant and a random student have."""

import math

import numpy as np
import pytest
import torch
from tiny_towers import scatter
from tiny_trainer import make_trainer

from trainers import agreement
from trainers.agreement import agreement_with_teacher, teachers_first


def figures_of(image, text, teacher_image, teacher_text, text_ids=None):
    return agreement_with_teacher(image, text, teachers_first(teacher_image, teacher_text, text_ids))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference(queries, answers, teacher_queries, teacher_answers):
    """The definition, one query and one candidate at a time, in float64."""
    first = min(10, len(answers) // 10)
    if len(answers) < 20:
        return None
    total = 0
    for query, teacher_query in zip(unit(queries), unit(teacher_queries)):
        of_teacher = [float(teacher_query @ row) for row in unit(teacher_answers)]
        of_student = [float(query @ row) for row in unit(answers)]
        wanted = sorted(range(len(answers)), key=lambda i: -of_teacher[i])[:first]
        for i in wanted:
            total += sum(score >= of_student[i] - 1e-9 for score in of_student) <= first
    return 100 * total / (first * len(queries))


def problem(seed, images, texts, noise=0.7, width=8):
    rng = np.random.default_rng(seed)
    teacher = [rng.normal(size=(count, width)) for count in (images, texts)]
    student = [rows @ rng.normal(size=(width, width)) * noise + rows for rows in teacher]
    return [torch.tensor(rows, dtype=torch.float32) for rows in (*student, *teacher)]


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
@pytest.mark.parametrize(("images", "texts"), [(37, 64), (20, 21), (120, 25), (19, 40), (40, 19)])
def test_against_loops(monkeypatch, images, texts, at_once):
    monkeypatch.setattr(agreement, "SCORES_AT_ONCE", at_once)
    rows = problem(images, images, texts)
    image, text, teacher_image, teacher_text = (of.double().numpy() for of in rows)
    expected = {
        "image_to_text_agreement": reference(image, text, teacher_image, teacher_text),
        "text_to_image_agreement": reference(text, image, teacher_text, teacher_image),
    }
    expected = {name: value for name, value in expected.items() if value is not None}
    figures = figures_of(*rows)
    found = {name: figures[name] for name in figures if name.endswith("_agreement")}
    assert found == pytest.approx(expected)
    assert 0 < figures["agreement"] < 100
    assert figures["agreement"] == pytest.approx(sum(expected.values()) / len(expected))
    chances = [100 * min(10, n // 10) / n for n in (texts, images) if n >= 20]
    assert figures["agreement_by_chance"] == pytest.approx(sum(chances) / len(chances))


def test_the_teacher_agrees_with_itself_and_a_random_student_by_chance():
    _, _, image, text = problem(0, 200, 300)
    assert figures_of(image, text, image * 3, text * 0.1)["agreement"] == 100
    generator = torch.Generator().manual_seed(1)
    random = [torch.randn(len(rows), 8, generator=generator) for rows in (image, text)]
    figures = figures_of(*random, image, text)
    assert abs(figures["agreement"] - figures["agreement_by_chance"]) < 1.5


def test_ties_count_against_the_student():
    _, _, image, text = problem(0, 30, 40)
    constant = torch.ones(30, 5), torch.ones(40, 5)
    assert figures_of(*constant, image, text)["agreement"] == 0
    # The teacher's first answer to the only query is a; the student holds a and b for equally good.
    teacher = torch.eye(20)[:1], torch.eye(20)
    query, answers = torch.eye(3)[:1], torch.eye(3)[[0, 1, *[2] * 18]]
    assert figures_of(query, answers, *teacher)["image_to_text_agreement"] == 50  # k is 2
    answers = torch.eye(3)[[0, 0, 0, *[2] * 17]]
    assert figures_of(query, answers, *teacher)["image_to_text_agreement"] == 0


def test_of_equal_texts_the_first_counts_alone():
    rows = problem(3, 40, 30)
    ids = torch.cat([torch.arange(30), torch.arange(7)])
    doubled = [rows[0], rows[1][ids], rows[2], rows[3][ids]]
    assert figures_of(*doubled, text_ids=ids) == figures_of(*rows)
    assert figures_of(*doubled) != figures_of(*rows)


def test_too_few_candidates_give_no_figure():
    assert figures_of(*problem(0, 19, 19)) == {}
    assert figures_of(*[of[:0] if i % 2 else of for i, of in enumerate(problem(0, 30, 30))]) == {}
    assert list(figures_of(*problem(0, 1, 20))) == [
        "image_to_text_agreement",
        "agreement",
        "agreement_by_chance",
    ]


def test_what_cannot_be_compared_is_refused():
    rows = problem(0, 30, 40)
    with pytest.raises(ValueError, match="30 images and 40 texts, the teacher 29 and 40"):
        figures_of(*rows[:2], rows[2][1:], rows[3])
    rows[1][3, 2] = math.nan
    with pytest.raises(ValueError, match="text_embeds must be finite"):
        figures_of(*rows)


def test_a_trainer_asks_the_teacher_once_for_each_split(tmp_path, rows, validation_rows, monkeypatch):
    """The student, which changes, is asked each time."""
    asked = []
    normalised = agreement._normalised
    monkeypatch.setattr(agreement, "_normalised", lambda of, name: asked.append(name) or normalised(of, name))
    trainer = make_trainer(tmp_path, rows)
    figures = []
    for _ in range(2):
        scatter(trainer.model)
        figures += [trainer.evaluate(split)["eval_agreement"] for split in (validation_rows, rows, validation_rows)]
    assert asked.count("image_embeds") == 6 and asked.count("teacher_image") == asked.count("teacher_text") == 2
    assert figures[0] == figures[2] != figures[3]
    assert make_trainer(tmp_path, rows, model=trainer.model).evaluate(rows)["eval_agreement"] == figures[4]
