"""Fills the student's card from the run: nothing in it that was not measured or set."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from string import Template

import accelerate
import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData


CITATION = """
## Citation

```bibtex
@article{liang2024dsmd,
  title   = {Dynamic Self-adaptive Multiscale Distillation from Pre-trained Multimodal Large Model for Efficient Cross-modal Representation Learning},
  author  = {Liang, Zhengyang and Liang, Meiyu and Huang, Wei and Li, Yawen and Xue, Zhe},
  journal = {arXiv preprint arXiv:2404.10838},
  year    = {2024}
}
```
"""  # noqa: E501


def write_model_card(
    folder: Path,
    metrics: dict[str, float],
    results_table: str,
    dataset_name: str,
    method: str,
    towers: list[str],
    teacher: dict | None,
    license: str | None,
    images: int | None,
    captions: int | None,
    settings: dict[str, object],
    projection_dim: int,
) -> None:
    """Writes `README.md` into the student's folder.

    Args:
        folder: the run's folder.
        metrics: as in `all_results.json`.
        results_table: the run's table, Markdown.
        dataset_name: trained on; a folder's own name where it is local.
        method: "distillation" or "contrastive".
        towers: Hub ids the towers started from; empty from scratch.
        teacher: the teacher's description from the dataset, where there was one.
        license: of the data.
        images, captions: how many were trained on; None where they were streamed.
        settings: training settings that differ from their defaults.
        projection_dim: width of the embeddings.
    """
    name = folder.resolve().name
    is_hub_dataset = "/" in dataset_name
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["image-text-retrieval", "dual-encoder", "custom_code", *(["distillation"] if teacher else [])],
        datasets=[dataset_name] if is_hub_dataset else None,
        base_model=towers or None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-text-retrieval",
                dataset_type=dataset_name,
                dataset_name=dataset_name,
                dataset_split="test",
                metric_type=key.removeprefix("test_"),
                metric_name=key.removeprefix("test_").replace("_", " "),
                metric_value=round(value, 3),
            )
            for key, value in metrics.items()
            if key.startswith("test_") and (key.endswith(("_r1", "_r5", "_r10")) or key == "test_rsum")
        ],
    )
    amount = "a stream" if images is None else f"{images:,} images and {captions:,} captions"
    training = f"{amount} of `{dataset_name}` (licence of the data: {license or 'not stated'})"
    if teacher is not None:
        training = (
            f"Learned the stored output features of a teacher on {training}.\n\nThe teacher: {_sentence(teacher)}"
        )
    else:
        training = f"Trained contrastively, without a teacher, on {training}."
    how_made = f", distilled from `{teacher['id']}`" if teacher else ", trained without a teacher"
    text = Template(Path(__file__).with_name("template.md").read_text()).substitute(
        front_matter=data.to_yaml(),
        title=name,
        parameters=f"{metrics['parameters'] / 1e6:.1f} M",
        how_made=how_made,
        dim=projection_dim,
        machine=f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        results_table=results_table,
        repo=name,
        training=training,
        settings="\n".join(f"- `{key}`: {value}" for key, value in sorted(settings.items())),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__} (5 or later is needed), datasets {datasets.__version__}, accelerate "
        f"{accelerate.__version__}",
        citation=CITATION if method == "distillation" else "",
    )
    beside = folder / "README.md.part"
    beside.write_text(text)
    beside.replace(folder / "README.md")


def _sentence(teacher: dict) -> str:
    return ", ".join(
        f"{key} {json.dumps(value) if isinstance(value, dict) else value}" for key, value in teacher.items()
    )
