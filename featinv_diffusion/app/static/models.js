// Which models stand side by side, and at which of their layers.

import { make } from "./dom.js";

const MOST = 4;

export class Models {
  constructor(place, button, onChange) {
    this.place = place;
    this.button = button;
    this.onChange = onChange;
    this.families = new Map();
    this.chosen = [];
    button.addEventListener("click", () => {
      const all = [...this.families.values()].flat();
      const used = new Set(all.filter((one) => this.chosen.includes(one.name)).map((one) => one.family));
      const free = all.find((one) => !used.has(one.family) && one.layer === "last") ?? all.find((one) => !this.chosen.includes(one.name));
      if (!free) return;
      this.load([...this.chosen, free.name]);
      this.onChange();
    });
  }

  offer(members) {
    for (const one of members) {
      if (!this.families.has(one.family)) this.families.set(one.family, []);
      this.families.get(one.family).push(one);
    }
  }

  names() {
    return [...this.chosen];
  }

  load(names) {
    this.chosen = names.slice(0, MOST);
    this.#draw();
  }

  #draw() {
    this.place.replaceChildren(...this.chosen.map((name, i) => this.#row(name, i)));
    this.button.disabled = this.chosen.length >= MOST;
  }

  #choose(i, name) {
    this.chosen[i] = name;
    this.onChange();
  }

  #row(name, i) {
    const all = [...this.families.values()].flat();
    const own = all.find((one) => one.name === name) ?? { name, family: name, layer: "last" };
    const family = this.families.get(own.family) ?? [own];
    const id = `model-${i}`;
    const select = make("select", { id },
      ...[...this.families.keys()].map((one) => make("option", { selected: one === own.family }, one)));
    select.addEventListener("change", () => {
      const members = this.families.get(select.value);
      this.#choose(i, (members.find((one) => one.layer === "last") ?? members[0]).name);
      this.#draw();
      this.place.querySelector(`#${id}`).focus();
    });
    const row = make("div", { class: "model" }, make("label", { for: id }, i ? `Model ${i + 1}` : "Model"), " ", select);
    if (family.length > 1) row.append(...this.#layers(family, own, i));
    if (i) {
      const remove = make("button", { type: "button" }, `Remove model ${i + 1}`);
      remove.addEventListener("click", () => {
        this.load(this.chosen.filter((_, other) => other !== i));
        this.onChange();
      });
      row.append(remove);
    }
    return row;
  }

  #layers(family, own, i) {
    const id = `layer-${i}`;
    const shown = make("output", { for: id }, own.layer);
    const slider = make("input", {
      type: "range", id, min: "0", max: String(family.length - 1), step: "1",
      value: String(family.indexOf(own)), "aria-valuetext": own.layer,
    });
    slider.addEventListener("input", () => {
      const { layer } = family[Number(slider.value)];
      shown.textContent = layer;
      slider.setAttribute("aria-valuetext", layer);
    });
    slider.addEventListener("change", () => this.#choose(i, family[Number(slider.value)].name));
    return [make("div", { class: "head" }, make("label", { for: id }, "Layer: "), shown), slider];
  }
}
