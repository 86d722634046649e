/* The page of a report. */

page.MOST_LISTED = 30; // tensors in a list; more can be searched
page.MOST_OUTLIERS = 12;

page.reportTensors = async () => {
  const found = await page.unpacked();
  for (const name of ["elements", "stack", "layer"]) found[name] = page.sums(found[name]);
  found.count = found.elements.length;
  found.names = page.unpackedNames(found.names);
  return found;
};

page.reportHeader = (data) =>
  page.element(
    "header",
    {},
    page.element("div", { class: "title-row" }, page.element("h1", {}, data.title), page.themeButton()),
    data.reference ? page.element("p", { class: "dim break" }, `against ${data.reference}`) : null,
    page.element("nav", { "aria-label": "Parts of this page" },
      [["layers", "Layers"], ["outliers", "Outliers"], ["tensors", "Tensors"], ...(data.measured ? [["run", "Run"]] : [])].map(([id, name]) => page.element("a", { href: `#${id}` }, name))),
    data.models.length ? page.element("ul", { class: "plain" }, data.models.map((model, place) => page.element("li", {}, page.chip(String.fromCharCode(65 + place), place), model))) : null,
    data.notes.length ? page.element("ul", { class: "remarks" }, data.notes.map((note) => page.element("li", {}, note))) : null,
  );

page.layersSection = (data) => {
  const choice = page.element("select", { id: "series" }, data.series.map(([name], number) => page.element("option", { value: number }, name)));
  const holder = page.element("div", { id: "drawings" }, page.element("p", { class: "note" }, "Unpacking …"));
  const section = page.section("layers", "By layer", "Experts of one layer are drawn as their mean.",
    page.element("label", { for: "series" }, "Show "), choice, holder);
  return { section, choice, holder };
};

/* The tensors with the highest (sign -1) or lowest (sign 1) numbers, most remarkable first: one
   trip, since sorting 90,000 of them for every series takes as long as all the rest. */
page.mostRemarkable = (values, sign) => {
  const kept = [];
  for (let tensor = 0; tensor < values.length; tensor += 1) {
    if (values[tensor] === null) continue;
    const key = sign * values[tensor];
    if (kept.length === page.MOST_OUTLIERS && key >= kept[kept.length - 1][0]) continue;
    let place = kept.length;
    while (place > 0 && kept[place - 1][0] > key) place -= 1;
    kept.splice(place, 0, [key, tensor]);
    if (kept.length > page.MOST_OUTLIERS) kept.pop();
  }
  return kept.map(([, tensor]) => tensor);
};

page.outliers = (data, report) =>
  data.series.map(([name, remarkable], series) => {
    const order = page.mostRemarkable(report.values[series], remarkable === "low" ? 1 : -1);
    const rows = order.map((tensor) => [page.element("code", {}, report.names[tensor]), page.value(report.values[series][tensor])]);
    if (!rows.length) return null;
    const title = `${remarkable === "low" ? "Lowest" : "Highest"}: ${name}`;
    return page.element("div", {}, page.element("h3", {}, title), page.table(title, ["tensor", "#value"], rows));
  });

page.tensorList = (data, report) => {
  const lower = report.names.map((name) => name.toLowerCase());
  const box = page.element("input", { id: "search", type: "search", autocomplete: "off", spellcheck: "false", "aria-label": "Find tensors by name", placeholder: "Find tensors, for example: layers.7 mlp" });
  const count = page.element("p", { class: "note", "aria-live": "polite" });
  const holder = page.element("div", { id: "listed" });
  const show = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    let total = 0;
    for (let tensor = 0; tensor < report.count; tensor += 1) {
      if (!words.every((word) => lower[tensor].includes(word))) continue;
      total += 1;
      if (found.length < page.MOST_LISTED) found.push(tensor);
    }
    count.textContent = `${page.counted(total, "tensor")}${total > found.length ? `, the first ${found.length} are listed` : ""}`;
    holder.replaceChildren(page.table("Tensors", ["tensor", "#elements", ...data.series.map(([name]) => `#${name}`)],
      found.map((tensor) => [page.element("code", {}, report.names[tensor]), page.whole(report.elements[tensor]), ...report.values.map((column) => page.value(column[tensor]))])));
  };
  box.addEventListener("input", show);
  show();
  const search = (name) => {
    box.value = name;
    show();
    box.focus();
    box.scrollIntoView({ block: "center" });
  };
  return { element: page.element("div", {}, page.element("div", { class: "search" }, box), count, holder), search };
};

page.openReport = async () => {
  const data = page.embedded("document");
  const layers = page.layersSection(data);
  const outliers = page.element("div", { class: "small-multiples" });
  const tensors = page.element("div", {});
  document.getElementById("page").replaceChildren(
    page.reportHeader(data),
    layers.section,
    page.section("outliers", "Outliers", null, outliers),
    page.section("tensors", "Tensors", null, tensors),
    ...(data.measured ? [page.section("run", "The run", null, page.rateChart(data.measured), page.residentChart(data.measured))] : []),
    page.footer(data),
  );
  const report = await page.reportTensors();
  const list = page.tensorList(data, report);
  const kept = page.redraws.length; // charts that stay when another series is drawn
  const draw = () => {
    const series = Number(layers.choice.value);
    page.redraws.length = kept;
    layers.holder.replaceChildren(...page.layerDrawings(report, series, data.series[series][0], (tensor) => list.search(report.names[tensor])));
  };
  layers.choice.addEventListener("change", draw);
  if (data.series.length) draw();
  outliers.replaceChildren(...page.outliers(data, report).filter(Boolean));
  tensors.replaceChildren(list.element);
  document.documentElement.dataset.ready = "yes";
};

page.openReport();
