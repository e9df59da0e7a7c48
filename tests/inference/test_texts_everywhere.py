"""One length for texts in every program, and the same embedding of the odd ones: nothing, blanks, what is not seen."""

import json
import warnings

import pytest
import torch
from conftest import WORDS, make_student
from sentence_transformers import SentenceTransformer
from tiny_towers import scatter
from tokenizers import Tokenizer
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline
from transformers.utils import logging

from inference import export, search
from trainers import ContrastiveTrainer, RetrievalTrainingArguments
from trainers.batches import RetrievalCollator


LENGTH = 12  # tokens, of the text tower's 512
TEXTS = {
    "short": "arrow left",
    "as long": " ".join(WORDS[:10]),
    "200 words": " ".join(WORDS * 10),
    "nothing": "",
    "blanks": "   ",
    "lines": "\n\t\n",
    "zero width": "\u200b\u200d\ufeff",
    "zero width within": "arrow\u200b left",
    "500 words": "house " * 500,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, rows, validation_rows):
    """A student saved by a trainer whose longest caption is far below the text tower's positions."""
    model, processor = make_student()
    folder = tmp_path_factory.mktemp("run")
    args = RetrievalTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, max_caption_length=LENGTH, max_steps=1
    )
    trainer = ContrastiveTrainer(
        model=scatter(model), args=args, train_dataset=rows, eval_dataset=validation_rows, processing_class=processor
    )
    trainer.evaluate()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def expected(saved):
    """The embeddings by training's own collator and the model."""
    collator = RetrievalCollator(AutoProcessor.from_pretrained(saved), LENGTH)
    model = AutoModel.from_pretrained(saved).eval()
    embeds = {}
    for name, text in TEXTS.items():
        tokens = collator.processor.tokenizer([text], truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            embeds[name] = model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds[0]
    assert all(embed.isfinite().all() and embed.norm() == pytest.approx(1, abs=1e-5) for embed in embeds.values())
    return embeds


def test_the_saved_files_name_one_length(saved, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.model_max_length == LENGTH
    assert json.loads((saved / "tokenizer.json").read_text())["truncation"]["max_length"] == LENGTH
    export.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).truncation["max_length"] == LENGTH
    assert SentenceTransformer(str(saved), device="cpu").max_seq_length == LENGTH


def test_every_program_gives_the_embedding_of_training(saved, expected, tmp_path):
    processor, model = AutoProcessor.from_pretrained(saved), AutoModel.from_pretrained(saved).eval()
    export.save_tokenizer(processor.tokenizer, tmp_path / "tokenizer.json")
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    extract = pipeline("feature-extraction", model=str(saved), truncation=True)
    encoder = SentenceTransformer(str(saved), device="cpu")

    def by_model(input_ids, attention_mask):
        with torch.no_grad():
            return model(torch.as_tensor(input_ids), attention_mask=torch.as_tensor(attention_mask)).text_embeds[0]

    def by_tokenizers(text):
        tokens = alone.encode(text)
        return by_model([tokens.ids], [tokens.attention_mask])

    programs = {
        "processor": lambda text: by_model(**processor(text=[text], padding=True, return_tensors="pt")),
        "tokenizers, as onnx_search.py": by_tokenizers,
        "feature-extraction": lambda text: extract(text, return_tensors=True)[0],
        "SentenceTransformer": lambda text: encoder.encode(text, normalize_embeddings=True, convert_to_tensor=True),
    }
    for program, embed in programs.items():
        for name, text in TEXTS.items():
            torch.testing.assert_close(
                embed(text), expected[name], rtol=0, atol=1e-5, msg=lambda text, at=(program, name): f"{at}: {text}"
            )


def test_a_processor_of_the_readme_does_not_warn(saved, caplog, monkeypatch):
    logger = logging.get_logger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    processor = AutoProcessor.from_pretrained(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = processor(text=[TEXTS["200 words"], "cat"], padding=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (2, LENGTH) and not caplog.records


def test_what_is_cut_is_counted(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    count = len(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).encode("cat").ids)
    assert count < LENGTH and search.cut_of(tokenizer, "cat") is None
    whole = len(tokenizer(TEXTS["200 words"], verbose=False)["input_ids"])
    assert whole > 200
    assert search.cut_of(tokenizer, TEXTS["200 words"]) == (
        f"The text has {whole} tokens, of which the student reads the first {LENGTH}."
    )


def test_an_evaluation_cuts_where_the_student_was_trained_to(saved, validation_rows, tmp_path):
    settings = {"report_to": "none", "use_cpu": True, "output_dir": str(tmp_path)}
    model, processor = AutoModel.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    given = {"model": model, "processing_class": processor}
    trainer = ContrastiveTrainer(args=RetrievalTrainingArguments(**settings), eval_dataset=validation_rows, **given)
    assert trainer.args.max_caption_length == LENGTH
    assert trainer.data_collator.max_length == LENGTH
    # Trained on, it may read more.
    longer = RetrievalTrainingArguments(**settings, max_caption_length=40)
    ContrastiveTrainer(args=longer, train_dataset=validation_rows, **given)
    assert processor.tokenizer.model_max_length == 40
