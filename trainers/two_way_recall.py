"""Two-way recall as a metric of the package `evaluate`: `evaluate.load("trainers/two_way_recall.py")`.

It stands beside `metrics.py`, which does the work: `evaluate` copies the two together, so the metric also loads where
this package is not installed.
"""

import datasets
import evaluate
import numpy as np
import torch

from .metrics import retrieval_metrics


DESCRIPTION = """
Recall at 1, 5 and 10 and median rank of image-to-text and text-to-image retrieval by cosine, over all that was added.
The rank of a query is 1 + the number of wrong items that score at least as much as its best right one, so a model that
maps everything to one point gets 0.
"""

INPUTS = """
Args:
    predictions: embeddings of N images, `[N, D]`; they need not be normalised.
    references: for each image the embeddings of its captions, one or more, `[N][captions, D]`.
    groups: given to `compute`: N integers or strings, in the order in which the images were added; images of one group
        share their captions as right answers. Default: each image is a group of its own.
    text_ids: given to `compute`: the captions, or integers or strings that are equal where captions are, one for each
        embedding in references; equal captions are right answers for the same images. Default: none are equal.
Returns:
    image_to_text_r1, image_to_text_r5, image_to_text_r10, text_to_image_r1, text_to_image_r5, text_to_image_r10:
        percent of the queries that have a right answer among the first 1, 5, 10.
    rsum: their sum, 600 at most.
    image_to_text_median_rank, text_to_image_median_rank: 1 at best.
Examples:
    >>> metric = evaluate.load("trainers/two_way_recall.py")
    >>> metric.add_batch(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[[[0.9, 0.1], [0.2, 0.8]], [[0.0, 1.0]]])
    >>> round(metric.compute()["text_to_image_r1"], 1)
    66.7
"""

CITATION = """
@inproceedings{karpathy2015deep,
    title = {Deep Visual-Semantic Alignments for Generating Image Descriptions},
    author = {Karpathy, Andrej and Fei-Fei, Li},
    booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
    year = {2015}
}
"""


class TwoWayRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        embedding = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": embedding, "references": datasets.List(embedding)}),
        )

    def _compute(self, predictions, references, groups=None, text_ids=None) -> dict[str, float]:
        groups = range(len(predictions)) if groups is None else groups
        return retrieval_metrics(
            torch.from_numpy(np.array(list(predictions))),
            torch.from_numpy(np.array([caption for captions in references for caption in captions])),
            list(groups),
            [group for group, captions in zip(groups, references) for _ in captions],
            text_ids=text_ids,
        )
