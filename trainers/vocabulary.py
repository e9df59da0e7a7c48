"""A pre-trained text tower with fewer word pieces: those of the training texts, and what spells any other text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import islice

import torch
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rows.texts import cut


BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a piece that stands for a byte, where a character is no piece
UNUSED = re.compile(r"\[unused\d+\]")  # BERT's places for pieces to come, which no text is split into


def check_trimming(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Refuses a tokenizer that cannot be trimmed, or not to so few pieces. Needs no texts.

    Raises:
        ValueError: it is a slow one, or of a kind that cannot spell a text whose words it lacks; or `size` is less
            than the number of its special pieces and single characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"trim_vocabulary={size}: {type(tokenizer).__name__} is a slow tokenizer, and only fast ones (with a "
            "tokenizer.json) can be trimmed. Leave trim_vocabulary out, or take another text tower."
        )
    least = len(_always_kept(_parts(tokenizer)))
    if size < least:
        raise ValueError(
            f"trim_vocabulary={size}: the tokenizer has {least:,} special pieces, single characters and others that "
            f"any text may need. Give at least {least}, or leave trim_vocabulary out."
        )


def pieces_to_keep(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> list[int]:
    """The ids of the pieces that a trimmed tokenizer keeps, ascending.

    They are the pieces of the texts, of which there may be more than `size`; the special pieces and single characters;
    for BPE what each kept piece is merged from; and as many of the lowest ids as `size` leaves room for, since
    vocabularies begin with their frequent pieces.

    Args:
        texts: of the training split; each is read up to the longest caption.
    """
    parts = _parts(tokenizer)
    kept, backend = _always_kept(parts), _backend(tokenizer)
    texts, progress = iter(texts), tqdm(desc="Pieces of the training texts", unit=" texts", leave=False)
    while batch := list(map(cut, islice(texts, 10_000))):
        for encoding in backend.encode_batch_fast(batch):
            kept.update(encoding.ids)
        progress.update(len(batch))
    progress.close()
    origins = _origins(parts)
    _close(kept, origins)
    for piece, i in sorted(_ids(parts).items(), key=lambda item: item[1]):
        if not UNUSED.fullmatch(piece) and i not in kept:
            needed = _close({i}, origins) - kept
            if len(kept) + len(needed) <= size:
                kept |= needed
    return sorted(kept)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> PreTrainedTokenizerFast:
    """A tokenizer of the kept pieces alone; the new id of a piece is its place in `kept`.

    Whatever the old one splits into kept pieces, this one does too. Any other text it splits into smaller ones.
    """
    parts = _parts(tokenizer)
    new = {old: i for i, old in enumerate(kept)}
    model = parts["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    else:
        vocab = model["vocab"]
        model["vocab"] = {piece: new[old] for piece, old in vocab.items() if old in new}
        if model["type"] == "BPE":
            model["merges"] = [
                pair for pair, product in _merges(model) if all(piece in model["vocab"] for piece in (*pair, product))
            ]
    for token in parts["added_tokens"]:
        token["id"] = new[token["id"]]
    if parts["padding"] is not None:
        parts["padding"]["pad_id"] = new[parts["padding"]["pad_id"]]
    _renumber(parts["post_processor"], new)
    names = ("model_max_length", "model_input_names", "padding_side", "truncation_side")
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        **{name: getattr(tokenizer, name) for name in names},
        **tokenizer.special_tokens_map,
    )
    if trimmed.convert_ids_to_tokens(range(len(trimmed))) != tokenizer.convert_ids_to_tokens(kept):
        raise ValueError(f"{type(tokenizer).__name__} cannot be trimmed: its added pieces do not keep their order.")
    return trimmed


@torch.no_grad()
def trim_embeddings(tower: PreTrainedModel, kept: list[int]) -> None:
    """Leaves a text tower the embeddings of the kept pieces, and gives its configuration their new ids.

    Raises:
        ValueError: the tower counts positions from the id of padding, which is now another, or has no embedding of a
            kept piece.
    """
    embedding, config = tower.get_input_embeddings(), tower.config
    if kept and kept[-1] >= len(embedding.weight):
        raise ValueError(
            f"The tokenizer has a piece of id {kept[-1]}, and {type(tower).__name__} has embeddings of "
            f"{len(embedding.weight)} pieces alone: leave trim_vocabulary out, or take the tower's own tokenizer."
        )
    new = {old: i for i, old in enumerate(kept)}
    for name, module in tower.named_modules():
        start = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if start is not None and new.get(start) != start:
            raise ValueError(
                f"{type(tower).__name__} counts positions from padding's id, {start}, and a piece before it is "
                "not kept: leave trim_vocabulary out, or take another text tower."
            )
    embedding.weight = torch.nn.Parameter(embedding.weight[kept].clone(), embedding.weight.requires_grad)  # [V, W]
    embedding.num_embeddings = config.vocab_size = len(kept)
    embedding.padding_idx = new.get(embedding.padding_idx)
    for name, old in config.to_dict().items():
        if name.endswith("_token_id") and old is not None:
            ids = [new.get(i) for i in (old if isinstance(old, list) else [old])]
            setattr(config, name, None if None in ids else ids if isinstance(old, list) else ids[0])


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's own, which neither pads nor cuts."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The content of its tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _ids(parts: dict) -> dict[str, int]:
    """The id of each piece that texts are split into, the added ones left out."""
    vocab = parts["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _always_kept(parts: dict) -> set[int]:
    """The ids of added and special pieces, of single characters and bytes, and of what else any text may need.

    Raises:
        ValueError: a kind of tokenizer that cannot do without some of its longer pieces.
    """
    model, ids = parts["model"], _ids(parts)
    kind = model["type"]
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise ValueError(
            f"a {kind} tokenizer knows whole words only, so it cannot be trimmed: leave trim_vocabulary out."
        )
    kept = {token["id"] for token in parts["added_tokens"]}
    kept |= {model["unk_id"] if kind == "Unigram" else ids.get(model["unk_token"])} - {None}
    for piece, i in ids.items():
        if i in kept or UNUSED.fullmatch(piece):
            continue
        symbols = _symbols(piece, model)
        lacking = [symbol for symbol in symbols if symbol not in ids]
        if len(symbols) == 1 or BYTE.fullmatch(piece):
            kept.add(i)
        elif lacking and kind == "BPE":  # which merges symbols: such a piece comes only whole
            kept.add(i)
        elif lacking:
            raise ValueError(
                f"the tokenizer has a piece {piece!r} and none that is {lacking[0]!r} alone, so without the longer "
                "one texts would become unknown: leave trim_vocabulary out, or take another text tower."
            )
    if kind == "Unigram":  # the score of an unknown character is reckoned from the lowest one
        kept.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
    return kept


def _symbols(piece: str, model: dict) -> list[str]:
    """The pieces of one character each that spell a piece, with the marks of their places in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    within = len(piece) > len(prefix) and piece.startswith(prefix)
    bare = piece.removeprefix(prefix) if within else piece
    ends = bool(suffix) and len(bare) > len(suffix) and bare.endswith(suffix)
    bare = bare.removesuffix(suffix) if ends else bare
    return [
        (prefix if within or k else "") + char + (suffix if ends and k == len(bare) - 1 else "")
        for k, char in enumerate(bare)
    ]


def _merges(model: dict) -> list[tuple[list[str], str]]:
    """Each merge of a BPE tokenizer: the pair, and what it becomes."""
    prefix = model.get("continuing_subword_prefix") or ""
    return [([one, other], one + other.removeprefix(prefix)) for one, other in model["merges"]]


def _origins(parts: dict) -> dict[int, set[int]]:
    """Of each piece that BPE merges, all that it may be merged from; empty for other kinds."""
    if parts["model"]["type"] != "BPE":
        return {}
    ids, origins = parts["model"]["vocab"], {}
    for pair, product in _merges(parts["model"]):
        origins.setdefault(ids[product], set()).update(ids[piece] for piece in pair)
    return origins


def _close(kept: set[int], origins: dict[int, set[int]]) -> set[int]:
    """Adds to the kept pieces all that they are merged from, over any number of merges."""
    todo = list(kept)
    while todo:
        new = origins.get(todo.pop(), set()) - kept
        kept |= new
        todo += new
    return kept


def _renumber(post_processor: dict | None, new: dict[int, int]) -> None:
    """Gives the special tokens that a tokenizer puts around a text their new ids."""
    of = post_processor or {}
    for inner in of.get("processors", ()):
        _renumber(inner, new)
    for token in of.get("special_tokens", {}).values():  # of a template
        token["ids"] = [new[i] for i in token["ids"]]
    for name in ("cls", "sep"):  # of BERT's and RoBERTa's
        if name in of:
            of[name][1] = new[of[name][1]]
