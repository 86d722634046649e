/* Numbers of tensors by layer: small charts of each part, and a map of layers and parts. */

page.lineColours = ["--model-0", "--model-1", "--model-2", "--model-3", "--model-4", "--model-7", "--model-6"];

/* Lines of one series: by stack, part and name within the layer; experts are averaged. */
page.layerLines = (report, series) => {
  const lines = new Map();
  for (let tensor = 0; tensor < report.count; tensor += 1) {
    const value = report.values[series][tensor];
    if (report.stack[tensor] < 0 || value === null) continue;
    const suffix = page.general(page.suffixOf(report, tensor));
    const key = `${report.stack[tensor]} ${suffix}`;
    if (!lines.has(key)) {
      const count = report.stacks[report.stack[tensor]][1];
      const empty = () => new Array(count).fill(null);
      lines.set(key, { stack: report.stack[tensor], suffix, part: suffix.split(".")[0], sum: empty(), count: empty(), tensor: empty() });
    }
    const line = lines.get(key);
    const layer = report.layer[tensor];
    line.sum[layer] = (line.sum[layer] ?? 0) + value;
    line.count[layer] = (line.count[layer] ?? 0) + 1;
    line.tensor[layer] = tensor;
  }
  return [...lines.values()].map((line) => ({
    ...line,
    values: line.sum.map((sum, layer) => (sum === null ? null : sum / line.count[layer])),
  }));
};

page.lineName = (line, layer, report) =>
  line.count[layer] > 1
    ? `${report.stacks[line.stack][0]}.${layer}.${line.suffix} (mean of ${line.count[layer]})`
    : report.names[line.tensor[layer]];

page.smallMultiple = (title, lines, report, range) => {
  const make = (width) => ({
    options: {
      width,
      height: 170,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range } },
      axes: [page.axis(String, 30, { incrs: [1, 2, 5, 10, 20, 50, 100] }), page.axis(page.value, 58)],
      series: [{}, ...lines.map((_, n) => ({
        stroke: page.colour(page.lineColours[n % page.lineColours.length]), width: 1.6,
        dash: n >= page.lineColours.length ? [5, 4] : [], points: { show: lines[n].values.length < 3 },
      }))],
    },
    data: [lines[0].values.map((_, layer) => layer), ...lines.map((line) => line.values)],
  });
  const tell = (layer) =>
    layer === null
      ? "Point at it, or use the arrow keys."
      : page.shown(`Layer ${layer}: ${lines.filter((line) => line.values[layer] !== null && line.values[layer] !== undefined).map((line) => `${page.nameInLayer(line)} ${page.value(line.values[layer])}`).join(", ") || "no such tensor"}`);
  const chart = page.chart(`${title} by layer`, make, tell);
  const names = lines.length > 1 ? page.legend(lines.map((line, n) => [page.lineColours[n % page.lineColours.length], page.nameInLayer(line), "", n >= page.lineColours.length ? "dashed" : "line"])) : null;
  return page.element("div", {}, page.element("h4", {}, title), chart.element, names);
};

page.nameInLayer = (line) => line.suffix.replace(/\.weight$/, "").replace(`${line.part}.`, "") || line.suffix;

/* All drawings of one series. picked(tensor) is called from the map. */
page.layerDrawings = (report, series, name, picked) => {
  const lines = page.layerLines(report, series);
  if (!lines.length) return [page.element("p", { class: "note" }, "No tensor in layers has this number.")];
  const numbers = lines.flatMap((line) => line.values.filter((value) => value !== null));
  const low = Math.min(...numbers);
  const high = Math.max(...numbers);
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  const range = [low >= 0 && low < (high - low) ? 0 : low - margin, high + margin];
  const drawn = [];
  report.stacks.forEach(([prefix], stack) => {
    const own = lines.filter((line) => line.stack === stack);
    if (!own.length) return;
    const parts = page.grouped(own, (line) => line.part);
    drawn.push(
      page.element("h3", {}, name, page.element("span", { class: "dim" }, `  ${prefix}`)),
      page.element("div", { class: "small-multiples" }, [...parts].map(([part, members]) => page.smallMultiple(part, members, report, range))),
      page.heatMap({
        label: `${name} by layer of ${prefix}`,
        rows: own.map((line) => ({ label: line.suffix.replace(/\.weight$/, ""), values: line.values })),
        heads: own[0].values.map((_, layer) => String(layer)),
        scale: page.scaleOf(own),
        tell: (row, layer) => own[row].tensor[layer] === null ? `${own[row].suffix}, layer ${layer}` : page.lineName(own[row], layer, report),
        picked: (row, layer) => own[row].tensor[layer] !== null && picked(own[row].tensor[layer]),
      }),
    );
  });
  return drawn;
};
