/* The picture: models on the left, what is made of them in the middle, the files on the right. */

page.ROW = 34; // height of a closed node
page.GAP = 6;
page.MIDDLE = 330; // width of the middle, unless operations need more
page.SIDE = 170; // width of a model or a file
page.BETWEEN = 100; // room for the wires
page.SMALLEST_SCALE = 0.55; // below it, names cannot be read; the picture is moved instead
page.MOST_FILES = 10; // files that have a place each; of more, neighbours are drawn as one

page.fileGroups = (shards) => {
  const each = Math.ceil(shards.length / page.MOST_FILES);
  const groups = [];
  for (let first = 0; first < shards.length; first += each) {
    const own = shards.slice(first, first + each);
    const bytes = own.reduce((sum, shard) => sum + shard.bytes, 0);
    const label = own.length === 1 ? own[0].file.replace(/\.safetensors$/, "") : `files ${first + 1}–${first + own.length}`;
    groups.push({ label, bytes, count: own.length });
  }
  return { groups, groupOf: (shard) => Math.floor(shard / each) };
};

/* Bytes that a node takes from each model, in one pass, and gives to each group of files. */
page.flows = (tensors, node, models, files) => {
  if (node.flows) return node.flows;
  const from = new Array(models.length).fill(0);
  const to = new Array(files.groups.length).fill(0);
  const place = new Map(models.map((model, number) => [model.label, number]));
  for (const tensor of node.members) {
    const form = tensors.forms[tensors.form[tensor]];
    for (const operation of form) {
      if (operation.kind === "Read") from[place.get(operation.model)] += operation.bytes;
    }
    to[files.groupOf(tensors.shard[tensor])] += tensors.written[tensors.form[tensor]];
  }
  node.flows = { from, to };
  return node.flows;
};

/* Places of all nodes that can be seen. */
page.arranged = (tops, tensors) => {
  const boxes = [];
  let width = page.MIDDLE;
  const place = (node, depth, top) => {
    const box = { node, depth, top, height: page.ROW, picture: null };
    boxes.push(box);
    if (!node.isOpen) return top + page.ROW + page.GAP;
    let next = top + page.ROW;
    if (node.kind === "tensor") {
      box.picture = page.operationPicture(page.wayOf(tensors, node.members[0]));
      width = Math.max(width, box.picture.width + 2 * (depth + 1) * 12 + 12);
      next += box.picture.height + page.GAP;
    } else for (const child of node.children()) next = place(child, depth + 1, next);
    box.height = next - top;
    return next + page.GAP;
  };
  let bottom = 0;
  for (const node of tops) bottom = place(node, 0, bottom);
  return { boxes, width, height: bottom };
};

page.wire = (fromX, fromY, toX, toY) => {
  const bend = (toX - fromX) / 2;
  return `M${fromX},${fromY.toFixed(1)}C${fromX + bend},${fromY.toFixed(1)} ${toX - bend},${toY.toFixed(1)} ${toX},${toY.toFixed(1)}`;
};

page.Picture = class {
  constructor(data, tensors, shown) {
    this.models = data.models.filter((model) => model.merge === undefined);
    this.tensors = tensors;
    this.files = page.fileGroups(data.shards);
    this.shown = shown;
    this.tops = page.folded(tensors);
    this.focused = null;
    this.selected = null;
    this.view = page.drawn("g", { class: "view" });
    this.svg = page.drawn("svg", { class: "picture", role: "group", "aria-label": "Models, operations and files of the merge" }, this.view);
    this.svg.addEventListener("keydown", (event) => this.pressed(event));
    this.zooming = d3.zoom().scaleExtent([0.02, 4]).filter((event) => this.isZoom(event));
    this.zooming.on("zoom", (event) => {
      this.view.setAttribute("transform", String(event.transform));
      this.follow();
    });
    d3.select(this.svg).call(this.zooming).on("dblclick.zoom", null);
    this.draw();
  }

  /* The wheel and a finger scroll the page, unless the picture has been entered. */
  isZoom(event) {
    if (event.type === "wheel") return event.ctrlKey || event.metaKey || this.svg.contains(document.activeElement);
    if (event.type === "touchstart") return event.touches.length > 1 || this.svg.contains(document.activeElement);
    return !event.button;
  }

  draw() {
    const { boxes, width, height } = page.arranged(this.tops, this.tensors);
    this.boxes = boxes;
    const left = page.SIDE + page.BETWEEN;
    const right = left + width + page.BETWEEN;
    this.size = { width: right + page.SIDE, height: Math.max(height, this.models.length * 60, this.files.groups.length * 52) };
    const down = Math.max(0, (this.size.height - height) / 2);
    for (const box of boxes) box.top += down;
    const wires = page.drawn("g", { class: "wires", "aria-hidden": "true" });
    const ends = page.drawn("g", {});
    this.layout = { boxes, left, width, right, wires };
    this.modelColumn = this.column(ends, 0, this.models.map((m, n) => [`${m.label}  ${page.cut(m.name.split("/").pop() || m.name, 18)}`, `${page.bytes(m.bytes)}${m.is_base ? ", base" : ""}`, m.name, n]));
    this.fileColumn = this.column(ends, right, this.files.groups.map((g) => [page.cut(g.label, 24), page.bytes(g.bytes), g.label, null]));
    const middle = page.drawn("g", {});
    this.spots = new Map();
    for (const box of boxes) middle.append(this.box(box, left, width));
    this.shift = 0;
    this.view.replaceChildren(wires, ends, middle);
    if (!this.focused || !this.spots.has(this.focused)) this.focused = boxes.length ? boxes[0].node : null;
    if (this.focused) this.spots.get(this.focused).setAttribute("tabindex", "0");
    this.redrawWires();
    this.follow();
  }

  /* Models and files stay where they can be seen, however long the middle is. */
  follow() {
    const { height } = this.svg.getBoundingClientRect();
    if (!height) return;
    const now = d3.zoomTransform(this.svg);
    const most = Math.max(0, (this.size.height - Math.max(this.modelColumn.length, this.fileColumn.length) * 52) / 2);
    const wanted = now.invertY(height / 2) - this.size.height / 2;
    const shift = this.size.height * now.k > height ? Math.max(-most, Math.min(most, wanted)) : 0;
    if (Math.abs(shift - this.shift) < 0.5) return;
    this.shift = shift;
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.redrawWires();
    });
  }

  redrawWires() {
    const { boxes, left, width, right, wires } = this.layout;
    const shifted = (column) => column.map(({ drawn, x, y }) => {
      drawn.setAttribute("transform", `translate(${x},${(y + this.shift).toFixed(1)})`);
      return y + this.shift + 21;
    });
    const modelY = shifted(this.modelColumn);
    const fileY = shifted(this.fileColumn);
    wires.replaceChildren();
    wires.classList.toggle("chosen", boxes.some(({ node }) => node === this.selected));
    this.wires(wires, boxes, left, width, right, modelY, fileY);
  }

  column(holder, x, entries) {
    const height = 42;
    const step = Math.max(height + 10, Math.min(120, this.size.height / Math.max(1, entries.length)));
    const top = (this.size.height - step * entries.length) / 2;
    return entries.map(([label, note, title, model], number) => {
      const y = top + number * step + (step - height) / 2;
      const rect = page.drawn("rect", { width: page.SIDE, height, rx: 4 });
      if (model !== null) rect.style.stroke = page.modelColour(model);
      const drawn = page.drawn("g", { class: "end" }, rect,
        page.drawn("text", { x: 10, y: 18, class: "title" }, label),
        page.drawn("text", { x: 10, y: 33, class: "small" }, note),
        page.drawn("title", {}, title));
      holder.append(drawn);
      return { drawn, x, y };
    });
  }

  box({ node, depth, top, height, picture }, left, width) {
    const inset = depth * 12;
    const own = width - 2 * inset;
    const most = Math.floor((own - 40) / 7.2);
    const isLeaf = !node.hasChildren;
    const label = page.cut(node.label, Math.max(12, most - Math.ceil(node.note.length * 0.85) - 2));
    const drawn = page.drawn(
      "g",
      {
        class: `node ${node.kind}${node.isOpen ? " open" : ""}${node === this.selected ? " selected" : ""}`,
        transform: `translate(${left + inset},${top})`,
        tabindex: "-1", role: "button", "aria-expanded": String(node.isOpen),
        "aria-label": page.shown(`${node.label}, ${node.note || "one tensor"}`),
      },
      page.drawn("rect", { width: own, height, rx: 4 }),
      page.drawn("path", { class: "mark", d: node.isOpen ? "M10,14l5,6l5,-6" : "M12,11l6,5.5l-6,5.5" }),
      page.drawn("text", { x: 28, y: 22, class: "title" }, label),
      page.drawn("text", { x: own - 10, y: 22, class: "small", "text-anchor": "end" }, node.note),
      page.drawn("title", {}, `${node.label}\n${node.note}`),
    );
    if (picture) {
      picture.drawn.setAttribute("transform", `translate(12,${page.ROW})`);
      drawn.append(picture.drawn);
    }
    drawn.addEventListener("click", (event) => {
      if (event.defaultPrevented) return;
      this.toggle(node);
    });
    this.spots.set(node, drawn);
    return drawn;
  }

  wires(holder, boxes, left, width, right, modelY, fileY) {
    const total = Math.max(1, ...this.tops.map((node) => Math.max(...page.flows(this.tensors, node, this.models, this.files).from, 1)));
    const thick = (bytes) => Math.max(0.6, 9 * Math.sqrt(bytes / total));
    for (const { node, depth, top } of boxes) {
      if (node.isOpen && node.kind !== "tensor") continue;
      const { from, to } = page.flows(this.tensors, node, this.models, this.files);
      const y = top + page.ROW / 2;
      const chosen = node === this.selected ? " own" : "";
      from.forEach((bytes, model) => {
        if (!bytes) return;
        const path = page.drawn("path", { d: page.wire(page.SIDE, modelY[model], left + depth * 12, y), "stroke-width": thick(bytes).toFixed(2), class: `taken${chosen}` });
        path.style.stroke = page.modelColour(model);
        holder.append(path);
      });
      to.forEach((bytes, group) => {
        if (!bytes) return;
        holder.append(page.drawn("path", { d: page.wire(left + width - depth * 12, y, right, fileY[group]), "stroke-width": thick(bytes).toFixed(2), class: `written${chosen}` }));
      });
    }
  }

  /* The picture as a whole, as large as it can be read; it is made as high as that takes. */
  fit() {
    const wide = this.svg.getBoundingClientRect().width;
    const wanted = (this.size.height * Math.min(1.15, wide / (this.size.width + 32))) + 40;
    this.svg.style.height = `${Math.max(340, Math.min(innerHeight * 0.7, wanted)).toFixed(0)}px`;
    const { width, height } = this.svg.getBoundingClientRect();
    if (!width || !this.size) return;
    const whole = Math.min(width / (this.size.width + 32), height / (this.size.height + 32));
    const scale = Math.min(1.15, Math.max(whole, page.SMALLEST_SCALE));
    const x = Math.max(8, (width - this.size.width * scale) / 2);
    const y = Math.max(16, (height - this.size.height * scale) / 2);
    this.zooming.transform(d3.select(this.svg), d3.zoomIdentity.translate(x, y).scale(scale));
  }

  zoom(factor) {
    this.zooming.scaleBy(d3.select(this.svg), factor);
  }

  fold() {
    const close = (node) => {
      node.isOpen = false;
      if (node.hasChildren && node.kind !== "tensor") node.children().forEach(close);
    };
    this.tops.forEach(close);
    this.draw();
    this.fit();
  }

  focus(node) {
    const spot = this.spots.get(node);
    if (!spot) return;
    if (this.focused && this.spots.has(this.focused)) this.spots.get(this.focused).setAttribute("tabindex", "-1");
    this.focused = node;
    spot.setAttribute("tabindex", "0");
    spot.focus({ preventScroll: true });
    this.bringIntoView(node);
  }

  bringIntoView(node) {
    const box = this.boxes.find((each) => each.node === node);
    const { width, height } = this.svg.getBoundingClientRect();
    const now = d3.zoomTransform(this.svg);
    const y = now.applyY(box.top);
    const x = now.applyX(page.SIDE + page.BETWEEN + box.depth * 12);
    const dy = y < 20 ? 20 - y : y > height - 60 ? height / 3 - y : 0;
    const dx = x < 10 ? 10 - x : x > width - 120 ? 40 - x : 0;
    if (dx || dy) this.zooming.translateBy(d3.select(this.svg), dx / now.k, dy / now.k);
  }

  toggle(node) {
    node.isOpen = !node.isOpen;
    if (node.kind === "tensor") this.select(node, node.members[0]);
    this.draw();
    this.grow();
    if (node.kind === "tensor") this.narrow();
    this.focus(node);
  }

  /* Smaller, where a tensor's operations are wider than what there is to see them in. */
  narrow() {
    const { width } = this.svg.getBoundingClientRect();
    const now = d3.zoomTransform(this.svg);
    const scale = Math.max(page.SMALLEST_SCALE, width / (this.size.width + 32));
    if (scale >= now.k) return;
    this.zooming.scaleTo(d3.select(this.svg), scale, [0, 0]);
    const moved = d3.zoomTransform(this.svg);
    this.zooming.translateBy(d3.select(this.svg), (12 - moved.applyX(0)) / moved.k, 0);
  }

  /* Higher, where more is to be seen than there is room for. */
  grow() {
    const now = this.svg.getBoundingClientRect().height;
    const most = Math.max(now, Math.min(innerHeight * 0.7, this.size.height + 40));
    this.svg.style.height = `${most.toFixed(0)}px`;
  }

  select(node, tensor) {
    this.selected = node;
    this.shown(tensor, node.members);
  }

  /* Opens everything on the way to a tensor, and shows it. */
  reveal(tensor) {
    const path = page.pathTo(this.tops, tensor);
    if (!path.length) return;
    for (const node of path) node.isOpen = true;
    this.select(path[path.length - 1], tensor);
    this.draw();
    this.grow();
    this.narrow();
    this.focus(path[path.length - 1]);
  }

  pressed(event) {
    const node = this.focused;
    if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
    const order = this.boxes.map((box) => box.node);
    const place = order.indexOf(node);
    const isOpenable = node.hasChildren || node.kind === "tensor";
    const actions = {
      ArrowDown: () => this.focus(order[Math.min(order.length - 1, place + 1)]),
      ArrowUp: () => this.focus(order[Math.max(0, place - 1)]),
      ArrowRight: () => (isOpenable && !node.isOpen ? this.toggle(node) : this.focus(order[Math.min(order.length - 1, place + 1)])),
      ArrowLeft: () => (node.isOpen ? this.toggle(node) : node.parent && this.focus(node.parent)),
      Home: () => this.focus(order[0]),
      End: () => this.focus(order[order.length - 1]),
      Enter: () => this.toggle(node),
      " ": () => this.toggle(node),
      Escape: () => {
        if (node.isOpen) this.toggle(node);
        else if (node.parent) {
          this.toggle(node.parent);
        }
      },
      "+": () => this.zoom(1.3),
      "-": () => this.zoom(1 / 1.3),
      0: () => this.fit(),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }
};
