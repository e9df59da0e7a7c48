"""A student narrower than its teacher: the projection, training under it, and evaluation across."""

import json

import numpy as np
import pytest
import torch
from conftest import make_rows, make_student
from huggingface_hub import HfApi
from tiny_trainer import largest_difference, make_trainer

from rows.columns import rows_and_captions
from rows.teacher_columns import teacher_rows
from trainers import DSMDTrainer, retrieval_metrics
from trainers.report import across_table, results_table
from trainers.teacher_pca import PCA_FILE, fit_pca, load_pca, projection_of_student, save_pca, stored_pca


WIDE = 24  # the teacher's width; the student has 16


@pytest.fixture(scope="module")
def wide_rows():
    return make_rows(48, dim=WIDE)


@pytest.fixture(scope="module")
def components(wide_rows):
    return fit_pca([teacher_rows(wide_rows)])


def test_pca_by_hand():
    """Rows along (3, 4) matter most, then its normal."""
    image = torch.tensor([[3.0, 4.0], [30.0, 40.0], [4.0, -3.0]])
    components = fit_pca([(image, image)])
    expected = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    torch.testing.assert_close(components, expected)


def test_pca_of_parts_is_that_of_the_whole_and_counts_the_modalities_the_same(wide_rows):
    image, text = teacher_rows(wide_rows)
    whole = fit_pca([(image, text)])
    torch.testing.assert_close(whole.T @ whole, torch.eye(WIDE), atol=1e-5, rtol=0)
    parts = fit_pca([(image[:7], text[:1]), (image[7:7], text[1:50]), (image[7:], text[50:])])
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)
    unit = [torch.nn.functional.normalize(rows.double(), dim=1).numpy() for rows in (image, text)]
    values, vectors = np.linalg.eigh(sum(rows.T @ rows / len(rows) for rows in unit))
    for k in (1, 10):
        top = vectors[:, np.argsort(-values)[:k]]
        ours = whole[:, :k].double().numpy()
        assert np.allclose(ours @ ours.T, top @ top.T, atol=1e-4)


def test_a_full_projection_changes_no_cosine(wide_rows, components):
    image, text = teacher_rows(wide_rows)
    groups, caption_to_image = rows_and_captions(wide_rows)
    before = retrieval_metrics(image, text, groups, groups[caption_to_image])
    assert retrieval_metrics(image @ components, text @ components, groups, groups[caption_to_image]) == before


def test_pca_of_one_modality_alone_is_that_of_the_same_rows_twice():
    rows, nothing = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.empty(0, 3)
    for alone in ((nothing, rows), (rows, nothing)):
        assert torch.allclose(fit_pca([alone]), fit_pca([(rows, rows)]), atol=1e-6)
    with pytest.raises(ValueError, match="there are none of either"):
        fit_pca([(nothing, nothing)])


def test_a_damaged_file_is_named(tmp_path):
    assert load_pca(tmp_path) is None
    save_pca(torch.eye(3)[:, :2], tmp_path)
    assert torch.equal(load_pca(tmp_path), torch.eye(3)[:, :2])
    (tmp_path / PCA_FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        load_pca(tmp_path)


def test_a_repository_of_the_hub_gives_what_it_holds_as_a_folder_does(tmp_path, hub):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    save_pca(torch.eye(3)[:, :2], tmp_path / "with")
    (tmp_path / "without" / "README.md").write_text("no matrix")
    for kind in ("model", "dataset"):
        for name, expected in (("with", torch.eye(3)[:, :2]), ("without", None)):
            HfApi().create_repo(f"user/{kind}-{name}", repo_type=kind)
            HfApi().upload_folder(repo_id=f"user/{kind}-{name}", repo_type=kind, folder_path=tmp_path / name)
            for found in (stored_pca(tmp_path / name, kind), stored_pca(f"user/{kind}-{name}", kind)):
                assert found is expected or torch.equal(found, expected)
    assert torch.equal(projection_of_student("user/model-with", 2, None), torch.eye(3)[:, :2])
    assert projection_of_student("user/model-with", 2, 2) is None


def test_training_under_a_projection_is_training_on_projected_features(tmp_path, wide_rows, components):
    projection = components[:, :16]

    def project(row):
        row["teacher_image_embeds"] = (np.array(row["teacher_image_embeds"]) @ projection.numpy()).tolist()
        row["teacher_text_embeds"] = (np.array(row["teacher_text_embeds"]) @ projection.numpy()).tolist()
        return row

    narrow_rows = wide_rows.map(project, features=make_rows(1).features)  # rounded to float16 once more
    settings = {"max_steps": 3, "learning_rate": 1e-3, "queue_size": 24}
    narrow = make_trainer(tmp_path / "narrow", narrow_rows, **settings)
    narrow.train()
    student, processor = make_student()
    under = DSMDTrainer(
        model=student,
        args=make_trainer(tmp_path / "under", narrow_rows, **settings).args,
        train_dataset=wide_rows,
        processing_class=processor,
        teacher_projection=projection,
    )
    under.train()
    losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (narrow, under)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert under.image_queue.features.shape[1] == 16
    torch.testing.assert_close(
        torch.nn.functional.normalize(narrow.image_queue.features), under.image_queue.features, atol=2e-3, rtol=0
    )
    under.save_model(str(tmp_path / "saved"))
    assert torch.equal(load_pca(tmp_path / "saved"), projection)


def make_wide(folder, rows, projection, **settings):
    student, processor = make_student()
    args = make_trainer(folder, make_rows(32), **settings).args
    return DSMDTrainer(
        model=student, args=args, train_dataset=rows, processing_class=processor, teacher_projection=projection
    )


def test_resume_under_a_projection_is_exact_and_needs_the_same(tmp_path, wide_rows, components):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = make_wide(tmp_path / "a", wide_rows, components[:, :16], **settings)
    unbroken.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed = make_wide(tmp_path / "b", wide_rows, components[:, :16], **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0
    other = make_wide(tmp_path / "c", wide_rows, components[:, 1:17], **settings)
    with pytest.raises(ValueError, match="another projection"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_projection_of_another_width_is_refused(tmp_path, wide_rows, components):
    with pytest.raises(ValueError, match=r"\[24, 12\]; expected \[teacher's width, 16\]"):
        make_wide(tmp_path, wide_rows, components[:, :12])
    with pytest.raises(ValueError, match="width 24, expected 16"):
        make_wide(tmp_path, wide_rows, None)


def test_evaluation_across_and_by_folds(tmp_path, components):
    rows = make_rows(20, seed=3, dim=WIDE)
    trainer = make_wide(tmp_path, make_rows(32, dim=WIDE), components[:, :16])
    metrics = trainer.evaluate(rows, metric_key_prefix="test", fold_size=5)
    image, text = trainer.encode(rows)
    teacher_image, teacher_text = teacher_rows(rows)
    groups, of = rows_and_captions(rows)
    full = retrieval_metrics(teacher_image, teacher_text, groups, groups[of])
    assert metrics["teacher_test_rsum"] == full["rsum"]  # at its own width: what the student is compared with
    teacher_image, teacher_text = teacher_image @ components[:, :16], teacher_text @ components[:, :16]
    reduced = retrieval_metrics(teacher_image, teacher_text, groups, groups[of])
    assert metrics["teacher_reduced_test_rsum"] == reduced["rsum"]
    # A student's caption looks among the teacher's images: right when an image of its group is among the k best.
    scores = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(teacher_image, dim=1).T
    for k in (1, 5, 10):
        hits = [
            any(groups[i] == groups[of[caption]] for i in scores[caption].topk(k).indices)
            for caption in range(len(text))
        ]
        assert metrics[f"teacher_index_test_text_to_image_r{k}"] == pytest.approx(100 * np.mean(hits))
    across = retrieval_metrics(image, teacher_text, groups, groups[of])
    assert metrics["teacher_index_test_image_to_text_r5"] == across["image_to_text_r5"]
    assert metrics["student_index_test_text_to_image_r5"] == across["text_to_image_r5"]
    folds = []
    for start in range(0, 20, 5):
        own = (of >= start) & (of < start + 5)
        part = groups[start : start + 5]
        folds.append(retrieval_metrics(image[start : start + 5], text[own], part, groups[of[own]])["rsum"])
    assert metrics["test_5_rsum"] == pytest.approx(np.mean(folds)) and metrics["test_images"] == 20
    assert metrics["test_5_rsum"] > metrics["test_rsum"]  # fewer to choose from
    speeds = {f"ms_per_{kind}_batch_{batch}": 1.0 for kind in ("image", "caption") for batch in (1, 64)}
    table = results_table({**metrics, **speeds, "parameters": 1})
    assert "test split, 20 images" in table and "| 5 rsum" in table and "rsum at the student's width" in table
    assert "student on teacher's index" in across_table(metrics)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    with pytest.raises(ValueError, match="20 images are not folds of 6"):
        trainer.evaluate(rows, fold_size=6)


def test_a_perfect_student_is_the_teacher_on_either_index(tmp_path):
    """With the teacher's own features as the student's, all four figures are one."""
    rows = make_rows(16)
    trainer = make_trainer(tmp_path, make_rows(32))
    trainer.encode = lambda dataset: teacher_rows(dataset)
    metrics = trainer.evaluate(rows)
    for name in ("image_to_text_r1", "text_to_image_r5", "rsum"):
        figures = {metrics[f"{prefix}eval_{name}"] for prefix in ("", "teacher_", "teacher_index_", "student_index_")}
        assert len(figures) == 1
    assert metrics["eval_share_of_teacher"] == 100
    json.dumps(metrics)
