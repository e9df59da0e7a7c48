"""What Trainer takes and a trainer here does not is refused by name; several evaluation sets are as in Trainer."""

import datasets
import pytest
import torch
from conftest import make_rows, make_student
from tiny_trainer import largest_difference, make_trainer

import trainers
from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments
from trainers.argument_checks import REFUSED, check_student


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("trainer_class", [DSMDTrainer, ContrastiveTrainer])
def test_an_argument_without_effect_is_refused_by_name(tmp_path, rows, name, trainer_class):
    model, processor = make_student()
    args = DSMDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    given = {"model": model, "args": args, "train_dataset": rows, "processing_class": processor}
    with pytest.raises(ValueError, match=f"^{name} has no effect in {trainer_class.__name__}: "):
        trainer_class(**given, **{name: lambda *_: None})
    trainer_class(**given, **{name: None})  # as good as left out


def test_predict_is_refused(tmp_path, rows):
    with pytest.raises(NotImplementedError, match="use `evaluate` for figures"):
        make_trainer(tmp_path, None).predict(rows)


class PeftModel(torch.nn.Module):
    """As peft's: it stands before the model, whose attributes it has, and holds its adapters' configurations."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config, self.peft_config = model, model.config, {"default": object()}


@pytest.mark.parametrize("where", ["around", "tower", "injected"])
@pytest.mark.parametrize("trainer_class", [DSMDTrainer, ContrastiveTrainer])
def test_an_adapter_is_refused_at_the_start(tmp_path, rows, where, trainer_class):
    model, processor = make_student()
    if where == "around":
        model = PeftModel(model)
    elif where == "tower":
        model.text_model = PeftModel(model.text_model)
    else:
        model.vision_model._hf_peft_config_loaded = True
    args = DSMDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"has an adapter of PEFT.*merge_and_unload\(\)"):
        trainer_class(model, args, train_dataset=rows, processing_class=processor)


def test_a_model_of_another_kind_is_refused_by_what_it_lacks():
    model = make_student()[0]
    del model.logit_scale
    with pytest.raises(ValueError, match="DSMDModel has no logit_scale"):
        check_student(model)
    with pytest.raises(ValueError, match="BertModel has no config.vision_config, config.text_config, config"):
        check_student(make_student()[0].text_model)


SEVERAL = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def test_several_evaluation_sets_are_evaluated_under_their_names(tmp_path, rows):
    sets = {"near": make_rows(10, seed=1), "far": make_rows(7, seed=2)}
    settings = {**SEVERAL, "metric_for_best_model": "near_rsum", "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, rows, eval_dataset=sets, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    for name, of_set in sets.items():
        alone = trainer.evaluate(of_set, metric_key_prefix=f"eval_{name}")
        figures = [key for key in alone if key.endswith(("_r1", "_r5", "_r10", "rsum", "_images", "share_of_teacher"))]
        assert len(figures) > 8 and all(metrics[key] == alone[key] for key in figures)
        assert metrics[f"eval_{name}_images"] == len(of_set) and f"teacher_eval_{name}_rsum" in metrics
    log = trainer.state.log_history
    scores = {entry["step"]: entry["eval_near_rsum"] for entry in log[:-4] if "eval_near_rsum" in entry}
    assert set(scores) == {2, 4} and trainer.state.best_metric == max(scores.values())
    assert trainer.evaluate({"one": sets["far"]})["eval_one_rsum"] == metrics["eval_far_rsum"]


def test_a_run_with_several_evaluation_sets_is_resumed_exactly(tmp_path, rows):
    sets = {"near": make_rows(10, seed=1), "far": make_rows(7, seed=2)}
    settings = {**SEVERAL, "metric_for_best_model": "near_rsum"}
    unbroken = make_trainer(tmp_path / "a", rows, eval_dataset=sets, **settings)
    unbroken.train()
    resumed = make_trainer(tmp_path / "b", rows, eval_dataset=sets, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0
    evaluations = [[e["step"] for e in t.state.log_history if "eval_far_rsum" in e] for t in (unbroken, resumed)]
    assert evaluations[0] == evaluations[1] == [2, 4]
    other = make_trainer(tmp_path / "c", rows, eval_dataset={**sets, "far": make_rows(7, seed=3)}, **settings)
    with pytest.raises(ValueError, match="fingerprint of the validation split"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_evaluation_sets_that_cannot_be_are_refused_by_name(tmp_path, rows):
    good = make_rows(6, seed=1)
    streamed = datasets.IterableDataset.from_generator(lambda: iter(good))
    for sets, message in (
        ({}, "empty dict"),
        ({"a": good, "b": streamed}, r"eval_dataset \(b\) is a IterableDataset"),
        ({"a": good, "b": good.remove_columns("captions")}, "The b split has no column captions"),
        (streamed, r"eval_dataset \(validation\) is a IterableDataset"),
        ([good], r"eval_dataset \(validation\) is a list"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, rows, eval_dataset=sets)
    with pytest.raises(ValueError, match="metric_for_best_model='rsum' names none.*say a_rsum or b_rsum"):
        make_trainer(tmp_path, rows, eval_dataset={"a": good, "b": good}, **SEVERAL)
    make_trainer(tmp_path, rows, eval_dataset={"a": good, "b": good})  # evaluated by hand
    with pytest.raises(ValueError, match="A IterableDataset cannot be evaluated on"):
        make_trainer(tmp_path, rows).evaluate(streamed)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_deepspeed_is_refused_with_the_way_to_go(tmp_path, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    given = {"deepspeed": {"zero_optimization": {"stage": 2}}} if how == "argument" else {}
    with pytest.raises(ValueError, match="DeepSpeed does not train this student.*accelerate_configs/fsdp2.yaml"):
        DSMDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)


def test_what_ones_own_loop_needs_is_exported():
    names = "OtherStudents fit_pca RetrievalDataset StreamedRetrievalDataset RetrievalCollator TeacherRows".split()
    assert set(names) <= set(trainers.__all__) and all(hasattr(trainers, name) for name in trainers.__all__)
