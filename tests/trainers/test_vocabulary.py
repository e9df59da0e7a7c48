"""Trimmed tokenizers against the full ones: on training texts the same pieces, on any text nothing unknown or lost."""

import functools
import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, LEARNED, SPECIAL, TRAINING, full
from tiny_towers import bert, make_processor, modernbert, roberta, scatter
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoTokenizer, CanineTokenizer, CLIPTextConfig, PreTrainedTokenizerFast

from trainers.vocabulary import check_trimming, pieces_to_keep, trim_embeddings, trim_tokenizer


SIZES = {"least": 0, "some more": 0.5}  # of the pieces that could be left out, the share that is kept


@functools.cache
def least(kind):
    """The smallest size that is not refused: the number in the message for 1."""
    with pytest.raises(ValueError, match=r"trim_vocabulary=1: .* Give at least \d+") as refused:
        check_trimming(full(kind), 1)
    return int(str(refused.value).partition("at least ")[2].split(",")[0])


@functools.cache
def trimmed(kind, size):
    size = least(kind) + int(SIZES[size] * (len(full(kind)) - least(kind)))
    check_trimming(full(kind), size)
    kept = pieces_to_keep(full(kind), iter(TRAINING), size)
    return trim_tokenizer(full(kind), kept), kept


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_texts_have_the_full_tokenizers_ids_mapped(tmp_path, kind, size):
    small, kept = trimmed(kind, size)
    assert len(small) == len(kept) < len(full(kind)) and kept == sorted(set(kept))
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast and loaded.model_max_length == 77 and loaded.padding_side == "left"
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
    for name in ("pad", "unk", "cls", "sep"):
        assert kept[getattr(loaded, f"{name}_token_id")] == getattr(full(kind), f"{name}_token_id")
    for text in TRAINING:
        expected = full(kind)(text)["input_ids"]
        assert [kept[i] for i in small(text)["input_ids"]] == expected
        assert loaded(text)["input_ids"] == small(text)["input_ids"]
    batch = loaded(TRAINING, padding=True)
    assert [[kept[i] for i in ids] for ids in batch["input_ids"]] == full(kind)(TRAINING, padding=True)["input_ids"]


# Of what the tokenizers learned, of what they did not, and of both within one word.
PARTS = st.text(max_size=6) | st.sampled_from(" ".join(LEARNED).split()) | st.sampled_from([" ", "", "☃", "<cls>"])
TEXTS = st.lists(PARTS, max_size=6).map("".join)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_any_text_nothing_is_unknown_or_lost_that_was_not(kind, size):
    small, kept = trimmed(kind, size)
    whole = full(kind)

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(TEXTS)
    @example("unhappiestest Grünflächentown dogshouse")
    def check(text):
        expected = whole(text, add_special_tokens=False)["input_ids"]
        found = [kept[i] for i in small(text, add_special_tokens=False)["input_ids"]]
        assert found.count(whole.unk_token_id) <= expected.count(whole.unk_token_id)
        assert bool(found) == bool(expected)
        if whole.unk_token_id not in expected and "<cls>" not in text and kind != "BPE of CLIP's form":
            assert "".join(whole.convert_ids_to_tokens(found)).replace("##", "") == "".join(
                whole.convert_ids_to_tokens(expected)
            ).replace("##", "")

    check()


def test_longer_pieces_stay_only_with_what_they_are_merged_from():
    small, kept = trimmed("byte-level BPE", "some more")
    content = json.loads(small.backend_tokenizer.to_str())["model"]
    merged = {one + other for one, other in content["merges"]}
    assert all(piece in merged for piece in content["vocab"] if len(piece) > 1 and piece not in SPECIAL)
    ids = full("byte-level BPE")("photographers")["input_ids"]
    assert set(ids) <= set(kept)


def test_lowest_ids_fill_the_room_and_unused_places_do_not():
    vocab = ["<pad>", "[unused0]", "<unk>", "<cls>", "<sep>", "a", "b", "##a", "##b", "ab", "ba", "aba", "bab"]
    model = models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="<pad>", unk_token="<unk>", cls_token="<cls>", sep_token="<sep>"
    )
    kept = [vocab[i] for i in pieces_to_keep(tokenizer, ["bab"], 10)]
    assert kept == ["<pad>", "<unk>", "<cls>", "<sep>", "a", "b", "##a", "##b", "ab", "bab"]
    assert pieces_to_keep(tokenizer, ["bab"], 99) == [0, *range(2, 13)]
    assert len(pieces_to_keep(tokenizer, ["bab", "aba", "ba"], 8)) == 11  # more than asked for: the texts need them


def test_tokenizers_that_cannot_be_trimmed_are_refused():
    with pytest.raises(ValueError, match="a WordLevel tokenizer knows whole words only"):
        check_trimming(make_processor().tokenizer, 100)
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "a", "ab", "##a"])}
    no_b = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")), unk_token="[UNK]"
    )
    with pytest.raises(ValueError, match="has a piece 'ab' and none that is '##b' alone"):
        check_trimming(no_b, 4)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="CanineTokenizer is a slow tokenizer"):
        check_trimming(CanineTokenizer(), 100)


def test_padding_from_which_positions_are_counted_may_not_move():
    tower = AutoModel.from_config(roberta())  # padding is 1
    trim_embeddings(tower, [0, 1, 3])
    with pytest.raises(ValueError, match="RobertaModel counts positions from padding's id, 1, and a piece before it"):
        trim_embeddings(tower, [1, 2])


@pytest.mark.parametrize(
    "config",
    [bert, roberta, modernbert, lambda: CLIPTextConfig(hidden_size=16, num_hidden_layers=1)],
    ids=["bert", "roberta", "modernbert", "clip"],
)
def test_a_trimmed_tower_embeds_as_the_whole_one(tmp_path, config):
    small, kept = trimmed("unigram", "some more")
    whole = full("unigram")
    fields = {**config().to_dict(), "vocab_size": len(whole), "num_attention_heads": 2, "intermediate_size": 8}
    fields |= {"max_position_embeddings": 80, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0}
    fields["pad_token_id"] = 1 if config is roberta else 0
    tower = scatter(AutoModel.from_config(type(config()).from_dict(fields))).eval()
    inputs = whole(TRAINING, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        expected = tower(**inputs).last_hidden_state
        trim_embeddings(tower, kept)
    tower.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert loaded.config.vocab_size == len(kept) == loaded.get_input_embeddings().num_embeddings
    with torch.no_grad():
        found = loaded.eval()(**small(TRAINING, padding=True, padding_side="right", return_tensors="pt"))
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=0, atol=1e-6)


def test_a_piece_that_the_tower_has_no_embedding_of_is_refused():
    tower = scatter(AutoModel.from_config(bert()))
    with pytest.raises(ValueError, match="has a piece of id 60, and BertModel has embeddings of 60 pieces alone"):
        trim_embeddings(tower, [0, 1, 60])
