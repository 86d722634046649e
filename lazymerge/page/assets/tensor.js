/* The way of one tensor: what is read, computed and written, as a picture and as a list. */

page.shape = (shape) => (shape.length ? shape.join(" × ") : "scalar");

page.operationTitle = (operation) => {
  if (operation.kind === "Read") return `Read ${operation.model}`;
  if (operation.kind === "Write") return "Write";
  return `${operation.kind} ${operation.operation}`;
};

page.operationNote = (operation) => {
  if (operation.kind === "Read" || operation.kind === "Write") {
    return `${operation.dtype}  ${page.shape(operation.shape)}`;
  }
  if (operation.passes === undefined) return `in ${operation.dtype}`;
  return operation.passes === 1 ? "1 pass" : `${operation.passes} passes`;
};

/* dagre puts the first of equals above or below, as it comes: here the first is above. */
page.firstOnTop = (graph, operations, edges) => {
  const reads = operations.map((_, place) => place).filter((place) => operations[place].kind === "Read");
  const y = (place) => graph.node(String(place)).y;
  if (reads.length < 2 || y(reads[0]) < y(reads[reads.length - 1])) return;
  const { height } = graph.graph();
  operations.forEach((_, place) => {
    graph.node(String(place)).y = height - y(place);
  });
  for (const [from, to] of edges) {
    const edge = graph.edge(String(from), String(to));
    if (edge.isTurned) continue;
    edge.isTurned = true;
    for (const point of edge.points) point.y = height - point.y;
  }
};

/* Operations laid out by dagre, from left to right. */
page.operationPicture = (operations) => {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "LR", nodesep: 10, ranksep: 36, marginx: 4, marginy: 4 });
  graph.setDefaultEdgeLabel(() => ({}));
  operations.forEach((operation, place) => {
    const letters = Math.max(
      page.operationTitle(operation).length * 7.4,
      page.operationNote(operation).length * 6.3,
    );
    graph.setNode(String(place), { width: Math.min(260, letters + 20), height: 40 });
  });
  const edges = [];
  operations.forEach((operation, place) => {
    for (const source of operation.in || []) edges.push([source, place, ""]);
    for (const source of operation.statistics || []) edges.push([source, place, "statistic"]);
  });
  for (const [from, to] of edges) graph.setEdge(String(from), String(to));
  dagre.layout(graph);
  page.firstOnTop(graph, operations, edges);
  const drawn = page.drawn("g", { class: "operations" });
  for (const [from, to, kind] of edges) {
    const points = graph.edge(String(from), String(to)).points;
    const path = "M" + points.map((point) => `${point.x.toFixed(1)},${point.y.toFixed(1)}`).join("L");
    drawn.append(page.drawn("path", { d: path, class: `wire ${kind}` }));
  }
  operations.forEach((operation, place) => {
    const { x, y, width, height } = graph.node(String(place));
    drawn.append(
      page.drawn(
        "g",
        {
          class: `operation ${operation.kind.toLowerCase()}`,
          transform: `translate(${(x - width / 2).toFixed(1)},${(y - height / 2).toFixed(1)})`,
        },
        page.drawn("rect", { width, height, rx: 4 }),
        page.drawn("text", { x: 10, y: 17, class: "title" }, page.cut(page.operationTitle(operation), 34)),
        page.drawn("text", { x: 10, y: 32, class: "small" }, page.cut(page.operationNote(operation), 40)),
        page.drawn("title", {}, `${page.operationTitle(operation)}\n${page.operationNote(operation)}`),
      ),
    );
  });
  const { width, height } = graph.graph();
  return { drawn, width: Math.max(width, 60), height: Math.max(height, 40) };
};

page.cut = (text, most) => (text.length <= most ? text : text.slice(0, most - 1) + "…");

page.keptParameters = (parameters) =>
  Object.entries(parameters).map(([name, value]) => `${name} ${page.value(value)}`).join(", ");

page.tensorStep = (operation, tensors, tensor, data) => {
  const title = page.element("strong", {}, page.operationTitle(operation));
  if (operation.kind === "Read") {
    const rows = operation.rows === undefined ? "" : `, rearranged to ${page.whole(operation.rows)} rows`;
    return [
      title,
      ` ${operation.dtype} ${page.shape(operation.shape)}, ${page.bytes(operation.bytes)}${rows}`,
      operation.name === tensors.names[tensor]
        ? null
        : page.element("div", {}, "tensor ", page.element("code", {}, operation.name)),
      page.element("div", {}, page.element("code", {}, operation.file)),
      page.element("div", {}, `bytes ${page.whole(operation.start)} to ${page.whole(operation.stop)}`),
      page.element("div", { class: "dim" }, operation.folder),
    ];
  }
  if (operation.kind === "Write") {
    const shard = data.shards[tensors.shard[tensor]];
    const start = tensors.start[tensor];
    const stop = start + tensors.written[tensors.form[tensor]];
    return [
      title,
      ` ${operation.dtype} ${page.shape(operation.shape)}, ${page.bytes(stop - start)}`,
      page.element("div", {}, page.element("code", {}, shard.file)),
      page.element("div", {}, `bytes ${page.whole(start)} to ${page.whole(stop)}`),
    ];
  }
  const kept = page.keptParameters(operation.parameters);
  const passes = operation.passes === undefined ? "" : `, passes over its inputs: ${operation.passes}`;
  return [
    title,
    ` in ${operation.dtype}, ${page.shape(operation.shape)}${passes}`,
    kept ? page.element("div", {}, kept) : null,
  ];
};

page.settingsList = (setting) => {
  const [method, parameters, byModel] = setting;
  const shared = page.keptParameters(parameters);
  return page.element(
    "ul",
    { class: "plain" },
    page.element("li", {}, page.element("strong", {}, method), shared ? `: ${shared}` : ""),
    byModel.map(([model, values]) =>
      page.element("li", {}, `${model}: ${page.keptParameters(values) || "takes part"}`),
    ),
  );
};

/* Fills the panel beside the picture with a tensor. */
page.showTensor = (panel, tensors, tensor, data) => {
  const way = page.wayOf(tensors, tensor);
  const picture = page.operationPicture(way);
  const drawing = page.drawn(
    "svg",
    {
      viewBox: `0 0 ${picture.width} ${picture.height}`,
      width: picture.width,
      role: "img",
      "aria-label": `Operations of ${tensors.names[tensor]}`,
    },
    picture.drawn,
  );
  panel.replaceChildren(
    page.element("h3", { id: "tensor-name", tabindex: "-1" }, tensors.names[tensor]),
    page.settingsList(tensors.settings[tensors.setting[tensor]]),
    page.element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Operations" }, drawing),
    page.element(
      "ol",
      { class: "way" },
      way.map((operation) => page.element("li", {}, page.tensorStep(operation, tensors, tensor, data))),
    ),
  );
};
