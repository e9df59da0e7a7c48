// A text's token ids from a tokenizer.json, the same as those of the Python package `tokenizers`.

import { normalizer, preTokenizer, refuse } from "./tokenizer_text.js";

const UNKNOWN_PENALTY = 10; // of Unigram: an unknown character costs this more than the rarest piece

// The bytes of a text as pieces <0x0A>, or null where the vocabulary lacks one.
function bytePieces(text, vocab) {
  const pieces = Array.from(new TextEncoder().encode(text), (byte) => {
    return vocab.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  });
  return pieces.includes(undefined) ? null : pieces;
}

function wordPiece(settings) {
  const vocab = new Map(Object.entries(settings.vocab));
  const prefix = settings.continuing_subword_prefix;
  const unknown = vocab.get(settings.unk_token);
  return (word) => {
    const characters = Array.from(word);
    if (characters.length > settings.max_input_chars_per_word) return [unknown];
    const ids = [];
    for (let start = 0; start < characters.length; ) {
      let end = characters.length;
      let id;
      for (; end > start; end--) {
        id = vocab.get((start ? prefix : "") + characters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [unknown];
      ids.push(id);
      start = end;
    }
    return ids;
  };
}

function wordLevel(settings) {
  const vocab = new Map(Object.entries(settings.vocab));
  const unknown = vocab.get(settings.unk_token);
  return (word) => {
    const id = vocab.get(word) ?? unknown;
    return id === undefined ? [] : [id];
  };
}

// Merges the pair of lowest rank, of several the leftmost, until there is none.
function mergeAll(ids, merges) {
  for (;;) {
    let best = null;
    let place = -1;
    for (let i = 0; i + 1 < ids.length; i++) {
      const merge = merges.get(`${ids[i]} ${ids[i + 1]}`);
      if (merge && (!best || merge.rank < best.rank)) [best, place] = [merge, i];
    }
    if (!best) return ids;
    ids.splice(place, 2, best.id);
  }
}

function bpe(settings) {
  if (settings.dropout) refuse("BPE with dropout");
  const vocab = new Map(Object.entries(settings.vocab));
  const prefix = settings.continuing_subword_prefix ?? "";
  const suffix = settings.end_of_word_suffix ?? "";
  const unknown = vocab.get(settings.unk_token);
  const merges = new Map();
  settings.merges.forEach((pair, rank) => {
    const [left, right] = typeof pair === "string" ? pair.split(" ") : pair;
    const id = vocab.get(left + right.slice(prefix.length));
    merges.set(`${vocab.get(left)} ${vocab.get(right)}`, { rank, id });
  });
  return (word) => {
    if (settings.ignore_merges && vocab.has(word)) return [vocab.get(word)];
    const ids = [];
    let waits = false; // an unknown character is kept until the next known one, to be fused with its neighbours
    const characters = Array.from(word);
    characters.forEach((character, i) => {
      const piece = (i ? prefix : "") + character + (i === characters.length - 1 ? suffix : "");
      const id = vocab.get(piece);
      if (id !== undefined) {
        if (waits) ids.push(unknown);
        waits = false;
        ids.push(id);
        return;
      }
      const bytes = settings.byte_fallback ? bytePieces(piece, vocab) : null;
      if (bytes) {
        ids.push(...bytes);
      } else if (unknown !== undefined) {
        if (waits && !settings.fuse_unk) ids.push(unknown);
        waits = true;
      }
    });
    if (waits) ids.push(unknown);
    return mergeAll(ids, merges);
  };
}

// The likeliest way to write a text with pieces that have log-probabilities.
function unigram(settings) {
  const vocab = new Map(settings.vocab.map(([piece], id) => [piece, id]));
  const scores = settings.vocab.map(([, score]) => score);
  const unknownScore = scores.reduce((least, score) => Math.min(least, score), Infinity) - UNKNOWN_PENALTY;
  const longest = settings.vocab.reduce((most, [piece]) => Math.max(most, Array.from(piece).length), 0);
  const idOf = (piece) => {
    if (vocab.has(piece)) return [vocab.get(piece)];
    const bytes = settings.byte_fallback ? bytePieces(piece, vocab) : null;
    return bytes ?? (settings.unk_id === null ? [] : [settings.unk_id]);
  };
  return (text) => {
    const characters = Array.from(text);
    const best = [{ score: 0 }];
    for (let start = 0; start < characters.length; start++) {
      const reach = (end, score, known) => {
        if (!best[end] || score > best[end].score) best[end] = { score, start, known };
      };
      let piece = "";
      let single = false;
      for (let end = start + 1; end <= Math.min(start + longest, characters.length); end++) {
        piece += characters[end - 1];
        const id = vocab.get(piece);
        if (id === undefined) continue;
        reach(end, scores[id] + best[start].score, id !== settings.unk_id);
        single ||= end === start + 1;
      }
      if (!single) reach(start + 1, unknownScore + best[start].score, false);
    }
    const pieces = []; // unknown neighbours are one piece
    let fuses = false;
    for (let end = characters.length; end > 0; end = best[end].start) {
      const piece = characters.slice(best[end].start, end).join("");
      if (fuses && !best[end].known) pieces[0] = piece + pieces[0];
      else pieces.unshift(piece);
      fuses = !best[end].known;
    }
    return pieces.flatMap(idOf);
  };
}

const MODELS = { WordPiece: wordPiece, WordLevel: wordLevel, BPE: bpe, Unigram: unigram };

// What stands before and behind the text's ids: [ids before, ids behind].
function template(settings) {
  if (!settings || settings.type === "ByteLevel") return [[], []];
  switch (settings.type) {
    case "Sequence":
      return settings.processors.map(template).reduce(
        ([before, behind], [first, last]) => [[...first, ...before], [...behind, ...last]],
        [[], []],
      );
    case "BertProcessing":
    case "RobertaProcessing":
      return [[settings.cls[1]], [settings.sep[1]]];
    case "TemplateProcessing": {
      const place = settings.single.findIndex((part) => part.Sequence);
      const idsOf = (part) => settings.special_tokens[part.SpecialToken.id].ids;
      return [settings.single.slice(0, place).flatMap(idsOf), settings.single.slice(place + 1).flatMap(idsOf)];
    }
    default:
      return refuse(`the post-processor ${settings.type}`);
  }
}

// A function that cuts a text at added tokens, such as [CLS], that stand in it: -> [{text}, or {id}].
function cutter(tokens) {
  const sorted = [...tokens].sort((a, b) => b.content.length - a.content.length);
  const isWord = (character) => character !== undefined && /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u.test(character);
  return (text) => {
    const parts = [];
    let start = 0;
    for (let at = 0; at < text.length; ) {
      const token = sorted.find(({ content }) => content && text.startsWith(content, at));
      const alone =
        token && !(token.single_word && (isWord(Array.from(text.slice(0, at)).at(-1)) || isWord(Array.from(text.slice(at + token.content.length))[0])));
      if (!alone) {
        at += token ? token.content.length : 1;
        continue;
      }
      let before = text.slice(start, at);
      if (token.lstrip) before = before.replace(/\p{White_Space}+$/u, "");
      if (before) parts.push({ text: before, first: start === 0 });
      parts.push({ id: token.id });
      at += token.content.length;
      if (token.rstrip) at += /^\p{White_Space}*/u.exec(text.slice(at))[0].length;
      start = at;
    }
    if (start < text.length) parts.push({ text: text.slice(start), first: start === 0 });
    return parts;
  };
}

// A tokenizer.json (parsed) as a function text -> {ids, cut: whether the text was longer than the student reads}.
export function makeTokenizer(settings) {
  if (!MODELS[settings.model.type]) refuse(`the model ${settings.model.type}`);
  const encode = MODELS[settings.model.type](settings.model);
  const normalize = normalizer(settings.normalizer);
  const preTokenize = preTokenizer(settings.pre_tokenizer);
  const [before, behind] = template(settings.post_processor);
  const added = settings.added_tokens ?? [];
  const cutAtRaw = cutter(added.filter((token) => !token.normalized));
  const cutAtNormalized = cutter(
    added.filter((token) => token.normalized).map((token) => ({ ...token, content: normalize(token.content) })),
  );
  const room = settings.truncation ? settings.truncation.max_length - before.length - behind.length : Infinity;
  if (settings.truncation && settings.truncation.direction !== "Right") refuse("truncation at the start");
  return (text) => {
    const ids = [];
    for (const raw of cutAtRaw(text.toWellFormed ? text.toWellFormed() : text)) {
      if (raw.id !== undefined) {
        ids.push(raw.id);
        continue;
      }
      for (const part of cutAtNormalized(normalize(raw.text))) {
        if (part.id !== undefined) ids.push(part.id);
        else ids.push(...preTokenize(part.text, raw.first && part.first).filter(Boolean).flatMap(encode));
      }
    }
    return { ids: [...before, ...ids.slice(0, room), ...behind], cut: ids.length > room };
  };
}
