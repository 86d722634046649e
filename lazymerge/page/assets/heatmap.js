/* Values by layer as a grid of coloured cells: arrow keys move in it, each cell tells its value. */

page.scaleOf = (rows) => {
  const numbers = rows.flatMap((row) => row.values.filter((value) => typeof value === "number"));
  const low = Math.min(...numbers);
  const high = Math.max(...numbers);
  if (!numbers.length) return null;
  if (low < 0 && high > 0) return { low: -Math.max(-low, high), high: Math.max(-low, high), isSigned: true };
  return { low, high, isSigned: false };
};

page.shadeCell = (cell, value, scale) => {
  if (value === null || value === undefined) cell.className = "absent";
  else if (value === "copied") cell.className = "copied";
  else if (typeof value !== "number" || !scale) {
    cell.className = value === true ? "yes" : value === false ? "no" : "word";
  } else {
    const share = scale.high === scale.low ? 1 : (value - scale.low) / (scale.high - scale.low);
    cell.className = scale.isSigned ? (share < 0.5 ? "minus" : "plus") : "number";
    const depth = scale.isSigned ? Math.abs(share - 0.5) * 2 : share;
    cell.style.setProperty("--share", `${(depth * 100).toFixed(1)}%`);
  }
};

page.cellText = (value) => {
  if (value === null || value === undefined) return "no such tensor";
  if (value === "copied") return "copied, no parameter used";
  if (value === "differs") return "several values in this layer";
  return page.value(value);
};

page.scaleLegend = (scale) => {
  if (!scale) return null;
  const ramp = page.element("span", { class: scale.isSigned ? "ramp signed" : "ramp", "aria-hidden": "true" });
  return page.element("p", { class: "scale" }, page.value(scale.low), ramp, page.value(scale.high));
};

/* rows: {label, values}; heads: names of the columns; tell(row, column) begins the sentence of a
   cell; picked(row, column) is called on Enter and click. */
page.heatMap = ({ label, rows, heads, tell, scale, picked }) => {
  const readout = page.element("p", { class: "readout", "aria-live": "polite" }, "Point at a cell, or use the arrow keys, for its value.");
  const cells = [];
  const say = (row, column) => {
    readout.textContent = page.shown(`${tell(row, column)}: ${page.cellText(rows[row].values[column])}`);
  };
  const body = rows.map((row, number) => {
    cells.push([]);
    const line = page.element("tr", { role: "row" }, page.element("th", { scope: "row", role: "rowheader" }, row.label));
    row.values.forEach((value, column) => {
      const cell = page.element("td", { role: "gridcell", tabindex: "-1" });
      page.shadeCell(cell, value, scale);
      cell.setAttribute("aria-label", page.shown(`${tell(number, column)}: ${page.cellText(value)}`));
      cell.dataset.row = number;
      cell.dataset.column = column;
      cells[number].push(cell);
      line.append(cell);
    });
    return line;
  });
  const every = Math.ceil(heads.length / 16);
  const head = page.element(
    "tr",
    { role: "row" },
    page.element("th", {}, ""),
    heads.map((name, column) => page.element("th", { class: "tick" }, column % every === 0 ? name : "")),
  );
  const grid = page.element("table", { class: "heat", role: "grid", "aria-label": label }, page.element("thead", {}, head), page.element("tbody", {}, body));
  const at = (target) => {
    const cell = target.closest("td");
    return cell ? [Number(cell.dataset.row), Number(cell.dataset.column)] : null;
  };
  let current = cells[0][0];
  current.tabIndex = 0;
  grid.addEventListener("pointerover", (event) => {
    const place = at(event.target);
    if (place) say(...place);
  });
  grid.addEventListener("focusin", (event) => {
    const place = at(event.target);
    if (!place) return;
    current.tabIndex = -1;
    current = cells[place[0]][place[1]];
    current.tabIndex = 0;
    say(...place);
  });
  grid.addEventListener("click", (event) => {
    const place = at(event.target);
    if (!place) return;
    cells[place[0]][place[1]].focus();
    if (picked) picked(...place);
  });
  grid.addEventListener("keydown", (event) => {
    const place = at(event.target);
    if (!place) return;
    const [row, column] = place;
    const last = rows[row].values.length - 1;
    const moves = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column], Home: [row, 0], End: [row, last],
    };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (picked) picked(row, column);
    } else if (event.key === "Escape") event.target.blur();
    else if (event.key in moves) {
      event.preventDefault();
      const [to, along] = moves[event.key];
      const cell = (cells[to] || [])[along];
      if (cell) cell.focus();
    }
  });
  return page.element("div", {}, page.element("div", { class: "wide" }, grid), readout, page.scaleLegend(scale));
};

/* The map of a plan's parameters: one grid for every parameter and layer stack. */
page.parameterMaps = (map, models) => {
  const groups = new Map();
  for (const row of map.rows) {
    const key = JSON.stringify([row.parameter, row.stack]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  const place = new Map(models.map((model, number) => [model.label, number]));
  const drawn = [...groups.values()].map((rows) => {
    const { parameter, stack } = rows[0];
    const shown = rows.map((row) => ({
      values: row.values,
      label: page.element("span", {}, row.model === null ? null : page.chip(row.model, place.get(row.model)), row.part || "all tensors"),
    }));
    return page.element(
      "div",
      { class: "grid-of" },
      page.element("h3", {}, parameter, page.element("span", { class: "dim" }, `  ${stack}`)),
      page.heatMap({
        label: `${parameter} by layer of ${stack}`,
        rows: shown,
        heads: rows[0].values.map((_, layer) => String(layer)),
        scale: page.scaleOf(rows),
        tell: (row, layer) => {
          const { model, part } = rows[row];
          return `${parameter}${model === null ? "" : ` of ${model}`}, layer ${layer}, ${part || "all tensors"}`;
        },
      }),
    );
  });
  const constant = map.constant.map(([parameter, model, value]) => `${parameter}${model === null ? "" : ` of ${model}`} ${page.value(value)}`);
  return [
    constant.length ? page.element("p", {}, page.element("span", { class: "dim" }, "The same everywhere: "), constant.join(", ")) : null,
    ...drawn,
    page.outsideTable(map),
  ];
};

page.outsideTable = (map) => {
  const differs = ([, method, values]) => values.length || method === "copy";
  if (!map.outside.some(differs)) return null;
  const rows = map.outside.map(([name, method, values]) => [
    page.element("code", {}, name),
    method === "copy" ? "copied" : method,
    values.map(([parameter, model, value]) => `${parameter}${model === null ? "" : ` of ${model}`} ${page.value(value)}`).join(", "),
  ]);
  return page.element("details", {}, page.element("summary", {}, `${page.counted(rows.length, "tensor")} outside of the layers`), page.table("Tensors outside of the layers", ["tensor", "method", "parameters"], rows));
};
