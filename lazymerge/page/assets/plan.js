/* The page of a plan. */

page.searchBox = (tensors, chosen) => {
  const MOST = 40;
  const lower = tensors.names.slice(0, tensors.count).map((name) => name.toLowerCase());
  const list = page.element("ul", { id: "found", role: "listbox", "aria-label": "Tensors found", hidden: true });
  const count = page.element("p", { class: "note", "aria-live": "polite" });
  const box = page.element("input", {
    id: "search", type: "search", autocomplete: "off", spellcheck: "false", role: "combobox",
    "aria-expanded": "false", "aria-controls": "found", "aria-label": "Find a tensor by its name",
    placeholder: "Find a tensor, for example: layers.7 q_proj",
  });
  let found = [];
  let current = -1;
  const close = () => {
    list.hidden = true;
    box.setAttribute("aria-expanded", "false");
    box.removeAttribute("aria-activedescendant");
    current = -1;
  };
  const pick = (number) => {
    box.value = tensors.names[found[number]];
    close();
    chosen(found[number]);
  };
  const mark = (number) => {
    current = number;
    [...list.children].forEach((item, n) => item.setAttribute("aria-selected", String(n === number)));
    if (number >= 0) {
      list.children[number].scrollIntoView({ block: "nearest" });
      box.setAttribute("aria-activedescendant", `found-${number}`);
    }
  };
  const search = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = [];
    let total = 0;
    if (words.length) {
      for (let tensor = 0; tensor < lower.length; tensor += 1) {
        if (!words.every((word) => lower[tensor].includes(word))) continue;
        total += 1;
        if (found.length < MOST) found.push(tensor);
      }
    }
    count.textContent = words.length ? `${page.counted(total, "tensor")} found${total > MOST ? `, the first ${MOST} are listed` : ""}` : "";
    list.replaceChildren(...found.map((tensor, number) =>
      page.element("li", { id: `found-${number}`, role: "option", "aria-selected": "false", onclick: () => pick(number) }, tensors.names[tensor])));
    list.hidden = !found.length;
    box.setAttribute("aria-expanded", String(!list.hidden));
    mark(-1);
  };
  box.addEventListener("input", search);
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && found.length) mark(Math.min(found.length - 1, current + 1));
    else if (event.key === "ArrowUp" && found.length) mark(Math.max(0, current - 1));
    else if (event.key === "Enter" && found.length) pick(Math.max(0, current));
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
  });
  return page.element("div", { class: "search" }, box, list, count);
};

page.planHeader = (data) =>
  page.element(
    "header",
    {},
    page.element("div", { class: "title-row" }, page.element("h1", {}, data.method), page.themeButton()),
    page.element("p", { class: "dim break" }, data.path),
    page.element("nav", { "aria-label": "Parts of this page" },
      [["facts", "Facts"], ["parameters", "Parameters"], ["operations", "Operations"], ["memory", "Memory"], ["bytes", "Bytes"], ["recipe", "Recipe"]].map(([id, name]) => page.element("a", { href: `#${id}` }, name))),
  );

page.remarks = (data) => {
  const all = [...data.suspicions, ...data.notices.map((notice) => ["notice", notice])];
  if (!all.length) return null;
  return page.element("ul", { class: "remarks" }, all.map(([severity, message]) =>
    page.element("li", { class: severity }, page.element("strong", {}, severity), " ", message)));
};

page.modelsTable = (data) =>
  page.table("Models", ["model", "#parameters", "#size", "dtype", "#files"], data.models.map((model, place) => {
    const name = page.element("span", { class: "break" }, page.chip(model.label, place), model.name);
    if (model.merge !== undefined) return [name, "", "", model.merge, ""];
    if (model.is_base) name.append(page.element("span", { class: "dim" }, " (base)"));
    if (model.adapter) name.append(page.element("div", { class: "dim" }, `adapter ${model.adapter}`));
    return [name, model.parameters, page.bytes(model.bytes), model.dtype, String(model.files)];
  }));

page.facts = (data) =>
  page.element("dl", { class: "facts" }, data.facts.map(([label, fact]) => [page.element("dt", {}, label), page.element("dd", { class: "break" }, fact)]));

page.bytesSection = (data) => {
  const models = data.models.filter((model) => model.merge === undefined);
  const most = Math.max(1, ...models.map((model) => Math.max(model.read, model.bytes)));
  const total = models.reduce((sum, model) => sum + model.read, 0);
  const read = models.map((model, place) => [
    page.element("span", {}, page.chip(model.label, place), page.cut(model.name.split("/").pop() || model.name, 40)),
    [[model.read / most, page.modelColour(place)]],
    `${page.bytes(model.read)} read, ${model.bytes ? (model.read / model.bytes).toFixed(2) : "0"} times its ${page.bytes(model.bytes)}`,
  ]);
  const largest = Math.max(1, ...data.shards.map((shard) => shard.bytes));
  const shards = data.shards.slice(0, 400).map((shard) => [
    shard.file, [[shard.bytes / largest, "var(--written)"]], `${page.bytes(shard.bytes)}, ${page.counted(shard.tensors, "tensor")}`,
  ]);
  const written = data.shards.reduce((sum, shard) => sum + shard.bytes, 0);
  const bars = page.bars("Bytes by output file", shards);
  const list = shards.length <= 12 ? bars : page.element("details", {}, page.element("summary", {}, `${page.counted(data.shards.length, "file")}`), bars);
  return page.section("bytes", "Bytes", null,
    page.element("h3", {}, `Read from models: ${page.bytes(total)}`), page.bars("Bytes read by model", read),
    page.element("h3", {}, `Written to files: ${page.bytes(written)}`), list);
};

page.operationsSection = (data) => {
  const panel = page.element("div", { id: "tensor", class: "panel", "aria-live": "polite" }, page.element("p", { class: "note" }, "Open a tensor in the picture, or find it by name, to see its way from the models to the file."));
  const holder = page.element("div", { id: "picture-holder" }, page.element("p", { class: "note" }, "Unpacking …"));
  const search = page.element("div", { id: "search-holder" });
  const section = page.section("operations", "Operations",
    `${page.counted(data.operations, "operation")} over ${page.counted(data.tensors, "tensor")}. Click a box, or press Enter on it, to open it; arrow keys move, Escape closes, + and − zoom.`,
    search, page.element("div", { class: "beside" }, holder, panel));
  return { section, holder, search, panel };
};

page.fillOperations = (data, tensors, { holder, search, panel }) => {
  const show = (tensor, members) => {
    page.showTensor(panel, tensors, tensor, data);
    if (members.length < 2) return;
    const choice = page.element("select", { "aria-label": "Which of the tensors that come about alike" },
      members.slice(0, 2000).map((member) => page.element("option", { value: member, selected: member === tensor }, tensors.names[member])));
    choice.addEventListener("change", () => {
      const chosen = Number(choice.value);
      show(chosen, members);
      panel.querySelector("select").focus();
    });
    panel.prepend(page.element("p", { class: "note" }, `One of ${page.whole(members.length)} that come about alike: `, choice));
  };
  const picture = new page.Picture(data, tensors, show);
  page.picture = picture;
  const button = (text, label, action) => page.element("button", { type: "button", class: "quiet", "aria-label": label, onclick: action }, text);
  holder.replaceChildren(
    page.element("div", { class: "tools" },
      button("+", "Zoom in", () => picture.zoom(1.3)), button("−", "Zoom out", () => picture.zoom(1 / 1.3)),
      button("Fit", "Show all of it", () => picture.fit()), button("Fold", "Close all boxes", () => picture.fold())),
    picture.svg);
  picture.fit();
  search.replaceChildren(page.searchBox(tensors, (tensor) => picture.reveal(tensor)));
};

page.memorySection = (data) => {
  const line = data.timeline;
  const note = `Predicted over the schedule with ${page.counted(line.workers, "worker")}; the largest buffers are those of ${line.hungriest}.`;
  const vram = line.vram ? page.element("p", {}, `Memory of the device: ${page.memory(line.vram.projected_bytes)}, most for ${line.vram.hungriest}.`) : null;
  const measured = data.measured ? [page.element("h3", {}, "The run"), page.rateChart(data.measured)] : [];
  return page.section("memory", "Memory", note, page.memoryChart(line, data.measured), vram, ...measured);
};

page.openPlan = async () => {
  const data = page.embedded("document");
  const root = document.getElementById("page");
  const operations = page.operationsSection(data);
  const map = page.parameterMaps(data.map, data.models);
  root.replaceChildren(
    page.planHeader(data),
    page.section("facts", "Facts", null, page.remarks(data), page.modelsTable(data), page.facts(data)),
    page.section("parameters", "Parameters by layer", data.map.rows.length ? "What differs between layers or parts of them." : "All layers are merged with the same parameters.", ...map),
    operations.section,
    page.memorySection(data),
    page.bytesSection(data),
    page.section("recipe", "Recipe", null, page.element("pre", { tabindex: "0" }, data.recipe)),
    page.footer(data),
  );
  try {
    const tensors = await page.tensors();
    page.fillOperations(data, tensors, operations);
  } catch (error) {
    operations.holder.replaceChildren(page.element("p", { class: "note" }, `The operations could not be unpacked (${error}). A browser of 2023 or later can.`));
    throw error;
  }
  document.documentElement.dataset.ready = "yes";
};

page.openPlan();
