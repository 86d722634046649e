/* Tensors folded: stacks, runs of equal layers, layers, parts, and tensors that come about alike. */

page.MOST_RUNS = 12; // runs of layers that are shown from the start; of more, the stack is closed
page.MOST_OUTSIDE = 16; // tensors outside of stacks that have a place each

page.general = (suffix) => suffix.replace(/(^|\.)\d+(?=\.|$)/g, "$1*");

page.suffixOf = (tensors, tensor) => {
  const [prefix] = tensors.stacks[tensors.stack[tensor]];
  return tensors.names[tensor].slice(prefix.length + String(tensors.layer[tensor]).length + 2);
};

/* A node of the fold. members: its tensors; unfold(): its children, made when they are wanted. */
page.foldNode = (kind, label, note, members, unfold) => {
  let children = null;
  return {
    kind, label, note, members, parent: null, isOpen: false, hasChildren: unfold !== null,
    children() {
      if (children === null) {
        children = unfold === null ? [] : unfold();
        for (const child of children) child.parent = this;
      }
      return children;
    },
  };
};

page.grouped = (members, keyOf) => {
  const groups = new Map();
  for (const member of members) {
    const key = keyOf(member);
    const group = groups.get(key);
    if (group) group.push(member);
    else groups.set(key, [member]);
  }
  return groups;
};

page.tensorNode = (tensors, label, members) =>
  page.foldNode("tensor", label, members.length === 1 ? "" : `${page.whole(members.length)} alike`, members, null);

page.alikeNodes = (tensors, members, nameOf) =>
  [...page.grouped(members, (tensor) => `${page.general(nameOf(tensor))} ${tensors.form[tensor]}`).values()].map(
    (alike) => page.tensorNode(tensors, alike.length === 1 ? nameOf(alike[0]) : page.general(nameOf(alike[0])), alike),
  );

page.layerNode = (tensors, prefix, layer, members) => {
  const parts = page.grouped(members, (tensor) => page.suffixOf(tensors, tensor).split(".")[0]);
  return page.foldNode("layer", `${prefix}.${layer}`, page.counted(members.length, "tensor"), members, () =>
    [...parts].map(([part, own]) =>
      own.length === 1
        ? page.tensorNode(tensors, page.suffixOf(tensors, own[0]), own)
        : page.foldNode("part", part, page.counted(own.length, "tensor"), own, () =>
            page.alikeNodes(tensors, own, (tensor) => page.suffixOf(tensors, tensor)),
          ),
    ),
  );
};

page.stackNode = (tensors, number, members) => {
  const [prefix] = tensors.stacks[number];
  const layers = [...page.grouped(members, (tensor) => tensors.layer[tensor])].sort((a, b) => a[0] - b[0]);
  const likeness = ([layer, own]) =>
    own.map((tensor) => tensors.form[tensor]).join(" ") + "|" + own.length;
  const runs = [];
  for (const entry of layers) {
    const form = likeness(entry);
    const before = runs[runs.length - 1];
    if (before && before.form === form) before.layers.push(entry);
    else runs.push({ form, layers: [entry] });
  }
  const layerNodes = (own) => own.map(([layer, list]) => page.layerNode(tensors, prefix, layer, list));
  const isFolded = runs.length > 1 && runs.length <= page.MOST_RUNS;
  const unfold = () => {
    if (!isFolded) return layerNodes(layers);
    return runs.map(({ layers: own }) => {
      if (own.length === 1) return layerNodes(own)[0];
      const all = own.flatMap(([, list]) => list);
      const name = `${prefix}.${own[0][0]}–${own[own.length - 1][0]}`;
      return page.foldNode("run", name, `${page.counted(own.length, "layer")} merged alike`, all, () => layerNodes(own));
    });
  };
  const alike = runs.length === 1 ? "merged alike" : runs.length === layers.length ? "each its own" : `in ${runs.length} runs`;
  const node = page.foldNode("stack", prefix, `${page.counted(layers.length, "layer")}, ${alike}`, members, unfold);
  node.isOpen = isFolded;
  return node;
};

/* The whole plan folded, in the order of the output. */
page.folded = (tensors) => {
  const outside = [];
  const stacks = new Map();
  const order = [];
  for (let tensor = 0; tensor < tensors.count; tensor += 1) {
    const stack = tensors.stack[tensor];
    if (stack < 0) {
      outside.push(tensor);
      order.push(tensor);
      continue;
    }
    if (!stacks.has(stack)) {
      stacks.set(stack, []);
      order.push({ stack });
    }
    stacks.get(stack).push(tensor);
  }
  const named = (tensor) => tensors.names[tensor];
  const tops = [];
  const isFew = outside.length <= page.MOST_OUTSIDE;
  for (const entry of order) {
    if (typeof entry !== "number") tops.push(page.stackNode(tensors, entry.stack, stacks.get(entry.stack)));
    else if (isFew) tops.push(page.tensorNode(tensors, named(entry), [entry]));
  }
  if (!isFew) {
    const heads = page.grouped(outside, (tensor) => named(tensor).split(".")[0]);
    for (const [head, own] of heads) {
      tops.push(page.foldNode("part", head, page.counted(own.length, "tensor"), own, () => page.alikeNodes(tensors, own, named)));
    }
  }
  return tops;
};

/* The nodes that lead to a tensor, from the outside in. */
page.pathTo = (tops, tensor) => {
  const path = [];
  let level = tops;
  while (level.length) {
    const next = level.find((node) => node.members.includes(tensor));
    if (!next) break;
    path.push(next);
    level = next.children();
  }
  return path;
};
