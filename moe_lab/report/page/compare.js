// Two runs side by side: what was asked, what came out, and which experts each kept.

async function compareView(a, b) {
  const both = [await detailsOf(a), await detailsOf(b)];
  const names = [SWEEP.runs[a], SWEEP.runs[b]];
  return [
    make("nav", { class: "top" }, make("a", { href: "#", id: "back" }, "← all runs"),
      make("a", { href: runLink(a) }, `run ${names[0]}`), make("a", { href: runLink(b) }, `run ${names[1]}`),
      make("a", { href: compareLink(b, a) }, "swap")),
    make("h1", { tabindex: -1 }, `Runs ${names[0]} and ${names[1]}`),
    [a, b].map((row) => make("p", { class: SWEEP.why[row] ? "status failed" : "status" },
      make("strong", null, `run ${SWEEP.runs[row]} `),
      make("span", { class: "badge" }, textOf("status", row)), ` ${SWEEP.why[row] ?? ""}`)),
    settingsCompared(a, b),
    figuresCompared(a, b),
    plansCompared(both, names),
    mapsCompared(both, names),
  ];
}

function compareLink(a, b) {
  return `#compare=${[a, b].map((row) => encodeURIComponent(SWEEP.runs[row])).join(",")}`;
}

function heads(a, b) {
  return [a, b].map((row) => `run ${SWEEP.runs[row]}`);
}

function settingsCompared(a, b) {
  const differ = SWEEP.columns.filter(({ setting, key }) => setting && textOf(key, a) !== textOf(key, b));
  const rows = differ.map(({ key }) => [key, textOf(key, a), textOf(key, b)]);
  return section("Settings that differ", rows.length
    ? tableOf(["setting", ...heads(a, b)], rows, "settings that differ")
    : quiet("The same was asked for."));
}

function figuresCompared(a, b) {
  const keys = figureNames([a, b]).flatMap((name) => VARIANTS.map((variant) => `${variant}/${name}`))
    .filter((key) => numberOf(key, a) !== null || numberOf(key, b) !== null);
  const same = keys.filter((key) => valueOf(key, a) === valueOf(key, b));
  const row = (key) => {
    const [kind, text] = difference(key, valueOf(key, b), valueOf(key, a));
    return [titleOf(key), ["number", textOf(key, a)], ["number", textOf(key, b)],
      [`number change ${kind}`, text || MISSING]];
  };
  const head = ["figure", ...[...heads(a, b), "difference"].map((name) => ["number", name])];
  const table = (list) => tableOf(head, list.map(row), "figures");
  return section("Figures",
    keys.length > same.length ? table(keys.filter((key) => !same.includes(key))) : quiet("No figure differs."),
    same.length ? foldable(`${same.length} figures that are the same`, () => table(same)) : null,
    quiet("Difference: the second run against the first; of shares in points, of amounts in percent."));
}

/** What two edits of a layer share: experts that both keep, and that one keeps alone. */
function overlapOf(one, other) {
  const [kept, theirs] = [one?.kept, other?.kept];
  if (!kept || !theirs) return null;
  const both = kept.filter((expert) => theirs.includes(expert));
  const onlyOne = kept.filter((expert) => !theirs.includes(expert));
  const onlyOther = theirs.filter((expert) => !kept.includes(expert));
  const union = both.length + onlyOne.length + onlyOther.length;
  return { both, onlyOne, onlyOther, share: union ? both.length / union : 1 };
}

function pairedLayers([one, other]) {
  const byIndex = [one, other].map(outcomesOf);
  const indices = [...new Set(byIndex.flatMap((map) => [...map.keys()]))].sort((a, b) => a - b);
  return indices.map((index) => [index, byIndex[0].get(index), byIndex[1].get(index)]);
}

function plansCompared(both, names) {
  const missing = names.filter((_, place) => !both[place].plan);
  if (missing.length) return section("Plans", quiet(`No plan: run ${missing.join(", run ")}.`));
  const layers = pairedLayers(both);
  const overlaps = layers.map(([, one, other]) => overlapOf(one, other)).filter(Boolean);
  const mean = overlaps.reduce((sum, { share }) => sum + share, 0) / overlaps.length;
  const list = (experts) => ["list", expertList(experts)];
  const rows = layers.map(([index, one, other]) => {
    const overlap = overlapOf(one, other);
    return [String(index), one?.edit, other?.edit,
      list(overlap?.both), list(overlap?.onlyOne), list(overlap?.onlyOther),
      ["number", overlap ? `${(100 * overlap.share).toFixed(0)} %` : MISSING]];
  });
  return section("Plans",
    layersEdited(layers, names),
    overlaps.length ? make("p", null,
      `Mean overlap of the kept experts: ${(100 * mean).toFixed(1)} % (in both / in either).`) : null,
    tableOf(["layer", ...names.map((name) => `edit in ${name}`), "kept in both",
      ...names.map((name) => `only in ${name}`), ["number", "overlap"]], rows, "plans by layer"));
}

/** Which layers both plans change, and which only one does. */
function layersEdited(layers, names) {
  const edited = (edit) => Boolean(edit?.changes);
  const where = (one, other) => layers.filter(([, a, b]) => edited(a) === one && edited(b) === other)
    .map(([index]) => index).join(", ") || "none";
  return make("p", null, `Layers edited in both: ${where(true, true)}; ` +
    `only in ${names[0]}: ${where(true, false)}; only in ${names[1]}: ${where(false, true)}.`);
}

function expertList(experts) {
  if (!experts?.length) return MISSING;
  const text = experts.join(" ");
  return experts.length > 12 ? foldable(`${experts.length} experts`, () => text) : text;
}

function mapsCompared(both, names) {
  const maps = both.flatMap((details, place) => [
    scoreMap(details, `Scores in run ${names[place]}`), usageMap(details, `Usage in run ${names[place]}`)]);
  const order = [maps[0], maps[2], maps[1], maps[3]].filter(Boolean);
  return order.length ? section("Experts", make("div", { class: "pair" }, order)) : null;
}
