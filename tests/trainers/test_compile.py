"""torch.compile, as Trainer offers it: batches of ragged captions do not make new graphs for ever."""

import torch
from conftest import make_rows, make_student
from tiny_trainer import largest_difference, make_trainer
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from trainers.batches import RetrievalCollator, RetrievalDataset


def test_ragged_batches_share_a_few_graphs():
    torch._dynamo.reset()
    counters.clear()
    model, processor = make_student()
    data, collate = RetrievalDataset(make_rows(192), with_teacher=False), RetrievalCollator(processor, 32)
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs)
    shapes, seen = set(), []
    for start in range(0, 192, 16):
        batch = collate(data.__getitems__(list(range(start, start + 16))))
        shapes.add((batch["input_ids"].shape, *batch["text_buckets"]))
        inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "text_buckets")}
        output = compiled(**inputs)
        torch.testing.assert_close(output.text_embeds, model(**inputs).text_embeds, rtol=1e-5, atol=1e-6)
        seen.append(graphs.frame_count)
    assert len(shapes) == 12  # no batch is like another
    assert not counters["graph_break"]
    assert seen[-1] <= 5, seen  # of eight that torch allows


def test_a_compiled_run_trains_saves_and_resumes_as_any(tmp_path):
    rows, settings = make_rows(64), {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    compiled = {**settings, "torch_compile": True, "torch_compile_backend": "eager"}
    eager = make_trainer(tmp_path / "eager", rows, eval_dataset=make_rows(10, seed=1), **settings)
    eager.train()
    unbroken = make_trainer(tmp_path / "compiled", rows, eval_dataset=make_rows(10, seed=1), **compiled)
    unbroken.train()
    assert largest_difference(eager.model.state_dict(), unbroken.model.state_dict()) < 1e-5
    assert unbroken.evaluate()["eval_rsum"] == eager.evaluate()["eval_rsum"]
    resumed = make_trainer(tmp_path / "resumed", rows, eval_dataset=make_rows(10, seed=1), **compiled)
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-2"))
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0
