// A plan: its notes, its layers, and which experts stay.

/** What a plan leaves of each layer, by its index: the last of its edits, and the kinds of all. */
function outcomesOf(details) {
  const outcomes = new Map();
  for (const edit of details.plan?.layers ?? []) {
    const before = outcomes.get(edit.index);
    outcomes.set(edit.index, !before ? edit : {
      ...edit, edit: `${before.edit}, ${edit.edit}`, changes: before.changes || edit.changes });
  }
  return outcomes;
}

/** How many experts a layer has, as far as scores, usage or the edit tell. */
function expertsOf(details, edit) {
  const counts = [details.scores?.[edit.index]?.length ?? 0, details.usage?.[edit.index]?.length ?? 0];
  return Math.max(...counts, edit.num_experts);
}

/** "layer/expert" of everything that is kept. */
function keptSet(details) {
  return new Set([...outcomesOf(details).values()].flatMap((edit) =>
    (edit.kept ?? []).map((expert) => `${edit.index}/${expert}`)));
}

function asGrid(byLayer) {
  return Object.keys(byLayer).sort((a, b) => a - b).map((layer) => [Number(layer), byLayer[layer]]);
}

function planSection(details) {
  const { plan } = details;
  if (!plan) return section("Plan", quiet("This run's folder has no plan."));
  const { layers, searched = [], layer_order: order = [], layer_divergence: divergence = [], ...notes } = plan;
  return section("Plan",
    notesOf(notes),
    order.length ? make("p", null, `Layers in order of choice: ${order.join(", ")}`) : null,
    divergence.length ? lineChart({
      series: [{ name: "divergence", points: divergence.map((value, place) => [place + 1, value]) }],
      x: "layers chosen", y: "divergence of the model's output", marked: true }) : null,
    widthMap(details), scoreMap(details), usageMap(details),
    layerTable(layers, details, "layers of the plan"),
    searched.length ? foldable(`${searched.length} layers that were searched, not chosen`,
      () => layerTable(searched, details, "layers not chosen")) : null);
}

function notesOf(notes) {
  const pairs = Object.entries(notes);
  if (pairs.length === 0) return null;
  const text = (value) => {
    if (value === null || typeof value !== "object") return String(value);
    const words = [...new Set(Object.values(value).map((one) => JSON.stringify(one)))];
    const same = !Array.isArray(value) && words.length === 1;
    return same ? `${words[0]} for each of ${Object.keys(value).length}` : JSON.stringify(value);
  };
  return pairsOf(pairs.map(([key, value]) => [key, text(value)]));
}

function layerTable(edits, details, name) {
  const further = new Set(edits.flatMap((edit) => Object.keys(edit.cells)));
  const listOf = (items) => items?.map(textOfItem).join("  ");
  const columns = [
    ["layer", (edit) => String(edit.index)],
    ["edit", (edit) => edit.title],
    ["experts kept", (edit) => keptCell(edit, details)],
    ...[...further].map((title) => [title, (edit) => listOf(edit.cells[title])]),
    ["divergence", (edit) => listOf(edit.divergence)],
    ["module", (edit) => edit.name],
  ].filter(([title, read]) => ["layer", "edit"].includes(title) || edits.some((edit) => read(edit)));
  return tableOf(columns.map(([title]) => title), edits.map((edit) => columns.map(([title, read]) => {
    const content = read(edit);
    return ["layer", "edit", "module"].includes(title) ? content : ["list", content || MISSING];
  })), name);
}

/** A text or number of a cell, or several that belong together. */
function textOfItem(item) {
  return Array.isArray(item) ? item.map(short).join(" ") : short(item);
}

function keptCell(edit, details) {
  const { kept } = edit;
  if (!kept) return "";
  const total = expertsOf(details, edit);
  const gone = [...Array(total).keys()].filter((expert) => !kept.includes(expert));
  const number = `${kept.length}${total ? ` of ${total}` : ""}`;
  if (gone.length && gone.length < kept.length) return `${number}, without ${gone.join(" ")}`;
  return kept.length ? `${number}: ${kept.join(" ")}` : number;
}

function short(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value ?? MISSING);
}

/** What the marks of a map of experts mean, where it has some. */
function marksOf(details) {
  return scaleBar(keptSet(details).size ? "a dot: kept, a cross: removed, whichever are fewer" : "");
}

function scoreMap(details, title = scoresTitle(details)) {
  if (!details.scores) return null;
  const state = { each: true };
  const build = () => heatMap({
    grid: asGrid(details.scores), kept: keptSet(details), each: state.each, name: title,
    text: (value) => `score ${short(value)}` });
  const place = make("div", null, build());
  return make("div", { class: "map" }, make("h3", null, title),
    choice("colours", [["each", "by layer"], ["all", "over all layers"]], "each", (value) => {
      state.each = value === "each";
      place.replaceChildren(build());
    }), place, marksOf(details));
}

function scoresTitle(details) {
  const summed = [...outcomesOf(details).values()].some((edit) => edit.widths?.length);
  return summed ? "Scores of the hidden units, summed by expert" : "Scores of the experts";
}

/** The hidden units that each expert keeps, where a plan makes experts narrower. */
function widthMap(details, title = "Hidden units that stay") {
  const widths = Object.fromEntries([...outcomesOf(details).values()]
    .filter((edit) => edit.widths?.length).map((edit) => [edit.index, edit.widths]));
  if (Object.keys(widths).length === 0) return null;
  return make("div", { class: "map" }, make("h3", null, title),
    heatMap({ grid: asGrid(widths), name: title, text: (value) => `${value} hidden units` }),
    scaleBar(""));
}

function usageMap(details, title = "Usage of the experts") {
  if (!details.usage) return null;
  return make("div", { class: "map" }, make("h3", null, title),
    heatMap({ grid: asGrid(details.usage), kept: keptSet(details), name: title,
      text: (value) => `usage ${short(value)}` }),
    marksOf(details));
}
