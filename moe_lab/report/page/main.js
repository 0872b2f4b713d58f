// The sweep's own view, and which view the address asks for.

const sweepView = document.getElementById("sweep-view");
const otherView = document.getElementById("other-view");
const state = {
  text: "", choices: new Map(), sort: { key: RUN, descending: false }, ticked: [],
  columns: SWEEP.columns.filter(({ shown: place }) => place !== null)
    .sort((a, b) => a.shown - b.shown).map(({ key }) => key),
};

function buildSweep() {
  let rows = RUNS;
  const count = make("p", { id: "count", role: "status" });
  const compare = make("p", { id: "compare" });
  const table = runTable(state, (key) => {
    state.sort = { key, descending: state.sort.key === key && !state.sort.descending };
    table.show(rows);
    table.querySelector(`th[data-key="${CSS.escape(key)}"] button`).focus();
  });
  const plot = paretoSection(() => rows);
  const update = () => {
    const found = filtered(state.text, state.choices);
    rows = found.rows;
    const unknown = found.unknown.length ? `; no key is named ${found.unknown.join(", ")}` : "";
    count.textContent = `${rows.length} of ${RUNS.length} runs${unknown}`;
    table.show(rows);
    plot?.redraw();
  };
  state.tick = (row, on) => tick(row, on, table, compare);
  showCompare(compare);
  sweepView.append(
    ...sweepHead(), filterForm(state, update), plot ?? "",
    section("Runs", make("div", { class: "above" }, count, compare),
      foldable("columns", () => columnChooser(state, () => { table.forget(); table.show(rows); })), table),
    ...plotsBelow());
  update();
}

/** Two runs at most: a third takes the place of the first. */
function tick(row, on, table, compare) {
  state.ticked = on ? [...state.ticked, row].slice(-2) : state.ticked.filter((other) => other !== row);
  table.mark();
  showCompare(compare);
}

function showCompare(node) {
  if (state.ticked.length < 2) {
    node.replaceChildren(`tick ${state.ticked.length ? "one more run" : "two runs"} to compare`);
    return;
  }
  const names = state.ticked.map((row) => SWEEP.runs[row]);
  node.replaceChildren(make("a", { class: "button", href: compareLink(...state.ticked) },
    `compare ${names.join(" and ")}`));
}

function sweepHead() {
  const failed = RUNS.filter((row) => SWEEP.why[row] !== null).length;
  const links = SWEEP.files.map((name) => make("a", { href: `./${name}` }, name));
  const same = SWEEP.columns.filter(({ setting, varies, texts }) => setting && !varies && texts.length);
  const commits = (COLUMNS.get("commit")?.texts ?? []).map((name) => name.replace(/^(\w{12})\w+/, "$1"));
  return [
    make("h1", { tabindex: -1 }, SWEEP.title),
    make("p", { id: "facts" },
      `${RUNS.length - failed} of ${RUNS.length} runs ok`,
      failed ? make("strong", { class: "bad" }, `, ${failed} failed or unfinished`) : "",
      commits.length ? ` · commit ${commits.join(", ")}` : "",
      links.flatMap((link) => [" · ", link])),
    foldable(`${same.length} settings that are the same in all runs that have them`, () =>
      pairsOf(same.map(({ key, texts }) => [key, texts[0]]))),
  ];
}

function plotsBelow() {
  if (SWEEP.plots.length === 0) return [];
  return [section("Plots", make("div", { class: "gallery" }, pictures(SWEEP.plots)))];
}

/** The rows that an address names; null where it names none that is here. */
function rowsNamed(text) {
  try {
    const rows = text.split(",").map((name) => SWEEP.runs.indexOf(decodeURIComponent(name)));
    return rows.includes(-1) ? null : rows;
  } catch {
    return null; // a damaged address
  }
}

let left = 0; // how far the sweep's view was scrolled when it was left
let asked = 0;

async function route() {
  const mine = (asked += 1);
  const [, kind, names] = location.hash.match(/^#(run|compare)=(.+)$/) ?? [];
  const rows = kind ? rowsNamed(names) : [];
  hideTip();
  if (!kind) return showSweep();
  let content = [make("nav", { class: "top" }, make("a", { href: "#", id: "back" }, "← all runs")),
    make("h1", { tabindex: -1 }, "This page has no such run"), make("p", null, location.hash)];
  if (rows && kind === "run" && rows.length === 1) content = await runView(rows[0]);
  if (rows && kind === "compare" && rows.length === 2) content = await compareView(...rows);
  if (mine !== asked) return undefined; // another view was asked for meanwhile
  if (!sweepView.hidden) left = scrollY;
  sweepView.hidden = true;
  otherView.hidden = false;
  otherView.replaceChildren(...content.flat().filter(Boolean));
  return arrive(otherView, 0);
}

function showSweep() {
  if (sweepView.childElementCount === 0) buildSweep();
  otherView.hidden = true;
  sweepView.hidden = false;
  otherView.replaceChildren();
  arrive(sweepView, left);
}

function arrive(view, place) {
  const title = view.querySelector("h1");
  document.title = view === sweepView ? SWEEP.title : `${title.textContent} · ${SWEEP.title}`;
  title.focus({ preventScroll: true });
  scrollTo(0, place);
}

history.scrollRestoration = "manual";
addEventListener("hashchange", route);
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
route();
