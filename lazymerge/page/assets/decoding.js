/* The packed tensors: names, forms and columns, as lazymerge/page/columns.py writes them. */

page.sums = (column) => {
  const found = new Float64Array(column.length);
  let total = 0;
  for (let place = 0; place < column.length; place += 1) {
    total += column[place];
    found[place] = total;
  }
  return found;
};

page.unpackedNames = (packed) => {
  const places = page.sums(packed.pattern);
  const columns = packed.numbers.map((own) => own.map((column) => page.sums(column)));
  const used = new Int32Array(packed.patterns.length);
  const names = new Array(places.length);
  for (let place = 0; place < places.length; place += 1) {
    const pattern = places[place];
    const pieces = packed.patterns[pattern];
    const row = used[pattern];
    used[pattern] += 1;
    let text = pieces[0];
    for (let n = 1; n < pieces.length; n += 1) text += columns[pattern][n - 1][row] + pieces[n];
    names[place] = text;
  }
  return names;
};

page.unpacked = async () => {
  const coded = atob(document.getElementById("packed").textContent);
  const data = new Uint8Array(coded.length);
  for (let place = 0; place < coded.length; place += 1) data[place] = coded.charCodeAt(place);
  const unpacking = new DecompressionStream("deflate-raw");
  const stream = new Blob([data]).stream().pipeThrough(unpacking);
  return JSON.parse(await new Response(stream).text());
};

/* Everything there is to know of tensors, with columns that can be indexed. */
page.tensors = async () => {
  const packed = await page.unpacked();
  const columns = ["form", "setting", "shard", "start", "stack", "layer"];
  const reads = ["read_file", "read_start", "read_name"];
  const found = { ...packed };
  for (const name of [...columns, ...reads]) found[name] = page.sums(packed[name]);
  found.count = found.form.length;
  found.names = page.unpackedNames(packed.names);
  const slots = packed.forms.map((form) => form.filter((o) => o.kind === "Read").length);
  found.firstRead = new Float64Array(found.count);
  let total = 0;
  for (let tensor = 0; tensor < found.count; tensor += 1) {
    found.firstRead[tensor] = total;
    total += slots[found.form[tensor]];
  }
  found.written = packed.forms.map((form) => page.writtenBytes(form[form.length - 1]));
  return found;
};

page.itemBits = (dtype) => {
  const bits = /(?:^BOOL$)|(\d+)/.exec(dtype);
  return bits && bits[1] ? Number(bits[1]) : 8;
};

page.writtenBytes = (write) =>
  (write.shape.reduce((product, length) => product * length, 1) * page.itemBits(write.dtype)) / 8;

/* A tensor's operations, with the places of its own data. */
page.wayOf = (tensors, tensor) => {
  const form = tensors.forms[tensors.form[tensor]];
  let slot = tensors.firstRead[tensor];
  return form.map((operation) => {
    if (operation.kind !== "Read") return operation;
    const [, folder, file] = tensors.files[tensors.read_file[slot]];
    const start = tensors.read_start[slot];
    const name = tensors.names[tensors.read_name[slot] + tensor];
    slot += 1;
    return { ...operation, folder, file, start, stop: start + operation.bytes, name };
  });
};
