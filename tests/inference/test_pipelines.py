"""A pushed student in the pipelines of transformers and in sentence-transformers, where our package is not."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_student
from PIL import Image
from safetensors.torch import load_file
from tiny_towers import scatter
from transformers import pipeline


REPO = "user/student"
LABELS = ["red house", "dog", "small blue moon left"]

# What a user has: the repository, transformers, sentence-transformers.
ELSEWHERE = """
import sys

for name in ("modeling_dsmd", "trainers"):
    sys.modules[name] = None  # importing it fails
import glob, json
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from transformers import pipeline

repo, labels = "user/student", json.loads(sys.argv[1])
paths = sorted(glob.glob("*.png"))
images = [Image.open(path) for path in paths]
tensors, scores = {}, {}

classifier = pipeline("zero-shot-image-classification", model=repo, trust_remote_code=True)
assert type(classifier.model).__module__.startswith("transformers_modules."), type(classifier.model)
scores["zero-shot"] = [
    {entry["label"]: entry["score"] for entry in answer}
    for answer in classifier(images, candidate_labels=labels, hypothesis_template="a {}")
]
extract = pipeline("image-feature-extraction", model=repo, trust_remote_code=True)
tensors["images"] = torch.cat(extract(images, return_tensors=True))
tensors["images of files, two at a time"] = torch.tensor(extract(paths, batch_size=2)).squeeze(1)
extract = pipeline("feature-extraction", model=repo, trust_remote_code=True)
tensors["texts"] = torch.cat(extract(labels, return_tensors=True))
tensors["texts, two at a time"] = torch.tensor(extract(labels, batch_size=2)).squeeze(1)

model = SentenceTransformer(repo, trust_remote_code=True, device="cpu")
ours = {"images": model.encode(images, convert_to_tensor=True), "texts": model.encode(labels, convert_to_tensor=True)}
tensors |= {f"encoded {name}": value for name, value in ours.items()}
tensors["similarity"] = model.similarity(ours["texts"], ours["images"])
tensors["texts, normalised again"] = model.encode(labels, normalize_embeddings=True, convert_to_tensor=True)
long = model.encode("house " * 600, convert_to_tensor=True)  # more tokens than the tower has positions
tensors["long"] = long[None]
evaluator = InformationRetrievalEvaluator(
    queries={label: label for label in labels},
    corpus=dict(zip(paths, images)),
    relevant_docs={label: {path} for label, path in zip(labels, paths)},
    accuracy_at_k=[1, 2, 3, 4, 5], mrr_at_k=[5], ndcg_at_k=[5], map_at_k=[5], precision_recall_at_k=[1],
)
scores["evaluator"] = evaluator(model)
save_file({name: value.contiguous() for name, value in tensors.items()}, "out.safetensors")
print(json.dumps(scores))
"""


@pytest.fixture(scope="module")
def student():
    model, processor = make_student()
    return scatter(model).eval(), processor


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)) for i in range(5)]


def test_a_pushed_student_in_pipelines_and_sentence_transformers(hub, student, images, tmp_path):
    model, processor = student
    processor.push_to_hub(REPO)
    model.push_to_hub(REPO)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(LABELS)],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    actual, scores = load_file(tmp_path / "out.safetensors"), json.loads(result.stdout.splitlines()[-1])

    def inputs(texts, **settings):
        return processor(text=texts, images=images, return_tensors="pt", padding=True, **settings)

    with torch.no_grad():
        output = model(**inputs(LABELS))
        probabilities = model(**inputs([f"a {label}" for label in LABELS])).logits_per_image.softmax(1)
        raw_texts = output.text_model_output.pooler_output
        long = model(**inputs(["house " * 600], truncation=True)).text_embeds
    expected = {
        "images": output.image_embeds,
        "images of files, two at a time": output.image_embeds,
        "texts": output.text_embeds,
        "texts, two at a time": output.text_embeds,
        "encoded images": output.image_embeds,
        "encoded texts": output.text_embeds,
        "similarity": output.text_embeds @ output.image_embeds.T,
        "texts, normalised again": output.text_embeds,
        "long": long,
    }
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert (raw_texts.norm(dim=1) - 1).abs().min() > 0.01  # else encode() need not normalise
    for answer, row in zip(scores["zero-shot"], probabilities.tolist()):
        assert answer == pytest.approx(dict(zip(LABELS, row)), abs=1e-5)
    similarity = output.text_embeds @ output.image_embeds.T
    ranks = [int((row >= row[i]).sum()) for i, row in enumerate(similarity)]
    for k in range(1, 6):
        hits = sum(rank <= k for rank in ranks) / len(LABELS)
        assert scores["evaluator"][f"cosine_accuracy@{k}"] == pytest.approx(hits)
    assert len(set(ranks)) > 1  # some are answered later than others


def test_with_the_package_imported_a_folder_needs_no_trust(student, images, tmp_path):
    model, processor = student
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classifier = pipeline("zero-shot-image-classification", model=str(tmp_path))
    assert type(classifier.model) is type(model)
    answer = classifier(images[0], candidate_labels=LABELS, hypothesis_template="{}")
    inputs = processor(text=LABELS, images=images[:1], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = dict(zip(LABELS, model(**inputs).logits_per_image.softmax(1)[0].tolist()))
    assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(expected, abs=1e-6)
    assert [entry["label"] for entry in answer] == sorted(LABELS, key=expected.get, reverse=True)
