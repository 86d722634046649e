"use strict";
/* What every part of the page uses: elements, sizes as people read them, light and dark. */

const page = {};

page.element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  return page.fill(made, attributes, children);
};

page.drawn = (tag, attributes = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return page.fill(made, attributes, children);
};

/* Attributes whose name begins with "on" are listeners; children are elements or text. */
page.fill = (made, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined) continue;
    made.append(child instanceof Node ? child : page.shown(String(child)));
  }
  return made;
};

/* Text from models and recipes: characters that are not seen, or turn the line around, are named. */
page.shown = (text) =>
  text.replace(
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu,
    (character) => "\\u" + character.codePointAt(0).toString(16).padStart(4, "0"),
  );

page.sized = (count, base, units) => {
  let value = count;
  let unit = 0;
  while (value >= base * 0.9995 && unit < units.length - 1) {
    value /= base;
    unit += 1;
  }
  if (unit === 0) return `${Math.round(value)} ${units[0]}`;
  return `${value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${units[unit]}`;
};
page.bytes = (count) => page.sized(count, 1000, ["B", "kB", "MB", "GB", "TB", "PB"]);
page.memory = (count) => page.sized(count, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
page.whole = (count) => Math.round(count).toLocaleString("en-US");
page.counted = (count, noun) => `${page.whole(count)} ${noun}${count === 1 ? "" : "s"}`;

page.value = (value) => {
  if (value === null || value === undefined) return "–";
  if (value === true) return "yes";
  if (value === false) return "no";
  if (Array.isArray(value)) return "[" + value.map(page.value).join(", ") + "]";
  if (typeof value === "number") return String(Number(value.toPrecision(4)));
  return String(value);
};

page.seconds = (seconds) => {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
};

page.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* Colours of models, by place: told apart with any kind of colour blindness (Okabe and Ito). */
page.modelColour = (place) => `var(--model-${place % 8})`;

page.isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/* Listeners that draw again when light turns to dark: canvases know nothing of styles. */
page.redraws = [];
page.redraw = () => page.redraws.forEach((draw) => draw());

page.themes = ["auto", "light", "dark"];
page.themeButton = () => {
  const stored = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("lazymerge-theme", value);
      return localStorage.getItem("lazymerge-theme");
    } catch {
      return null; // a page that is opened as a file may have no storage
    }
  };
  let theme = page.themes.includes(stored()) ? stored() : "auto";
  const button = page.element("button", { type: "button", class: "quiet", id: "theme" });
  const apply = () => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    page.redraw();
  };
  button.addEventListener("click", () => {
    theme = page.themes[(page.themes.indexOf(theme) + 1) % page.themes.length];
    stored(theme);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page.redraw());
  apply();
  return button;
};

page.section = (id, title, note, ...children) =>
  page.element(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    page.element("h2", { id: `${id}-title` }, title),
    note ? page.element("p", { class: "note" }, note) : null,
    ...children,
  );

page.table = (caption, heads, rows) => {
  const cell = (content, index, tag) => {
    const isNumber = heads[index].startsWith("#");
    return page.element(tag, { class: isNumber ? "number" : null }, content);
  };
  return page.element(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    page.element(
      "table",
      {},
      page.element("caption", { class: "unseen" }, caption),
      page.element(
        "thead",
        {},
        page.element("tr", {}, heads.map((head, index) => cell(head.replace("#", ""), index, "th"))),
      ),
      page.element(
        "tbody",
        {},
        rows.map((row) => page.element("tr", {}, row.map((content, i) => cell(content, i, "td")))),
      ),
    ),
  );
};

page.chip = (label, place) => {
  const chip = page.element("span", { class: "chip" }, label);
  chip.style.setProperty("--chip", page.modelColour(place));
  return chip;
};

page.embedded = (id) => JSON.parse(document.getElementById(id).textContent);

page.footer = (data) => {
  const licences = page.embedded("licences");
  return page.element(
    "footer",
    {},
    page.element("p", {}, `lazymerge ${data.version}. This page is one file; it asks no other.`),
    page.element(
      "details",
      {},
      page.element("summary", {}, `Licences of ${Object.keys(licences).length} libraries in it`),
      Object.entries(licences).map(([name, text]) => [
        page.element("h3", {}, name),
        page.element("pre", {}, text),
      ]),
    ),
  );
};
