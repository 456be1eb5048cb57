// The pictures of each inverter, and how they are made again.

import { downloadUrl } from "./api.js";
import { copyText, drawMap, drawScale, make } from "./dom.js";

const DOWNLOADS = {
  png: "Pictures, PNG", pdf: "Figure, PDF", safetensors: "Features, safetensors",
  manifest: "Manifest", picture: "The picture", zip: "Everything, zip",
};

const rate = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? `${known.filter(Boolean).length} of ${known.length}` : null;
};

function facts(found) {
  const pairs = [
    ["The model says", found.class],
    ["Its class comes first in", rate(found.top1)],
    ["… is among five in", rate(found.top5)],
    ["Map", `${found.grid.join("×")} cells`],
    ["Scope", found.scope.replace(/^Scope: /, "")],
    ["Second eye", found.second_eye && found.second_eye.replace(/^Second eye: /, "")],
    ["Certainty", found.certainty],
    ["Time", `${found.seconds.toFixed(2)} s`],
  ].filter(([, value]) => value);
  return make("dl", { class: "facts" },
    ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function heat(rows, words, title, low) {
  const values = rows.flat();
  const range = `${Math.min(...values).toFixed(2)} … ${Math.max(...values).toFixed(2)}`;
  const canvas = make("canvas", { role: "img", "aria-label": `${words}: ${range}` });
  drawMap(canvas, rows, low, 1);
  const scale = make("canvas", { class: "scale", "aria-hidden": "true" });
  drawScale(scale);
  return make("details", {},
    make("summary", {}, title),
    make("div", { class: "heat" }, canvas,
      make("div", {}, `${words}: ${range}`, make("br"), `${low.toFixed(2)} `, scale, " 1")));
}

function heats(found) {
  const low = Math.min(0, ...found.cells.flat());
  return [
    heat(found.cells, "cosine by cell", "Which cells come back", low),
    ...(found.determined ? [heat(found.determined, "share that is determined, by cell", "Which cells the features determine", 0)] : []),
  ];
}

function picture(source, alt, caption, attributes = {}) {
  return make("li", {}, make("figure", {},
    make("img", { src: source, alt, ...attributes }), make("figcaption", {}, caption)));
}

function samplesOf(found, name, isDraft) {
  return found.pictures.map((source, i) => {
    const cosine = `cosine ${found.cosine[i].toFixed(2)}`;
    const caption = make("span", {}, cosine);
    if (isDraft) caption.append(" ", make("span", { class: "badge" }, "draft"));
    const alt = `Sample ${i + 1} from the ${found.family} features of ${name}, ${cosine}`;
    return picture(source, alt, caption, { class: "sample", "data-cosine": String(found.cosine[i]) });
  });
}

export function showResults(place, results, name, isDraft) {
  place.replaceChildren(...results.map((found) => {
    const list = make("ul", { class: "pictures" });
    if (found.original) list.append(picture(found.original, `The picture ${name} as the model sees it`, "original"));
    list.append(...samplesOf(found, name, isDraft));
    const card = make("section", { class: "card", "data-member": found.member, "data-quality": found.quality ?? "exact" },
      make("h3", {}, `${found.family} · ${found.layer}`),
      ...found.notes.map((note) => make("p", { class: "hint badge" }, note)),
      list);
    card.append(facts(found), ...heats(found));
    return card;
  }));
}

// Replaces the first sample while a slider moves; the others wait.
export function showDraft(place, found, name) {
  const card = [...place.children].find((one) => one.dataset.member === found.member);
  if (!card) return showResults(place, [found], name, true);
  const samples = [...card.querySelectorAll("img.sample")];
  samples.forEach((image) => image.classList.add("stale"));
  const [drafted] = samplesOf(found, name, true);
  samples[0].closest("li").replaceWith(drafted);
  card.dataset.quality = "draft";
  for (const other of place.children) if (other !== card) other.querySelectorAll("img.sample").forEach((image) => image.classList.add("stale"));
}

function code(text, what) {
  const button = make("button", { type: "button" }, `Copy ${what}`);
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(text)) ? "Copied" : "Select the text to copy it";
    setTimeout(() => { button.textContent = `Copy ${what}`; }, 2000);
  });
  return [make("pre", { tabindex: "0", class: what.replaceAll(" ", "-"), "aria-label": what }, text), button];
}

export function recipe(command, python) {
  return [...code(command, "the command"), ...code(python, "the lines of Python")];
}

export function showAgain(place, results, state) {
  place.replaceChildren(...results.map((found) => {
    const own = { ...state, members: [found.member] };
    const links = Object.entries(DOWNLOADS).map(([what, words]) =>
      make("a", { href: downloadUrl(what, own), download: "", "data-what": what }, words));
    return make("article", { "data-member": found.member },
      make("h3", {}, `${found.family} · ${found.layer}`),
      ...recipe(found.command, found.python),
      make("p", { class: "row" }, "Download: ", ...links));
  }));
}
