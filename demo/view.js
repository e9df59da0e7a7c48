// What the page shows. Names and captions enter as text alone: nothing here is ever read as HTML.

const element = (id) => document.getElementById(id);
const sheets = new Map();

export const count = (number) => number.toLocaleString("en");
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

// Several thumbnails lie side by side in one file; it is fetched when the first of them is shown.
function loadSheet(name) {
  if (!sheets.has(name)) {
    const image = new Image();
    image.src = `data/${name}`;
    sheets.set(name, image.decode().then(() => image));
  }
  return sheets.get(name);
}

async function drawThumbnail(canvas, { tile, columns, sheets: names }, row) {
  const [sheet, place] = [Math.floor(row / columns ** 2), row % columns ** 2];
  const [x, y] = [(place % columns) * tile, Math.floor(place / columns) * tile];
  try {
    const image = await loadSheet(names[sheet]);
    canvas.getContext("2d").drawImage(image, x, y, tile, tile, 0, 0, tile, tile);
  } catch {
    canvas.classList.add("missing"); // offline, and not seen before
  }
}

export function labelOf(site, row) {
  return site.labels ? site.labels[row] : `Picture ${row + 1}`;
}

// One picture of the results, a button that searches for pictures like it.
function card(site, { row, score }, onChoose) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const canvas = document.createElement("canvas");
  button.type = "button";
  button.dataset.row = row;
  canvas.width = canvas.height = site.thumbnails.tile;
  button.append(canvas);
  const label = labelOf(site, row);
  if (site.labels) {
    const text = document.createElement("span");
    text.className = "label";
    text.textContent = label;
    button.append(text);
  }
  if (score !== undefined) {
    const text = document.createElement("span");
    text.className = "score";
    text.textContent = score.toFixed(3);
    button.append(text);
  }
  const similarity = score === undefined ? "" : `, similarity ${score.toFixed(3)}`;
  button.setAttribute("aria-label", `${label}${similarity}: search for pictures like this one`);
  button.title = "Search for pictures like this one";
  button.addEventListener("click", () => onChoose(row));
  item.append(button);
  drawThumbnail(canvas, site.thumbnails, row);
  return item;
}

export function showResults(site, results, onChoose) {
  element("results").replaceChildren(...results.map((result) => card(site, result, onChoose)));
}

export function addResults(site, results, onChoose) {
  element("results").append(...results.map((result) => card(site, result, onChoose)));
}

export function showStatus(text, times = "") {
  element("status").classList.remove("error");
  element("status").textContent = text;
  element("times").textContent = times;
}

export function showError(error) {
  element("status").classList.add("error");
  element("status").textContent = error.message;
  element("times").textContent = "";
}

// The picture that is searched for: a bitmap, or the thumbnail of a row; null for none.
export function showAsked(site, { bitmap, row } = {}) {
  const canvas = element("asked");
  const context = canvas.getContext("2d");
  canvas.hidden = bitmap === undefined && row === undefined;
  if (bitmap) {
    canvas.width = canvas.height = 72;
    const scale = 72 / Math.max(bitmap.width, bitmap.height);
    const [width, height] = [bitmap.width * scale, bitmap.height * scale];
    context.drawImage(bitmap, (72 - width) / 2, (72 - height) / 2, width, height);
  } else if (row !== undefined) {
    canvas.width = canvas.height = site.thumbnails.tile;
    canvas.style.width = canvas.style.height = "72px";
    drawThumbnail(canvas, site.thumbnails, row);
  }
}

export function showSite(site, onExample) {
  document.title = site.title;
  element("title").textContent = site.title;
  element("summary").textContent =
    `${count(site.index.rows)} pictures, searched by text or by a picture on this device, without a server.`;
  const { name, parameters, text, vision } = site.student;
  const millions = (parameters / 1e6).toFixed(1);
  element("student").textContent =
    `The student ${name}: ${millions} million parameters; ${megabytes(text.bytes)} for texts (${text.precision}), ` +
    `${megabytes(vision.bytes)} for pictures (${vision.precision}). It runs on ${site.runtime.name} (MIT, Microsoft), ` +
    `${megabytes(site.runtime.bytes)}. Loaded first: ${megabytes(site.bytes.first)}; later, for pictures, thumbnails ` +
    `and use offline: ${megabytes(site.bytes.later)}.`;
  if (site.examples.length) {
    const buttons = site.examples.map((example) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example;
      button.addEventListener("click", () => onExample(example));
      return button;
    });
    element("examples").replaceChildren("Try:", ...buttons);
    element("examples").hidden = false;
  }
  if (site.notices.length) {
    element("notices").replaceChildren(
      ...site.notices.map((notice) => {
        const item = document.createElement("li");
        item.textContent = notice;
        return item;
      }),
    );
    element("licences").hidden = false;
  }
}
