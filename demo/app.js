// The page: loads the student, takes texts and pictures, and shows what they find.

import { loadTextTower, loadVisionTower } from "./model.js";
import { readPicture } from "./pictures.js";
import { readIndex } from "./search.js";
import { addResults, count, labelOf, megabytes, showAsked, showError, showResults, showSite, showStatus } from "./view.js";

const PAGE = 24; // results shown at a time
const MOST = 10 * PAGE; // results of a search
const element = (id) => document.getElementById(id);

let site = null;
let index = null;
let textTower = null; // promises, once asked for
let visionTower = null;
let results = [];
let latest = 0; // number of the last search; an earlier one that ends later shows nothing

async function load(path, as) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new Error(`${path} cannot be loaded: is this device offline?`);
  }
  if (!response.ok) throw new Error(`${path} cannot be loaded (status ${response.status}).`);
  return as === "json" ? response.json() : response.arrayBuffer();
}

async function loadText() {
  const [model, tokenizer] = await Promise.all([load(site.student.text.file), load("data/tokenizer.json", "json")]);
  return loadTextTower(new Uint8Array(model), tokenizer);
}

async function loadVision() {
  const model = await load(site.student.vision.file);
  return loadVisionTower(new Uint8Array(model), site.image);
}

// Loads a tower once; a failed load is tried again at the next search.
function textEncoder() {
  textTower ??= loadText().catch((error) => {
    textTower = null;
    throw error;
  });
  return textTower;
}

function visionEncoder() {
  visionTower ??= loadVision().catch((error) => {
    visionTower = null;
    throw error;
  });
  return visionTower;
}

// Runs one search: `encode` gives {embedding}, or null where something newer was asked meanwhile.
async function search(asked, encode) {
  const number = ++latest;
  document.body.setAttribute("aria-busy", "true");
  try {
    const start = performance.now();
    const { embedding, milliseconds, cut, showsAsked } = await encode();
    if (number !== latest) return;
    const compared = performance.now();
    results = index.search(embedding, MOST);
    const spent = performance.now() - compared;
    showAsked(site, showsAsked);
    showResults(site, results.slice(0, PAGE), searchLike);
    element("more").hidden = results.length <= PAGE;
    const read = milliseconds === undefined ? "" : `${milliseconds.toFixed(1)} ms to read it, `;
    const isCut = cut ? ` The text is cut: the student reads its first ${cut} tokens.` : "";
    showStatus(
      `The ${Math.min(PAGE, results.length)} best of ${count(index.rows)} pictures for ${asked}.${isCut}`,
      `${read}${spent.toFixed(1)} ms to compare it with ${count(index.rows)} pictures`,
    );
    document.body.dataset.milliseconds = performance.now() - start;
  } catch (error) {
    if (number === latest) showError(error);
  } finally {
    if (number === latest) {
      document.body.removeAttribute("aria-busy");
      document.body.dataset.searches = number; // for tests: this many are done
    }
  }
}

async function timed(encode, query) {
  const start = performance.now();
  const answer = await encode(query);
  return { ...answer, milliseconds: performance.now() - start };
}

function searchText(text) {
  element("text").value = text;
  if (!text.trim()) return browse();
  if (!textTower) showStatus("Loading the student");
  return search(`“${text}”`, async () => timed(await textEncoder(), text));
}

function searchPicture(file) {
  element("text").value = "";
  if (!visionTower) showStatus(`Loading the student's eye, ${megabytes(site.student.vision.bytes)}`);
  return search("this picture", async () => {
    const picture = await readPicture(file);
    return { ...(await timed(await visionEncoder(), picture)), showsAsked: { bitmap: picture.bitmap } };
  });
}

function searchLike(row) {
  element("text").value = "";
  window.scrollTo({ top: 0 });
  const asked = site.labels ? `a picture like “${labelOf(site, row)}”` : "a picture like this one";
  return search(asked, async () => ({ embedding: index.embedding(row), showsAsked: { row } }));
}

// Before anything is asked: the pictures in their order.
function browse() {
  latest++;
  results = Array.from({ length: index.rows }, (_, row) => ({ row }));
  showAsked(site);
  showResults(site, results.slice(0, PAGE), searchLike);
  element("more").hidden = results.length <= PAGE;
  showStatus(`${count(index.rows)} pictures. Type a text, give a picture, or choose one of these to find its like.`);
}

function listen() {
  element("search").addEventListener("submit", (event) => {
    event.preventDefault();
    searchText(element("text").value);
  });
  element("more").addEventListener("click", () => {
    const shown = element("results").children.length;
    addResults(site, results.slice(shown, shown + PAGE), searchLike);
    element("more").hidden = shown + PAGE >= results.length;
    element("results").children[shown].firstChild.focus();
  });
  for (const [button, input] of [["choose", "file"], ["photograph", "camera"]]) {
    element(button).addEventListener("click", () => element(input).click());
    element(input).addEventListener("change", () => {
      const [file] = element(input).files;
      if (file) searchPicture(file);
      element(input).value = ""; // so that the same file can be chosen again
    });
  }
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (file) {
      event.preventDefault();
      searchPicture(file);
    }
  });
  let inside = 0; // elements entered and not left: dragging fires for each
  const brings = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (brings(event)) element("drop").hidden = ++inside === 0;
  });
  document.addEventListener("dragleave", (event) => {
    if (brings(event)) element("drop").hidden = --inside <= 0;
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    element("drop").hidden = true;
    const [file] = event.dataTransfer.files;
    if (file) searchPicture(file);
  });
}

async function start() {
  try {
    const [about, buffer, labels] = await Promise.all([
      load("data/site.json", "json"), load("data/index.bin"), load("data/labels.json", "json"),
    ]);
    site = { ...about, labels };
    index = readIndex(buffer, site.index.rows, site.index.dim);
    showSite(site, searchText);
    listen();
    browse();
    await textEncoder();
    document.body.dataset.ready = "text";
    await navigator.serviceWorker?.register("sw.js"); // keeps the page for use offline
  } catch (error) {
    showError(error);
    document.body.dataset.ready = "error";
  }
}

start();
