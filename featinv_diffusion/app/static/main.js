// The page: its state, and what happens when it changes.

import { fromLink, start, toLink, upload, work } from "./api.js";
import { closeCamera, openCamera, takePicture } from "./camera.js";
import { Concepts } from "./concepts.js";
import { copyText, get, make, toImage } from "./dom.js";
import { Models } from "./models.js";
import { Painter } from "./paint.js";
import { showAgain, showDraft, showResults } from "./results.js";
import { showTokens } from "./tokens.js";

const SETTLED = 350; // milliseconds without a change, after which the pictures are made in full
const pictures = new Map();
let picture = null;
let second = null;
let running = null; // what makes the pictures in full, or reads tokens
let drafting = false;
let again = false;
let settlings = 0; // how many were begun: a draft from before one is late
let timer = null;

const concepts = new Concepts(get("concepts"), changed);
const painter = new Painter(get("map"), changed);
const models = new Models(get("models"), get("add-model"), () => { askConcepts(); settle(); });

// ---- The state

function toState() {
  return {
    picture,
    ...(second ? { second } : {}),
    members: models.names(),
    quality: get("quality").value,
    n_samples: Number(get("n-samples").value),
    seed: Number(get("seed").value),
    edits: [...concepts.edits(), ...painter.edits()],
  };
}

function load(state) {
  picture = state.picture;
  second = state.second ?? null;
  models.load(state.members);
  get("quality").value = state.quality ?? "best";
  get("n-samples").value = state.n_samples ?? 4;
  get("seed").value = state.seed ?? 0;
  const edits = state.edits ?? [];
  concepts.load(edits.filter((edit) => edit.kind === "scale"));
  painter.load(edits.filter((edit) => edit.kind !== "scale"));
}

function remember(state) {
  const link = `#s=${toLink(state)}`;
  history.replaceState(null, "", link);
  get("link").value = location.href;
}

// ---- Pictures of the state

const nameOf = (key) => pictures.get(key)?.name ?? "the picture";

function say(words) {
  get("status").textContent = words;
}

function fail(error) {
  if (error.name === "AbortError") return;
  get("error").textContent = error.message;
  get("error").hidden = false;
  say("That did not work.");
}

function forgive() {
  get("error").hidden = true;
}

function onProgress({ place, done }) {
  if (place !== undefined) say(place > 1 ? `Waiting; ${place - 1} before this.` : "Waiting for its turn.");
  else say("Making the pictures.");
  get("progress").value = done ?? 0;
}

// Does one long thing at a time; a new one replaces the old.
async function run(doing) {
  running?.abort();
  const own = (running = new AbortController());
  get("cancel").disabled = false;
  document.body.dataset.busy = "yes";
  forgive();
  try {
    await doing({ signal: own.signal, onProgress: (line) => { if (running === own) onProgress(line); } });
  } catch (error) {
    if (running === own) fail(error);
  } finally {
    if (running === own) {
      running = null;
      get("cancel").disabled = true;
      get("progress").value = 0;
      document.body.dataset.busy = "no";
    }
  }
}

function settle() {
  clearTimeout(timer);
  settlings += 1;
  again = false;
  const state = toState();
  remember(state);
  return run(async (options) => {
    const results = await work("/api/render", state, options);
    showResults(get("results"), results, nameOf(state.picture), state.quality === "draft");
    showAgain(get("again"), results, state);
    get("peek").src = results[0].pictures[0];
    painter.setGrid(results[0].grid, results[0].has_places);
    say(`Done: ${results.map((found) => found.pictures.length).reduce((a, b) => a + b)} pictures.`);
  });
}

// The newest state as a quick picture; what changes meanwhile comes next.
async function draft() {
  if (drafting) { again = true; return; }
  drafting = true;
  try {
    const state = toState();
    const quick = { ...state, members: state.members.slice(0, 1), quality: "draft", n_samples: 1 };
    const [began, before] = [performance.now(), settlings];
    const [found] = await work("/api/render", quick);
    if (!running && settlings === before) {  // never over pictures that are settled
      showDraft(get("results"), found, nameOf(state.picture));
      get("peek").src = found.pictures[0];
      say(`Draft after ${((performance.now() - began) / 1000).toFixed(2)} s.`);
    }
  } catch (error) {
    fail(error);
  } finally {
    drafting = false;
    if (again) { again = false; draft(); }
  }
}

function cancel() {
  clearTimeout(timer);
  running?.abort();
  say("Cancelled.");
}

// Called while something is dragged, and once more when it is let go.
function changed(isFinal) {
  if (painter.tool === "paint" && painter.edits().length && !second) chooseSecond(otherThan(picture));
  running?.abort();
  running = null;
  get("cancel").disabled = true;
  forgive();
  document.body.dataset.busy = "yes";
  say("Drawing a draft.");
  remember(toState());
  draft();
  clearTimeout(timer);
  timer = setTimeout(settle, isFinal ? SETTLED : 4 * SETTLED);
}

async function askConcepts() {
  const asked = { picture, member: models.names()[0] };
  try {
    const found = await work("/api/concepts", asked);
    if (asked.picture === picture && asked.member === models.names()[0]) concepts.show(found);
  } catch (error) {
    fail(error);
  }
}

// ---- Pictures to choose from

const otherThan = (key) => [...pictures.keys()].find((one) => one !== key) ?? key;
const thumbnail = (key) => `/api/pictures/${key}`;

function drawChoices(place, name, chosen, choose) {
  const legend = place.querySelector("legend");
  place.replaceChildren(legend, ...[...pictures.values()].map((one) => {
    const words = one.label && one.label !== one.name.replace(/\.\w+$/, "") ? `${one.label}: ${one.name}` : one.name;
    const input = make("input", { type: "radio", name, value: one.key, checked: one.key === chosen });
    input.addEventListener("change", () => choose(one.key));
    return make("label", {}, input, make("img", { src: thumbnail(one.key), alt: "" }), words);
  }));
}

async function showPaintPictures() {
  painter.first = await toImage(thumbnail(picture)).catch(() => null);
  painter.second = second ? await toImage(thumbnail(second)).catch(() => null) : null;
  painter.draw();
}

function drawAllChoices() {
  drawChoices(get("pictures"), "picture", picture, choosePicture);
  drawChoices(get("seconds"), "second", second, (key) => { chooseSecond(key); settle(); });
}

function chooseSecond(key) {
  second = key;
  drawAllChoices();
  showPaintPictures();
}

function choosePicture(key) {
  picture = key;
  drawAllChoices();
  showPaintPictures();
  askConcepts();
  return settle();
}

async function take(file, name) {
  forgive();
  say("Uploading.");
  try {
    const stored = await upload(file, name);
    pictures.set(stored.key, stored);
    await choosePicture(stored.key);
  } catch (error) {
    fail(error);
  }
}

// ---- Everything that can be pressed

function wire() {
  get("file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    target.value = "";
    if (file) take(file, file.name);
  });
  document.body.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
  document.body.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  document.body.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file) take(file, file.name);
  });
  get("camera-open").addEventListener("click", () => openCamera().catch(fail));
  get("camera-close").addEventListener("click", closeCamera);
  get("camera-take").addEventListener("click", async () => take(...(await takePicture())));
  for (const id of ["quality", "n-samples", "seed"]) get(id).addEventListener("change", settle);
  get("cancel").addEventListener("click", cancel);
  get("concepts-reset").addEventListener("click", () => concepts.reset());
  get("map-clear").addEventListener("click", () => painter.clear());
  get("tools").addEventListener("change", () => { get("steer").hidden = painter.tool !== "steer"; });
  get("steer-factor").addEventListener("input", () => { get("steer-shown").textContent = get("steer-factor").value; });
  get("tokens-read").addEventListener("click", () => run(async (options) => {
    await showTokens(get("tokens"), picture, get("target").value.trim(), options);
    say("The tokens are read.");
  }));
  document.querySelector("[data-copies=link]").addEventListener("click", async ({ target }) => {
    get("link").select();
    target.textContent = (await copyText(get("link").value)) ? "Copied" : "Press Ctrl+C";
  });
  // On a phone the pictures are above the sliders; a small one follows while they are out of sight.
  new IntersectionObserver(([seen]) => { get("peek").hidden = seen.isIntersecting || !get("peek").src; }).observe(get("results"));
  window.addEventListener("hashchange", () => restore() && show());
}

function restore() {
  const link = location.hash.match(/^#s=(.+)$/);
  if (!link) return false;
  try {
    load(fromLink(link[1]));
    return true;
  } catch {
    fail(new Error("The link must hold a state of this page, but is damaged."));
    return false;
  }
}

async function show() {
  for (const key of [picture, second]) {
    if (key && !pictures.has(key)) pictures.set(key, { key, name: "of the link", label: null });
  }
  drawAllChoices();
  showPaintPictures();
  askConcepts();
  return settle();
}

async function begin() {
  wire();
  try {
    const { version, pictures: samples, members, default: first, limits } = await start();
    get("version").textContent = version;
    get("limit").textContent = `At most ${limits.megabytes} MiB.`;
    for (const one of samples) pictures.set(one.key, one);
    models.offer(members);
    if (!restore()) {
      picture = samples[0].key;
      models.load([first]);
    }
    await show();
  } catch (error) {
    fail(error);
  }
  document.body.dataset.started = "yes";
}

begin();
