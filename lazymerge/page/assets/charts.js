/* Charts over the schedule, drawn by uPlot. */

page.chartWidth = (holder) => Math.max(240, Math.floor(holder.clientWidth));

/* A chart that follows its holder's width, the theme and the arrow keys.
   make(width) gives uPlot's options and data; tell(place) the sentence for a place on the x axis. */
page.chart = (label, make, tell) => {
  const readout = page.element("p", { class: "readout", "aria-live": "polite" });
  const holder = page.element("div", { class: "chart", tabindex: "0", role: "group", "aria-label": label });
  let chart = null;
  const say = (place) => {
    readout.textContent = place === null || place === undefined ? tell(null) : tell(place);
  };
  const draw = () => {
    if (!holder.isConnected) return;
    const { options, data } = make(page.chartWidth(holder));
    if (chart) chart.destroy();
    options.hooks = { ...options.hooks, setCursor: [(own) => say(own.cursor.idx)] };
    chart = new uPlot(options, data, holder);
  };
  holder.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 };
    if (!(event.key in steps) || !chart) return;
    event.preventDefault();
    const last = chart.data[0].length - 1;
    const now = chart.cursor.idx === null || chart.cursor.idx === undefined ? 0 : chart.cursor.idx;
    const place = Math.max(0, Math.min(last, now + steps[event.key]));
    chart.setCursor({ left: chart.valToPos(chart.data[0][place], "x"), top: 10 });
    say(place);
  });
  page.redraws.push(draw);
  let width = 0;
  new ResizeObserver(() => {
    if (width === holder.clientWidth) return;
    width = holder.clientWidth;
    draw();
  }).observe(holder);
  say(null);
  return { element: page.element("div", {}, holder, readout), draw };
};

/* Steps of an axis of memory: powers of two, so that its numbers are round. */
page.POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power);

page.axis = (format, size, more = {}) => ({
  ...more,
  stroke: page.colour("--dim"),
  grid: { stroke: page.colour("--line"), width: 1 },
  ticks: { stroke: page.colour("--line"), width: 1 },
  font: "12px system-ui, sans-serif",
  size,
  values: (chart, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick))),
});

page.MEMORY_PARTS = [
  ["reserved", "--part-0", "Python, its libraries, headers and graph"],
  ["arenas", "--part-1", "buffers of all workers"],
  ["statistics", "--part-2", "results of reductions in progress"],
  ["mapped", "--part-3", "pages of mapped inputs"],
];

/* Predicted and measured memory over the bytes moved: parts stacked, the run's residents a line. */
page.memoryData = (timeline, measured) => {
  const own = { x: [...timeline.at, timeline.moved], last: timeline.at.length - 1 };
  const also = measured
    ? measured.seconds.map((_, n) => measured.bytes_read[n] + measured.bytes_written[n])
    : [];
  const x = [...new Set([...own.x, ...also])].sort((a, b) => a - b);
  const residents = new Map(also.map((at, n) => [at, measured.resident_bytes[n]]));
  const parts = { reserved: [], arenas: [], statistics: [], mapped: [] };
  const moments = [];
  let moment = 0;
  for (const at of x) {
    while (moment < own.last && timeline.at[moment + 1] <= at) moment += 1;
    moments.push(moment);
    parts.reserved.push(timeline.reserved);
    parts.arenas.push(timeline.arenas);
    parts.statistics.push(timeline.statistics[moment] || 0);
    parts.mapped.push(timeline.mapped[moment] || 0);
  }
  const shown = page.MEMORY_PARTS.filter(([name]) => parts[name].some((size) => size > 0));
  const stacked = [];
  for (const [name] of shown) {
    const below = stacked[stacked.length - 1];
    stacked.push(parts[name].map((size, n) => size + (below ? below[n] : 0)));
  }
  return { x, shown, parts, stacked, moments, measured: x.map((at) => residents.get(at) ?? null) };
};

page.memoryChart = (timeline, measured) => {
  const found = page.memoryData(timeline, measured);
  const peak = Math.max(timeline.projected, ...(measured ? measured.resident_bytes : [0]));
  const showsLimit = timeline.limit <= peak * 3;
  const top = showsLimit ? Math.max(timeline.limit, peak) * 1.06 : peak * 1.15;
  const make = (width) => {
    const stepped = uPlot.paths.stepped({ align: 1 });
    const series = [{ label: "moved" }];
    for (const [name, colour] of [...found.shown].reverse()) {
      series.push({ label: name, stroke: page.colour(colour), fill: page.colour(colour), width: 0, paths: stepped, points: { show: false } });
    }
    series.push({ label: "limit", stroke: page.colour("--limit"), width: 2, dash: [6, 4], points: { show: false } });
    series.push({ label: "claim", stroke: page.colour("--dim"), width: 1, dash: [2, 3], points: { show: false } });
    series.push({ label: "measured", stroke: page.colour("--text"), width: 2, spanGaps: true, points: { show: false } });
    const flat = (value) => found.x.map(() => value);
    return {
      options: {
        width,
        height: 280,
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false } },
        scales: { x: { time: false, range: [0, Math.max(1, ...found.x)] }, y: { range: [0, top] } },
        axes: [page.axis(page.bytes, 36, { space: 95 }), page.axis(page.memory, 74, { incrs: page.POWERS, space: 34 })],
        series,
      },
      data: [
        found.x,
        ...[...found.stacked].reverse(),
        flat(showsLimit ? timeline.limit : null),
        flat(timeline.projected),
        found.measured,
      ],
    };
  };
  const tell = (place) => {
    if (place === null) return "Point at the chart, or use the arrow keys in it, for the numbers.";
    const sizes = found.shown.map(([name]) => `${name} ${page.memory(found.parts[name][place])}`);
    const total = found.shown.reduce((sum, [name]) => sum + found.parts[name][place], 0);
    const resident = found.measured[place];
    const also = resident === null ? "" : `; measured ${page.memory(resident)}`;
    const at = `After ${page.bytes(found.x[place])}, at ${timeline.name[found.moments[place]] ?? "the end"}`;
    return page.shown(`${at}: ${page.memory(total)} (${sizes.join(", ")})${also}`);
  };
  const chart = page.chart("Memory over the bytes moved", make, tell);
  const legend = found.shown.map(([name, colour, note]) => [colour, name, note, "block"]);
  if (showsLimit) legend.push(["--limit", "limit", page.memory(timeline.limit), "dashed"]);
  legend.push(["--dim", "the plan's claim", page.memory(timeline.projected), "dotted"]);
  if (measured) legend.push(["--text", "measured", "resident while it ran", "line"]);
  const above = showsLimit ? null : page.element("p", { class: "note" },
    `The limit, ${page.memory(timeline.limit)}, is ${(timeline.limit / timeline.projected).toFixed(0)} times the claim and above the picture.`);
  return page.element("div", {}, chart.element, page.legend(legend), above);
};

page.legend = (entries) =>
  page.element(
    "ul",
    { class: "legend" },
    entries.map(([colour, name, note, kind]) => {
      const swatch = page.element("span", { class: `swatch ${kind}`, "aria-hidden": "true" });
      swatch.style.setProperty("--swatch", `var(${colour})`);
      return page.element("li", {}, swatch, name, page.element("span", { class: "dim" }, ` ${note}`));
    }),
  );

/* What the run occupied, over its time. */
page.residentChart = (measured) => {
  const top = Math.max(1, ...measured.resident_bytes) * 1.15;
  const make = (width) => ({
    options: {
      width,
      height: 180,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range: [0, top] } },
      axes: [page.axis(page.seconds, 36, { space: 95 }), page.axis(page.memory, 84, { incrs: page.POWERS, space: 34 })],
      series: [{}, { stroke: page.colour("--accent"), width: 1.5, points: { show: false } }],
    },
    data: [measured.seconds, measured.resident_bytes],
  });
  const tell = (place) =>
    place === null
      ? "Resident memory, by second of the run."
      : `After ${page.seconds(measured.seconds[place])}: ${page.memory(measured.resident_bytes[place])}`;
  return page.chart("Resident memory of the run", make, tell).element;
};

/* How fast the run moved bytes, over its time. */
page.rateChart = (measured) => {
  const moved = measured.seconds.map((_, n) => measured.bytes_read[n] + measured.bytes_written[n]);
  const rate = moved.map((bytes, n) => {
    const time = n === 0 ? measured.seconds[0] : measured.seconds[n] - measured.seconds[n - 1];
    const before = n === 0 ? 0 : moved[n - 1];
    return time > 0 ? Math.max(0, bytes - before) / time : null;
  });
  const make = (width) => ({
    options: {
      width,
      height: 180,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false } },
      axes: [page.axis(page.seconds, 36, { space: 95 }), page.axis((size) => `${page.bytes(size)}/s`, 84)],
      series: [{}, { stroke: page.colour("--accent"), width: 1.5, spanGaps: true, points: { show: false } }],
    },
    data: [measured.seconds, rate],
  });
  const tell = (place) =>
    place === null
      ? "Read and written, by second of the run."
      : `After ${page.seconds(measured.seconds[place])}: ${page.bytes(rate[place] || 0)}/s, memory ${page.memory(measured.resident_bytes[place])}`;
  return page.chart("Bytes moved per second", make, tell).element;
};

/* Horizontal bars: [label element, text, share 0..1 of the longest, colour]. */
page.bars = (label, rows) =>
  page.element(
    "div",
    { class: "bars", role: "list", "aria-label": label },
    rows.map(([name, parts, text]) => {
      const bar = page.element("span", { class: "bar", "aria-hidden": "true" });
      for (const [share, colour] of parts) {
        const part = page.element("span", {});
        part.style.width = `${(share * 100).toFixed(2)}%`;
        part.style.background = colour;
        bar.append(part);
      }
      return page.element("div", { class: "row", role: "listitem" }, page.element("span", { class: "name" }, name), bar, page.element("span", { class: "text" }, text));
    }),
  );
