// What a tokenizer.json does to a text before its model: normalizers and pre-tokenizers, as the package `tokenizers`
// does them. A kind that is not here is refused by name, so that no text is read in another way than in training.

const SPACE = /\p{White_Space}/u;
const PUNCTUATION = /[\p{P}$+<=>^`|~]/u; // Unicode's, and ASCII's that Unicode calls symbols
const WORDS = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\p{White_Space}]+/gu;
const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const CJK = [
  [0x4e00, 0x9fff], [0x3400, 0x4dbf], [0x20000, 0x2a6df], [0x2a700, 0x2b73f], [0x2b740, 0x2b81f], [0x2b920, 0x2ceaf],
  [0xf900, 0xfaff], [0x2f800, 0x2fa1f],
];

export function refuse(what) {
  throw new Error(`This page cannot run the student's tokenizer: it has ${what}.`);
}

// Character by character: "Σ" at a word's end becomes "σ" and not "ς", as in training.
const lower = (text) => Array.from(text, (character) => character.toLowerCase()).join("");

function escapeRegex(text) {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

// A tokenizer.json's pattern, {String} or {Regex}, as a regular expression that finds all.
function pattern(settings) {
  if (settings.String !== undefined) return new RegExp(escapeRegex(settings.String), "gu");
  const source = settings.Regex.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
  try {
    return new RegExp(source, "gu");
  } catch {
    return refuse(`the pattern ${settings.Regex}`);
  }
}

function isCjk(character) {
  const code = character.codePointAt(0);
  return CJK.some(([first, last]) => first <= code && code <= last);
}

function bertNormalizer(settings) {
  const stripAccents = settings.strip_accents ?? settings.lowercase;
  return (text) => {
    if (settings.clean_text) {
      text = Array.from(text, (character) => {
        if ("\t\n\r".includes(character)) return " ";
        if (character === "\ufffd" || /[\p{Cc}\p{Cf}\p{Co}]/u.test(character)) return "";
        return SPACE.test(character) ? " " : character;
      }).join("");
    }
    if (settings.handle_chinese_chars) {
      text = Array.from(text, (character) => (isCjk(character) ? ` ${character} ` : character)).join("");
    }
    if (stripAccents) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
    return settings.lowercase ? lower(text) : text;
  };
}

// A function text -> text.
export function normalizer(settings) {
  if (!settings) return (text) => text;
  switch (settings.type) {
    case "Sequence": {
      const steps = settings.normalizers.map(normalizer);
      return (text) => steps.reduce((done, step) => step(done), text);
    }
    case "BertNormalizer":
      return bertNormalizer(settings);
    case "NFC":
    case "NFD":
    case "NFKC":
    case "NFKD":
      return (text) => text.normalize(settings.type);
    case "Lowercase":
      return lower;
    case "StripAccents":
      return (text) => text.replace(/\p{Mn}/gu, "");
    case "Strip":
      return (text) => {
        if (settings.strip_left) text = text.replace(/^\p{White_Space}+/u, "");
        return settings.strip_right ? text.replace(/\p{White_Space}+$/u, "") : text;
      };
    case "Prepend":
      return (text) => (text ? settings.prepend + text : text);
    case "Replace": {
      const found = pattern(settings.pattern);
      return (text) => text.replace(found, () => settings.content);
    }
    default:
      return refuse(`the normalizer ${settings.type}`);
  }
}

// Splits a text at what a pattern matches. Behaviours are those of `tokenizers`; `invert` swaps matches and the rest.
function split(text, found, behavior, invert) {
  const parts = []; // [text, whether it is a separator]
  let end = 0;
  for (const match of text.matchAll(found)) {
    if (!match[0]) continue;
    if (match.index > end) parts.push([text.slice(end, match.index), invert]);
    parts.push([match[0], !invert]);
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push([text.slice(end), invert]);
  const pieces = [];
  switch (behavior) {
    case "Removed":
      return parts.filter(([, separates]) => !separates).map(([part]) => part);
    case "Isolated":
      return parts.map(([part]) => part);
    case "Contiguous":
      parts.forEach(([part, separates], i) => {
        if (i && parts[i - 1][1] === separates) pieces[pieces.length - 1] += part;
        else pieces.push(part);
      });
      return pieces;
    case "MergedWithPrevious":
      parts.forEach(([part, separates], i) => {
        if (i && separates && !parts[i - 1][1]) pieces[pieces.length - 1] += part;
        else pieces.push(part);
      });
      return pieces;
    case "MergedWithNext":
      for (let i = parts.length - 1; i >= 0; i--) {
        if (parts[i][1] && i + 1 < parts.length && !parts[i + 1][1]) pieces[0] = parts[i][0] + pieces[0];
        else pieces.unshift(parts[i][0]);
      }
      return pieces;
    default:
      return refuse(`the split ${behavior}`);
  }
}

// GPT-2's printable character for each byte.
const BYTES = (() => {
  const bytes = new Array(256);
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    bytes[byte] = String.fromCharCode(printable ? byte : next++);
  }
  return bytes;
})();

const byteLetters = (text) => Array.from(new TextEncoder().encode(text), (byte) => BYTES[byte]).join("");

// A function (text, whether it is the first piece) -> texts.
export function preTokenizer(settings) {
  if (!settings) return (text) => [text];
  switch (settings.type) {
    case "Sequence": {
      const steps = settings.pretokenizers.map(preTokenizer);
      return (text, first) =>
        steps.reduce((parts, step) => parts.flatMap((part, i) => step(part, first && i === 0)), [text]);
    }
    case "ByteLevel":
      return (text) => {
        if (settings.add_prefix_space && !text.startsWith(" ")) text = ` ${text}`;
        return (settings.use_regex === false ? [text] : text.match(GPT2) ?? []).map(byteLetters);
      };
    case "BertPreTokenizer":
      return (text) =>
        text.split(/\p{White_Space}+/u).flatMap((word) => split(word, new RegExp(PUNCTUATION, "gu"), "Isolated", false));
    case "Whitespace":
      return (text) => text.match(WORDS) ?? [];
    case "WhitespaceSplit":
      return (text) => text.split(/\p{White_Space}+/u).filter(Boolean);
    case "Punctuation":
      return (text) => split(text, new RegExp(PUNCTUATION, "gu"), settings.behavior ?? "Isolated", false);
    case "Digits": {
      const digits = settings.individual_digits ? /\p{N}/gu : /\p{N}+/gu;
      return (text) => split(text, digits, "Isolated", false);
    }
    case "Split": {
      const found = pattern(settings.pattern);
      return (text) => split(text, found, settings.behavior, settings.invert);
    }
    case "Metaspace":
      return (text, first) => {
        const sign = settings.replacement;
        text = text.replaceAll(" ", sign);
        const prepends = settings.prepend_scheme === "always" || (settings.prepend_scheme === "first" && first);
        if (prepends && !text.startsWith(sign)) text = sign + text;
        if (settings.split === false) return [text];
        return split(text, new RegExp(escapeRegex(sign), "gu"), "MergedWithNext", false);
      };
    default:
      return refuse(`the pre-tokenizer ${settings.type}`);
  }
}
