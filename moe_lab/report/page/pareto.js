// Quality against cost: the runs that are in the table, and the front of the best of them.

/** Figures that variants have, and settings that are numbers and differ. */
function plottable() {
  const numeric = SWEEP.columns.filter(({ values }) => values.some((value) => typeof value === "number"));
  const figures = numeric.map(({ key }) => split(key)).filter(([variant]) => variant && variant !== "dense");
  const settings = numeric.filter(({ setting, varies }) => setting && varies).map(({ key }) => key);
  return { figures: [...new Set(figures.map(([, name]) => name))], settings };
}

function keyOf(variant, name) {
  return COLUMNS.has(name) ? name : `${variant}/${name}`;
}

/** A column that tells a figure's format and direction. */
function columnOf(name) {
  return COLUMNS.get(name) ?? VARIANTS.map((variant) => COLUMNS.get(`${variant}/${name}`)).find(Boolean);
}

/** A run's variants as points {row, variant, x, y}. */
function pointsOf(rows, x, y) {
  const at = (variant, name, row) => {
    const value = numberOf(keyOf(variant, name), row);
    const itself = variant === "dense" && SWEEP.of_dense.includes(name);
    return value ?? (itself ? 1 : null);
  };
  return rows
    .filter((row) => SWEEP.why[row] === null) // as in the sweep's tables
    .flatMap((row) => VARIANTS.map((variant) =>
      ({ row, variant, names: [x, y], x: at(variant, x, row), y: at(variant, y, row) })))
    .filter((point) => point.x !== null && point.y !== null)
    .filter((point) => point.variant !== "dense" || !COLUMNS.has(x));
}

/** The points that no other one beats, from the best x on; `signs`: 1 where higher is better. */
function paretoFront(points, signX, signY) {
  const order = [...points].sort((a, b) => signX * (b.x - a.x) || signY * (b.y - a.y));
  const front = [];
  for (const point of order) {
    const last = front.at(-1);
    const better = !last || signY * (point.y - last.y) > 0;
    if (better || (point.x === last.x && point.y === last.y)) front.push(point);
  }
  return front;
}

/** From one choice to the next: what the next costs, still with this one's quality, then up. */
function stepLine(front, scale) {
  return front.map((point, place) =>
    place === 0
      ? `M${scale.x(point.x)} ${scale.y(point.y)}`
      : `H${scale.x(point.x)}V${scale.y(point.y)}`).join("");
}

function paretoSection(rowsNow) {
  const { figures, settings } = plottable();
  if (figures.length === 0) return null;
  const ys = figures.filter((name) => !SWEEP.costs.includes(name));
  const xs = [...SWEEP.costs.filter((name) => figures.includes(name)), ...settings, ...ys];
  const quality = figures.includes(SWEEP.quality) ? SWEEP.quality
    : figures.find((name) => columnOf(name).better > 0);
  const groups = [...SWEEP.columns.filter(({ setting, shown: place }) => setting && place !== null)
    .sort((a, b) => a.shown - b.shown).map(({ key }) => key), "variant"];
  const y = quality ?? ys[0] ?? figures[0];
  const state = { x: xs.find((name) => name !== y) ?? y, y, group: groups[0],
    variants: new Set(VARIANTS.filter((name) => name !== "dense")) };
  const marks = make("div");
  const picture = drawnToWidth((width) => paretoPicture(state, rowsNow(), Math.min(width, 980), marks));
  const named = (names) => names.map((name) => [name, SWEEP.titles[name] ?? name]);
  const set = (name) => (value) => { state[name] = value; picture.redraw(); };
  const node = section("Quality against cost",
    make("div", { class: "filters", id: "pareto-choices" },
      choice("x", named(xs), state.x, set("x")),
      choice("y", named(ys.length ? ys : figures), state.y, set("y")),
      choice("colour and shape", groups.map((key) => [key, key]), state.group, set("group")),
      variantBoxes(state, () => picture.redraw())),
    picture, marks);
  node.id = "pareto";
  node.redraw = picture.redraw;
  return node;
}

function variantBoxes(state, onchange) {
  if (state.variants.size < 2) return null;
  return make("fieldset", { class: "boxes" }, make("legend", null, "show"), [...state.variants].map((name) => {
    const input = make("input", { type: "checkbox", "data-variant": name, onchange: () => {
      if (input.checked) state.variants.add(name);
      else state.variants.delete(name);
      onchange();
    } });
    input.checked = true;
    return make("label", null, input, name.replace("_top_", " top-"));
  }));
}

function axisTitle(name) {
  const { better } = columnOf(name);
  const which = better > 0 ? "higher is better" : better < 0 ? "lower is better" : "";
  return [SWEEP.titles[name] ?? name, which].filter(Boolean).join(" · ");
}

function paretoPicture(state, rows, width, marks) {
  const every = pointsOf(rows, state.x, state.y);
  const points = every.filter(({ variant }) => state.variants.has(variant));
  const dense = distinct(every.filter(({ variant }) => variant === "dense"));
  if (points.length + dense.length === 0) {
    marks.replaceChildren();
    return quiet("No run in the table has both figures.");
  }
  const [columnX, columnY] = [columnOf(state.x), columnOf(state.y)];
  const height = Math.max(300, Math.min(440, 0.55 * width));
  const all = [...points, ...dense];
  const axes = frame(width, height,
    { values: all.map(({ x }) => x), format: columnX.format, title: axisTitle(state.x) },
    { values: all.map(({ y }) => y), format: columnY.format, title: axisTitle(state.y) });
  const known = columnX.better && columnY.better;
  const front = known ? paretoFront(points, columnX.better, columnY.better) : [];
  const look = looks(state, points);
  const node = draw("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `${state.y} against ${state.x}: ${points.length} points, ${front.length} on the front` },
    axes.node,
    front.length ? draw("path", { class: "front", d: stepLine(front, axes) }) : null,
    dense.map((point) => pointNode(point, axes, { path: star(9), class: "dense" }, false)),
    points.map((point) => pointNode(point, axes, look.of(point), front.includes(point))));
  roving(node);
  tellPoints(node);
  marks.replaceChildren(legend([
    ...look.items,
    ...(dense.length ? [[star(7), { class: "dense" }, "dense"]] : []),
    ...(known ? [["M-8 5H0V-5H8", { class: "front whole" },
      `Pareto front of single runs (${front.length} of ${points.length})`]] : []),
  ]), known ? "" : quiet("No front: for one of the axes, nobody can say which way is better."));
  return node;
}

/** One of each place. */
function distinct(points) {
  return [...new Map(points.map((point) => [`${point.x} ${point.y}`, point])).values()];
}

/** Colour and shape by group; a variant that is not the last one is drawn paler. */
function looks(state, points) {
  const groupOf = ({ row, variant }) => (state.group === "variant" ? variant : textOf(state.group, row));
  const names = [...new Set(points.map(groupOf))].sort(collator.compare);
  const several = new Set(points.map(({ variant }) => variant)).size > 1 && state.group !== "variant";
  const pale = (variant) => several && !/^(finetuned|quantized)/.test(variant);
  const of = (point) => {
    const { colour, shape } = markOf(names.indexOf(groupOf(point)));
    return { path: shape(5.5), fill: colour, class: pale(point.variant) ? "pale" : "full", stroke: colour };
  };
  const items = names.map((name, number) => {
    const { colour, shape } = markOf(number);
    return [shape(6), { fill: colour, class: "full" }, state.group === "variant" ? name : `${state.group}=${name}`];
  });
  if (several) {
    items.push([circle(6), { class: "pale", fill: "gray", stroke: "gray" }, "pale: compressed"]);
    items.push([circle(6), { class: "full", fill: "gray" }, "full: finetuned or quantized"]);
  }
  return { of, items };
}

function pointNode(point, scale, { path, ...attributes }, inFront) {
  const node = draw("a", {
    href: runLink(point.row), class: "point", tabindex: -1,
    "aria-label": `run ${SWEEP.runs[point.row]}, ${point.variant}`,
    transform: `translate(${scale.x(point.x).toFixed(1)} ${scale.y(point.y).toFixed(1)})`,
    "data-run": SWEEP.runs[point.row], "data-variant": point.variant, "data-x": point.x, "data-y": point.y,
    "data-front": String(inFront),
  }, draw("path", { d: path, ...attributes }));
  node.tells = () => pointLines(point, inFront);
  return node;
}

function pointLines({ row, variant, names, x, y }, inFront) {
  const figure = (name, value) => `${SWEEP.titles[name] ?? name}: ${shown(value, columnOf(name).format)}`;
  return [
    `run ${SWEEP.runs[row]} · ${variant}${inFront ? " · on the front" : ""}`,
    figure(names[0], x), figure(names[1], y),
    ...(variant === "dense" ? [] : settingsOf(row)),
  ];
}

/** The tip beside the point under the mouse, or the one that has the focus. */
function tellPoints(node) {
  const pointAt = (event) => event.target.closest(".point");
  node.addEventListener("mouseover", (event) => {
    const point = pointAt(event);
    if (point) showTip(point.tells(), event.clientX, event.clientY);
    else hideTip();
  });
  node.addEventListener("focusin", (event) => {
    const point = pointAt(event);
    const { right, bottom } = point.getBoundingClientRect();
    showTip(point.tells(), right, bottom);
  });
  for (const name of ["mouseleave", "focusout", "click"]) node.addEventListener(name, hideTip);
}

/** One stop of the tabulator for all points; arrows go from left to right. */
function roving(node) {
  const points = [...node.querySelectorAll(".point")].sort((a, b) => a.dataset.x - b.dataset.x);
  points[0]?.setAttribute("tabindex", 0);
  node.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const next = points[points.indexOf(document.activeElement) + step];
    if (!step || !next) return;
    event.preventDefault();
    document.activeElement.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
}
