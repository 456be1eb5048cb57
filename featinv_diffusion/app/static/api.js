// What the server is asked, and states as links.

const client = Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

async function explain(response) {
  try {
    return (await response.json()).error;
  } catch {
    return `The app answered with the code ${response.status}.`;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { "x-featinv-client": client, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The app does not answer. Is it still running?");
  }
  if (!response.ok) throw new Error(await explain(response));
  return response;
}

export const start = async () => (await ask("/api/start")).json();

export async function upload(file, name) {
  const path = `/api/pictures?name=${encodeURIComponent(name)}`;
  return (await ask(path, { method: "POST", body: file })).json();
}

// Reads lines of JSON: places and shares on the way, the result at last.
export async function work(path, body, { signal, onProgress = () => {} } = {}) {
  const response = await ask(path, {
    method: "POST", body: JSON.stringify(body), signal, headers: { "content-type": "application/json" },
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The app stopped before the pictures were done.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(Boolean).map((text) => JSON.parse(text))) {
      if (line.error) throw new Error(line.error);
      if (line.result !== undefined) return line.result;
      onProgress(line);
    }
  }
}

const sorted = (value) => Array.isArray(value) ? value.map(sorted)
  : value && typeof value === "object"
    ? Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]))
    : value;

export function toLink(state) {
  const bytes = new TextEncoder().encode(JSON.stringify(sorted(state)));
  const text = Array.from(bytes, (b) => String.fromCharCode(b)).join("");
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

export function fromLink(link) {
  const text = atob(link.replaceAll("-", "+").replaceAll("_", "/"));
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(text, (c) => c.charCodeAt(0))));
}

export const downloadUrl = (what, state) => `/api/download/${what}?state=${toLink(state)}`;
