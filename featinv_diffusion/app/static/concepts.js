// Sliders of the concepts that matter in a picture.

import { drawMap, get, make } from "./dom.js";

export class Concepts {
  constructor(place, onChange) {
    this.place = place;
    this.onChange = onChange;
    this.factors = new Map();
    this.found = [];
  }

  // Returns the edits, one of each file of concepts.
  edits() {
    const groups = new Map();
    for (const [key, factor] of this.factors) {
      if (factor === 1) continue;
      const [concepts, concept] = JSON.parse(key);
      if (!groups.has(concepts)) groups.set(concepts, []);
      groups.get(concepts).push([concept, factor]);
    }
    return [...groups].map(([concepts, factors]) => ({ kind: "scale", concepts, factors: factors.sort((a, b) => a[0] - b[0]) }));
  }

  load(edits) {
    this.factors.clear();
    for (const { concepts, factors } of edits) {
      for (const [concept, factor] of factors) this.factors.set(JSON.stringify([concepts, concept]), factor);
    }
    this.show(this.found);
  }

  reset() {
    this.factors.clear();
    this.show(this.found);
    this.onChange(true);
  }

  show(found) {
    this.found = found;
    const known = new Set(found.map((one) => JSON.stringify([one.concepts, one.concept])));
    const others = [...this.factors.keys()].filter((key) => !known.has(key)).map((key) => {
      const [concepts, concept] = JSON.parse(key);
      return { concepts, concept, share: null, cells: null };
    });
    const all = [...found, ...others];
    this.place.replaceChildren(...(all.length ? all.map((one, i) => this.#slider(one, i)) : [this.#none()]));
    this.#offerToSteer(all);
  }

  #none() {
    return make("p", { class: "hint" },
      "No file of concepts fits this model and layer. Find some with ", make("code", {}, "featinv concepts"),
      " and start the app with ", make("code", {}, "--concepts FILE"), ".");
  }

  #slider(one, i) {
    const key = JSON.stringify([one.concepts, one.concept]);
    const id = `concept-${i}`;
    const value = this.factors.get(key) ?? 1;
    const shown = make("output", { for: id }, value.toFixed(2));
    const input = make("input", {
      type: "range", id, min: "0", max: "4", step: "0.05", value: String(value),
      "data-concept": String(one.concept), "data-concepts": one.concepts,
    });
    const change = (isFinal) => {
      this.factors.set(key, Number(input.value));
      shown.textContent = Number(input.value).toFixed(2);
      this.onChange(isFinal);
    };
    input.addEventListener("input", () => change(false));
    input.addEventListener("change", () => change(true));
    const head = make("div", { class: "head" });
    if (one.cells) {
      const canvas = make("canvas", { role: "img", "aria-label": `Where concept ${one.concept} is` });
      drawMap(canvas, one.cells, 0, 1);
      head.append(canvas);
    }
    const share = one.share === null ? "" : `, ${(100 * one.share).toFixed(1)} % of the map`;
    head.append(make("label", { for: id }, `concept ${one.concept}${share}`), shown);
    return make("div", { class: "slider" }, head, input);
  }

  #offerToSteer(all) {
    const before = get("steer-along").selectedIndex;
    get("steer-along").replaceChildren(
      make("option", {}, "towards the second picture"),
      ...all.map((one) => make("option", { "data-concepts": one.concepts, "data-concept": String(one.concept) }, `concept ${one.concept}`)));
    get("steer-along").selectedIndex = Math.max(0, Math.min(before, all.length));
  }
}
