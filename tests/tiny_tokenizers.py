"""Small tokenizers of each kind that there is, trained on a few sentences; shared by tests."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


LEARNED = [  # what the full tokenizers know
    "a small red house beside an unusually large oak tree", "the unhappiest smallest houses of the largest town",
    "two dogs running along the sandy beach at sunset", "Ein großes Gebäude mit öffentlichen Grünflächen",
    "le château où naquit l'empereur à l'été", "猫が大きな木の下で眠っている", "красный дом у большого дерева",
    "photographs of photographers photographing", "running runners ran the longest run", "1984 numbers 42 and 2001!",
]  # fmt: skip
TRAINING = ["a red house", "Runners at the largest tree", "photographers photographing ☃ dogs", "", "猫 1984!"]
SPECIAL = ["<pad>", "<unk>", "<cls>", "<sep>"]


def around(tokenizer):
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<cls>", "<sep>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ids)
    return tokenizer


def wordpiece(trainer=trainers.WordPieceTrainer):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=30))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(LEARNED, trainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False))
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = {"type": "BertProcessing", "cls": ["<cls>", 2], "sep": ["<sep>", 3]}
    return Tokenizer.from_str(json.dumps(content))


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL[1:], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LEARNED, trainer)
    tokenizer.add_special_tokens(["<pad>"])  # an id after those of all pieces
    tokenizer.add_tokens([AddedToken("☃", normalized=False)])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<cls>", "<sep>")]
    template = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ids)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def clips_bpe():  # pieces that end a word are marked, and a character that no text had is unknown
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(LEARNED, trainer)
    return around(tokenizer)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, shrinking_factor=0.9
    )
    tokenizer.train_from_iterator(LEARNED * 3, trainer)
    return around(tokenizer)


def with_bytes(kind):
    """A tokenizer in which a character that is no piece becomes bytes."""
    content = json.loads(kind().to_str())
    model = content["model"]
    model["byte_fallback"] = True
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    if model["type"] == "Unigram":
        model["vocab"] += [[piece, -20.0] for piece in pieces]
    else:
        model["vocab"] |= {piece: len(model["vocab"]) + i for i, piece in enumerate(pieces)}
    return Tokenizer.from_str(json.dumps(content))


def whole_words_first():  # as Llama 3: a word that is a piece is not merged
    content = json.loads(byte_level_bpe().to_str())
    content["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(content))


KINDS = {
    "wordpiece": wordpiece,
    "byte-level BPE": byte_level_bpe,
    "BPE of CLIP's form": clips_bpe,
    "BPE, whole words first": whole_words_first,
    "BPE with bytes": lambda: with_bytes(clips_bpe),
    "unigram": unigram,
    "unigram with bytes": lambda: with_bytes(unigram),
}


@functools.cache
def full(kind):
    pad, unk, cls, sep = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep,
        model_max_length=77, padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
