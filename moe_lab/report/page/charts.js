// Lines over steps or layers, and heat maps of layers and experts.

/** Lines; series: {name, points: [[x, y], ...]} each. */
function lineChart({ series, x, y, format = ["fixed", 3, ""], marked = false }) {
  const drawn = series.map(({ name, points }) => ({
    name, points: points.filter(([, value]) => typeof value === "number") }))
    .filter(({ points }) => points.length);
  if (drawn.length === 0) return quiet(`No figures of ${y}.`);
  const all = drawn.flatMap(({ points }) => points);
  const dots = marked || drawn.every(({ points }) => points.length < 40);
  const picture = drawnToWidth((given) => {
    const [width, height] = [Math.min(given, 720), 280];
    const axes = frame(width, height,
      { values: all.map(([value]) => value), format: ["fixed", 0, ""], title: x, whole: true },
      { values: all.map(([, value]) => value), format, title: y });
    const node = draw("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`,
      role: "img", "aria-label": `${y} over ${x}: ${drawn.map(({ name }) => name).join(", ")}` }, axes.node);
    drawn.forEach(({ points }, number) => node.append(...lineNodes(points, number, axes, dots)));
    node.addEventListener("pointermove", (event) => tellNearest(event, node, drawn, axes, x));
    node.addEventListener("pointerleave", hideTip);
    return node;
  });
  return make("div", { class: "plot" }, picture, drawn.length > 1 ? legend(drawn.map(({ name }, number) =>
    [markOf(number).shape(6), { fill: markOf(number).colour, class: "full" }, name])) : null);
}

function lineNodes(points, number, axes, dots) {
  const { colour, shape } = markOf(number);
  const place = ([x, y]) => `${axes.x(x).toFixed(1)} ${axes.y(y).toFixed(1)}`;
  const dotted = dots || points.length === 1 ? points : [];
  return [
    draw("path", { class: "line", d: `M${points.map(place).join("L")}`, stroke: colour,
      "stroke-dasharray": ["", "7 3", "2 3", "9 3 2 3"][number % 4] || null }),
    ...dotted.map((point) => draw("path",
      { class: "full", fill: colour, d: shape(3.5), transform: `translate(${place(point)})` })),
  ];
}

function tellNearest(event, node, series, axes, title) {
  const at = event.clientX - node.getBoundingClientRect().left;
  const near = (points) => points.reduce((best, point) =>
    Math.abs(axes.x(point[0]) - at) < Math.abs(axes.x(best[0]) - at) ? point : best);
  const found = series.map(({ name, points }) => [name, near(points)]);
  const lines = found.map(([name, [x, y]]) => `${name}: ${Number(y.toPrecision(4))} (${title} ${x})`);
  showTip(lines, event.clientX, event.clientY);
}

/** A picture of numbers by layer and expert: equal colours become one path, which keeps it light.
 *
 * grid: [[layer, [value or null, ...]], ...]; kept: a set of "layer/expert" that get a dot;
 * each: whether every layer has colours of its own. */
function heatMap({ grid, kept = new Set(), each = false, name, text = (value) => String(value) }) {
  const columns = Math.max(...grid.map(([, values]) => values.length));
  return drawnToWidth((given) => {
    const left = 34;
    const size = Math.max(3, Math.min(22, (Math.min(given, 980) - left - 4) / columns));
    const row = Math.max(size, 9);
    const [width, height] = [left + columns * size + 4, grid.length * row + 34];
    const node = draw("svg", { class: "heat", width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${name}: ${grid.length} layers, ${columns} experts` },
      heatPaths(grid, each, left, size, row), markPaths(grid, kept, left, size, row),
      heatTicks(grid, columns, left, size, row));
    node.addEventListener("pointermove", (event) => {
      const box = node.getBoundingClientRect();
      const [x, y] = [(event.clientX - box.left - left) / size, (event.clientY - box.top) / row].map(Math.floor);
      const value = grid[y]?.[1][x];
      if (x < 0 || value === undefined) return hideTip();
      const [layer] = grid[y];
      const tail = kept.size ? [kept.has(`${layer}/${x}`) ? "kept" : "not kept"] : [];
      const lines = [`layer ${layer}, expert ${x}`, value === null ? MISSING : text(value), ...tail];
      return showTip(lines, event.clientX, event.clientY);
    });
    node.addEventListener("pointerleave", hideTip);
    return make("div", { class: "scroll" }, node);
  });
}

const LEVELS = 48;

function heatPaths(grid, each, left, size, row) {
  const finite = (values) => values.filter((value) => value !== null);
  const range = (values) => values.reduce(
    ([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const whole = range(grid.flatMap(([, values]) => finite(values)));
  const paths = new Map();
  grid.forEach(([, values], line) => {
    const [least, most] = each ? range(finite(values)) : whole;
    values.forEach((value, expert) => {
      const level = value === null ? -1 : Math.round(((value - least) / (most - least || 1)) * LEVELS);
      const gap = size > 6 ? 0.5 : 0;
      const [x, y] = [left + expert * size, line * row].map((place) => place.toFixed(2));
      const [wide, high] = [size - gap, row - gap].map((side) => side.toFixed(2));
      const cell = `M${x} ${y}h${wide}v${high}h-${wide}z`;
      paths.set(level, (paths.get(level) ?? "") + cell);
    });
  });
  return [...paths].map(([level, d]) => draw("path", { d, fill: level < 0 ? "gray" : colourAt(level / LEVELS) }));
}

/** Dots on what is kept, or crosses on what is not: on whichever are fewer, to leave the colours. */
function markPaths(grid, kept, left, size, row) {
  if (!kept.size) return [];
  const edited = new Set([...kept].map((name) => name.split("/")[0]));
  const cells = grid.flatMap(([layer, values], line) =>
    edited.has(String(layer)) ? values.map((_, expert) => [`${layer}/${expert}`, line, expert]) : []);
  const r = Math.min(size, row) * 0.24;
  const few = cells.filter(([name]) => kept.has(name)).length <= cells.length / 2;
  const at = (line, expert) => [left + (expert + 0.5) * size, (line + 0.5) * row];
  const wide = 2 * r;
  const dot = ([x, y]) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${wide} 0a${r} ${r} 0 1 0 ${-wide} 0z`;
  const crossed = ([x, y]) => `M${x - r} ${y - r}l${wide} ${wide}m0 ${-wide}l${-wide} ${wide}`;
  const d = cells.filter(([name]) => kept.has(name) === few)
    .map(([, line, expert]) => (few ? dot : crossed)(at(line, expert))).join("");
  return few ? [draw("path", { class: "kept", d })]
    : [draw("path", { class: "gone under", d }), draw("path", { class: "gone", d })];
}

function heatTicks(grid, columns, left, size, row) {
  const every = [1, 2, 4, 8, 16, 32].find((step) => step * size >= 22) ?? 64;
  const rows = [1, 2, 4, 8].find((step) => step * row >= 12) ?? 16;
  const bottom = grid.length * row;
  return draw("g", { class: "axes" },
    grid.map(([layer], line) => (line % rows ? null : draw("text",
      { x: left - 5, y: (line + 0.5) * row + 4, "text-anchor": "end" }, layer))),
    [...Array(columns).keys()].filter((expert) => expert % every === 0).map((expert) =>
      draw("text", { x: left + (expert + 0.5) * size, y: bottom + 13, "text-anchor": "middle" }, expert)),
    draw("text", { class: "title", x: left, y: bottom + 29 }, "expert →  (rows: layers)"));
}

/** The colours from least to most. */
function scaleBar(words) {
  const stops = VIRIDIS.map((colour, number) =>
    draw("rect", { x: number * 12, y: 0, width: 12, height: 10, fill: colour }));
  return make("p", { class: "quiet scale-bar" }, "least ",
    draw("svg", { width: 108, height: 10, "aria-hidden": "true" }, stops), words ? ` most; ${words}` : " most");
}
