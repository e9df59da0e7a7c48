const VERSION = "b175c6de6797792f";
const FILES = [
 "./",
 "app.js",
 "data/index.bin",
 "data/labels.json",
 "data/sheet-0.webp",
 "data/sheet-1.webp",
 "data/sheet-10.webp",
 "data/sheet-11.webp",
 "data/sheet-12.webp",
 "data/sheet-13.webp",
 "data/sheet-14.webp",
 "data/sheet-15.webp",
 "data/sheet-16.webp",
 "data/sheet-17.webp",
 "data/sheet-18.webp",
 "data/sheet-19.webp",
 "data/sheet-2.webp",
 "data/sheet-20.webp",
 "data/sheet-21.webp",
 "data/sheet-22.webp",
 "data/sheet-23.webp",
 "data/sheet-24.webp",
 "data/sheet-3.webp",
 "data/sheet-4.webp",
 "data/sheet-5.webp",
 "data/sheet-6.webp",
 "data/sheet-7.webp",
 "data/sheet-8.webp",
 "data/sheet-9.webp",
 "data/site.json",
 "data/text_model.onnx",
 "data/tokenizer.json",
 "data/vision_model.onnx",
 "icon.svg",
 "index.html",
 "model.js",
 "pictures.js",
 "runtime/ort-wasm-simd-threaded.wasm",
 "runtime/ort.wasm.bundle.min.mjs",
 "search.js",
 "style.css",
 "tokenizer.js",
 "tokenizer_text.js",
 "view.js"
];

// Keeps the site for use offline. The program that writes the site puts two constants before these lines: VERSION, which
// names this state of its files, and FILES, those to keep at once. Other files of the site are kept once they were seen.
// A newer state is fetched whole, beside the old one, and takes over when no page shows the old one any more.

const OWN = `dsmd ${self.registration.scope} `; // other sites of the same host keep theirs
const NAME = OWN + VERSION;

self.addEventListener("install", (event) => {
  const requests = FILES.map((file) => new Request(file, { cache: "no-cache" }));
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(requests)));
});

async function dropOthers() {
  for (const name of await caches.keys()) {
    if (name.startsWith(OWN) && name !== NAME) await caches.delete(name);
  }
  await self.clients.claim();
}

self.addEventListener("activate", (event) => event.waitUntil(dropOthers()));

async function answer(request) {
  const cache = await caches.open(NAME);
  const kept = await cache.match(request, { ignoreSearch: true });
  if (kept) return kept;
  const response = await fetch(request);
  if (response.ok) await cache.put(request, response.clone());
  return response;
}

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event.request));
});
