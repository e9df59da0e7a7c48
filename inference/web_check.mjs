// Runs a site's own code on probes, so that inference.web can compare it with Python before the site is kept:
//     node web_check.mjs SITE < probes.json > answers.json
// Probes: {texts: [...], pictures: [{width, height, rgba (base64)}]}. Answers: {ids, texts, pictures}, or {error}.

import { readFileSync, writeSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const site = resolve(process.argv[2]);
const load = (name) => import(pathToFileURL(`${site}/${name}`));
const json = (name) => JSON.parse(readFileSync(`${site}/${name}`, "utf-8"));

async function answer({ texts, pictures }) {
  const about = json("data/site.json");
  const { env } = await load("runtime/ort.wasm.bundle.min.mjs");
  env.wasm.wasmBinary = readFileSync(`${site}/runtime/ort-wasm-simd-threaded.wasm`); // the page's own fetch cannot read files
  const tokenizer = json("data/tokenizer.json");
  const { makeTokenizer } = await load("tokenizer.js");
  const tokenize = makeTokenizer(tokenizer);
  const { loadTextTower, loadVisionTower } = await load("model.js");
  const readText = await loadTextTower(readFileSync(`${site}/${about.student.text.file}`), tokenizer);
  const readPicture = await loadVisionTower(readFileSync(`${site}/${about.student.vision.file}`), about.image);
  const answers = { ids: texts.map((text) => tokenize(text).ids), texts: [], pictures: [] };
  for (const text of texts) answers.texts.push([...(await readText(text)).embedding]);
  for (const { width, height, rgba } of pictures) {
    const bytes = Buffer.from(rgba, "base64");
    const rows = (y, count) => bytes.subarray(4 * width * y, 4 * width * (y + count));
    answers.pictures.push([...(await readPicture({ width, height, rows })).embedding]);
  }
  return answers;
}

let answers;
try {
  answers = await answer(JSON.parse(readFileSync(0, "utf-8")));
} catch (error) {
  answers = { error: error.message };
}
const output = Buffer.from(JSON.stringify(answers));
for (let at = 0; at < output.length; ) at += writeSync(1, output, at);
process.exit(0);
