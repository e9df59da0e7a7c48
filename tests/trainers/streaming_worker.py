"""Run by torchrun in test_streaming: a stream on two processes, unbroken and resumed."""

import sys
from pathlib import Path

import datasets
from safetensors.torch import save_file
from test_streaming import full_state, make_trainer
from transformers import Trainer

from trainers.run.distributed import run_launched


def main(folder: Path) -> None:
    names = sorted(map(str, (folder / "rows").glob("*.parquet")))
    stream = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "shuffle_buffer_size": 5,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "random_shift": 0.2,
        "ddp_backend": "gloo",
        "dataloader_num_workers": 2,
    }
    batches = {}
    for name, checkpoint in (("unbroken", None), ("resumed", str(folder / "unbroken" / "checkpoint-2"))):
        trainer = make_trainer(folder / name, stream, **settings)
        rank = trainer.args.process_index
        if checkpoint is None:
            begin_step = trainer.begin_step

            def record(step_batches, begin_step=begin_step):
                for batch in step_batches:
                    step = len(batches) // 4
                    batches[f"{step}.groups"] = batch["image_groups"].clone()
                    batches[f"{step}.owner"] = batch["caption_to_image"].clone()
                    batches[f"{step}.image"] = batch["teacher_image"].clone()
                    batches[f"{step}.text"] = batch["teacher_text"].clone()
                begin_step(step_batches)

            trainer.begin_step = record
            loader = Trainer.get_train_dataloader(trainer)
            (folder / "upstream_loader").write_text(type(loader).__name__)
        trainer.train(resume_from_checkpoint=checkpoint)
        save_file(full_state(trainer), folder / f"{name}-{rank}.safetensors")
    save_file(batches, folder / f"batches-{rank}.safetensors")
    trainer.end()


if __name__ == "__main__":
    run_launched(lambda: main(Path(sys.argv[1])))
