// One run: its figures, stages, plan, curves, pictures, and how to make it again.

async function runView(row) {
  const details = await detailsOf(row);
  const name = SWEEP.runs[row];
  return [
    topLinks(row),
    make("h1", { tabindex: -1 }, `Run ${name}`),
    quiet(SWEEP.title),
    statusLine(row),
    settingsList(row),
    figuresSection(row),
    stagesSection(row),
    planSection(details),
    curveSection(details.curve),
    details.pictures.length
      ? section("Diagnosis", make("div", { class: "gallery" }, pictures(details.pictures))) : null,
    commandsSection(row, details),
    textsSection(details),
    filesSection(details),
  ];
}

function topLinks(row) {
  const to = (other, text) => (other in RUNS ? make("a", { href: runLink(other) }, text) : null);
  return make("nav", { class: "top" }, make("a", { href: "#", id: "back" }, "← all runs"),
    to(row - 1, "previous run"), to(row + 1, "next run"));
}

function statusLine(row) {
  const why = SWEEP.why[row];
  const error = valueOf("error", row);
  const whole = error?.trim().includes("\n") ? make("pre", { tabindex: 0 }, error) : "";
  return [make("p", { class: why ? "status failed" : "status" },
    make("span", { class: "badge" }, textOf("status", row)), why && !whole ? ` ${why}` : ""), whole];
}

function settingsList(row) {
  const there = SWEEP.columns.filter((column) => column.setting && codeOf(column, row) >= 0);
  const pairs = (columns) => pairsOf(columns.map(({ key }) => [key, textOf(key, row)]));
  const [differ, same] = [there.filter(({ varies }) => varies), there.filter(({ varies }) => !varies)];
  return section("Settings",
    differ.length ? pairs(differ) : null,
    foldable(`${same.length} settings that are the same in the whole sweep`, () => pairs(same), !differ.length));
}

/** The figures that runs have, the main ones first. */
function figureNames(rows) {
  const names = SWEEP.columns
    .filter((column) => rows.some((row) => codeOf(column, row) >= 0))
    .map(({ key }) => split(key)).filter(([variant]) => variant).map(([, name]) => name);
  const main = Object.keys(SWEEP.titles).filter((name) => names.includes(name));
  return [...new Set([...main, ...names])];
}

function figuresSection(row) {
  const there = VARIANTS.filter((variant) => SWEEP.columns.some((column) =>
    split(column.key)[0] === variant && codeOf(column, row) >= 0));
  if (there.length === 0) return section("Figures", quiet("This run has no figures."));
  const cell = (variant, name) => {
    const key = `${variant}/${name}`;
    const [kind, text] = difference(key, valueOf(key, row), valueOf(`dense/${name}`, row));
    const value = textOf(key, row);
    if (variant === "dense" || !text) return ["number", value];
    return ["number", value, make("span", { class: `change ${kind}` }, ` (${text})`)];
  };
  const worded = (name) => there.map((variant) => `${variant}/${name}`)
    .filter((key) => typeof valueOf(key, row) === "string");
  const names = figureNames([row]);
  const rows = names.filter((name) => worded(name).length === 0).map((name) =>
    [SWEEP.titles[name] ?? name, ...there.map((variant) => cell(variant, name))]);
  return section("Figures",
    tableOf(["figure", ...there.map((name) => ["number", name.replace("_top_", " top-")])], rows, "figures"),
    quiet("In brackets: difference to dense; of shares in points, of amounts in percent."),
    pairsOf(names.flatMap(worded).map((key) => [key, textOf(key, row)])));
}

function stagesSection(row) {
  const stages = SWEEP.columns.filter((column) => column.key.startsWith("seconds/") && codeOf(column, row) >= 0)
    .map(({ key }) => key.slice("seconds/".length));
  if (stages.length === 0) return null;
  const seconds = (stage) => shown(valueOf(`seconds/${stage}`, row), ["fixed", 1, " s"]);
  return section("Stages", tableOf(["stage", ["number", "took"], "cached", "result"], stages.map((stage) =>
    [stage, ["number", seconds(stage)], ...["cached", "artifact"].map((kind) => textOf(`${kind}/${stage}`, row))]),
    "stages"),
    quiet("A cached result took this long when it was made."));
}

function curveSection(curve) {
  if (!curve) return null;
  const keys = [...new Set(curve.flatMap((line) => Object.keys(line)))];
  const numeric = keys.filter((key) =>
    !["step", "tokens", "phase"].includes(key) && curve.some((line) => typeof line[key] === "number"));
  const figures = numeric.filter((key) => !key.startsWith("validation_") || !numeric.includes(key.slice(11)));
  if (figures.length === 0) return null;
  const along = "step" in curve[0] ? "step" : "tokens";
  const build = (figure) => lineChart({
    series: [figure, `validation_${figure}`].filter((key) => numeric.includes(key))
      .flatMap((key) => seriesOf(curve, along, key)),
    x: along, y: figure });
  const first = figures.includes("loss") ? "loss" : figures[0];
  const place = make("div", { id: "curve" }, build(first));
  const show = (figure) => place.replaceChildren(build(figure));
  return section("Fine-tuning",
    figures.length > 1 ? choice("figure", figures.map((key) => [key, key]), first, show) : null,
    place);
}

/** A line for each phase that has the figure. */
function seriesOf(curve, along, key) {
  const phases = [...new Set(curve.map((line) => line.phase ?? ""))];
  const has = (line, phase) => (line.phase ?? "") === phase && typeof line[key] === "number";
  return phases.map((phase) => ({
    name: [phase, key.replaceAll("_", " ")].filter(String).join(" "),
    points: curve.filter((line) => has(line, phase)).map((line) => [line[along], line[key]]),
  }));
}

function commandsSection(row, details) {
  const origin = ["commit", "fingerprint/model", "fingerprint/data"].filter((key) => valueOf(key, row) !== null)
    .map((key) => [key, textOf(key, row)]);
  return section("Make it again",
    details.commands.length ? copyable(details.commands.join("\n"), "the commands")
      : quiet("This run's folder does not say what was asked for."),
    pairsOf([...origin, ...Object.entries(details.versions)]));
}

function textsSection(details) {
  const text = (title, content, open) =>
    content ? foldable(title, () => make("pre", { tabindex: 0 }, content), open) : null;
  return section("Config and log",
    text(`overrides (${details.overrides.length})`, details.overrides.join("\n"), true),
    text("composed config", details.config, false),
    text("log", details.log, Boolean(details.log && details.log.split("\n").length < 40)),
    details.config || details.log ? null : quiet("This run's folder has neither config nor log."));
}

function filesSection(details) {
  return section("Files", make("ul", { class: "files" }, details.files.map(([name, link]) =>
    make("li", null, make("a", { href: link }, name)))));
}
