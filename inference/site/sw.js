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
