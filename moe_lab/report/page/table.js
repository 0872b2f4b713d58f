// The table: a row per run, sorted by a click on a head.

const collator = new Intl.Collator("en", { numeric: true });
const ROWS = 100; // at once
const RUN = "run"; // the first column, sorted in the order of the jobs

/** Numbers as numbers and before text; what is missing is not compared but put last. */
function compareValues(a, b) {
  const numeric = [a, b].map((value) => typeof value === "number" || typeof value === "boolean");
  if (numeric[0] && numeric[1]) return a - b;
  if (numeric[0] !== numeric[1]) return numeric[0] ? -1 : 1;
  return collator.compare(a, b);
}

function sorted(rows, { key, descending }) {
  if (key === RUN) return descending ? [...rows].reverse() : rows;
  const there = rows.filter((row) => valueOf(key, row) !== null);
  const missing = rows.filter((row) => valueOf(key, row) === null);
  const values = new Map(there.map((row) => [row, valueOf(key, row)]));
  const sign = descending ? -1 : 1;
  there.sort((a, b) => sign * compareValues(values.get(a), values.get(b)) || a - b);
  return [...there, ...missing];
}

function isNumeric(key) {
  return COLUMNS.get(key)?.values.some((value) => typeof value === "number") ?? false;
}

/** The table's node; `show(rows)` puts these runs into it, `state.columns` says which keys.
 *
 * Laying out a thousand rows takes long: more come when the end of those that are there is near. */
function runTable(state, onsort) {
  const head = make("tr");
  const body = make("tbody");
  const lines = new Map(); // made once for a choice of columns, then only moved
  const more = make("button",
    { type: "button", class: "more-rows", hidden: true, onclick: () => extend(Infinity) });
  const node = make("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "runs" },
    make("table", { class: "runs" }, make("thead", null, head), body), more);
  let waiting = [];
  const extend = (number) => {
    const next = waiting.splice(0, number);
    for (const row of next) if (!lines.has(row)) lines.set(row, line(row, state));
    body.append(...next.map((row) => lines.get(row)));
    more.hidden = waiting.length === 0;
    more.textContent = `show the other ${waiting.length} rows`;
  };
  node.addEventListener("scroll", () => {
    if (waiting.length && node.scrollHeight - node.scrollTop < 2 * node.clientHeight) extend(ROWS);
  });
  node.show = (rows) => {
    head.replaceChildren(...headCells(state, onsort));
    body.replaceChildren();
    waiting = sorted(rows, state.sort).slice();
    extend(ROWS);
  };
  node.forget = () => lines.clear();
  node.mark = () => {
    for (const [row, made] of lines) made.querySelector("input").checked = state.ticked.includes(row);
  };
  return node;
}

function headCells(state, onsort) {
  const cell = (key, label) => {
    const current = state.sort.key === key;
    const order = state.sort.descending ? "descending" : "ascending";
    return make("th", { scope: "col", class: isNumeric(key) ? "number" : null,
      "aria-sort": current ? order : "none", "data-key": key },
      make("button", { type: "button", title: key, onclick: () => onsort(key) }, label));
  };
  const label = (key) => {
    const [variant, name] = split(key);
    const pieces = name.split("/").flatMap((piece, place) => (place ? ["/", make("wbr"), piece] : piece));
    return variant ? [make("small", null, variant), make("br"), ...pieces] : pieces;
  };
  return [
    make("th", { scope: "col" }, make("span", { class: "unseen" }, "compare")),
    cell(RUN, RUN),
    cell("status", "status"),
    ...state.columns.map((key) => cell(key, label(key))),
  ];
}

function line(row, state) {
  const name = SWEEP.runs[row];
  const tick = make("input", {
    type: "checkbox", "aria-label": `compare run ${name}`, "data-row": row,
    onchange: () => state.tick(row, tick.checked),
  });
  tick.checked = state.ticked.includes(row);
  return make("tr", { "data-run": name },
    make("td", null, tick),
    make("th", { scope: "row" }, make("a", { href: runLink(row) }, name)),
    statusCell(row),
    state.columns.map((key) => make("td", isNumeric(key) ? { class: "number" } : null, textOf(key, row))));
}

function statusCell(row) {
  const why = SWEEP.why[row];
  return make("td", { class: why ? "status failed" : "status" },
    make("span", { class: "badge" }, textOf("status", row)),
    why ? make("div", { class: "why", title: why }, why) : null);
}

/** Ticks for every key, by where it belongs. */
function columnChooser(state, onchange) {
  const group = (key) => split(key)[0] ?? (COLUMNS.get(key).setting ? "settings" : key.split("/")[0]);
  const groups = new Map();
  for (const key of COLUMNS.keys()) {
    if (key === "status") continue;
    const name = key.includes("/") || COLUMNS.get(key).setting ? group(key) : "job";
    groups.set(name, [...(groups.get(name) ?? []), key]);
  }
  const box = (key) => {
    const input = make("input", { type: "checkbox", "data-column": key, onchange: () => {
      state.columns = input.checked
        ? [...state.columns, key]
        : state.columns.filter((other) => other !== key);
      onchange();
    } });
    input.checked = state.columns.includes(key);
    const [variant, name] = split(key);
    return make("label", { title: key }, input, variant ? name : key);
  };
  return make("div", { class: "chooser" }, [...groups].map(([name, keys]) =>
    make("fieldset", null, make("legend", null, name), keys.map(box))));
}
