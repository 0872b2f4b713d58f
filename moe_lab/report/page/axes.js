// What every drawing shares: ticks, axes, and colours and shapes that all readers can tell apart.

// Okabe and Ito's colours; black is the ink, so that it is seen in the dark too.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a", "#f0e442"];
const SHAPES = [circle, square, triangle, diamond, cross, plus, turned];
const VIRIDIS = [
  "#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];

function circle(r) { return `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`; }
function square(r) { const s = 0.88 * r; return `M${-s} ${-s}h${2 * s}v${2 * s}h${-2 * s}z`; }
function triangle(r) { const s = 1.2 * r; return `M0 ${-s}L${s} ${0.8 * s}H${-s}z`; }
function turned(r) { const s = 1.2 * r; return `M0 ${s}L${s} ${-0.8 * s}H${-s}z`; }
function diamond(r) { const s = 1.25 * r; return `M0 ${-s}L${s} 0L0 ${s}L${-s} 0z`; }
function plus(r) {
  const [a, b] = [0.42 * r, 1.15 * r];
  return `M${-a} ${-b}H${a}V${-a}H${b}V${a}H${a}V${b}H${-a}V${a}H${-b}V${-a}H${-a}z`;
}
function cross(r) {
  const [a, b] = [0.55 * r, 1.15 * r];
  return `M0 ${-a}L${b - a} ${-b}L${b} ${a - b}L${a} 0L${b} ${b - a}L${b - a} ${b}L0 ${a}` +
    `L${a - b} ${b}L${-b} ${b - a}L${-a} 0L${-b} ${a - b}L${a - b} ${-b}z`;
}
function star(r) {
  const corner = (number) => {
    const [angle, radius] = [(number * Math.PI) / 5 - Math.PI / 2, number % 2 ? 0.45 * r : 1.1 * r];
    return `${(radius * Math.cos(angle)).toFixed(2)} ${(radius * Math.sin(angle)).toFixed(2)}`;
  };
  return `M${[...Array(10).keys()].map(corner).join("L")}z`;
}

function colourAt(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const channel = (colour, start) => parseInt(colour.slice(start, start + 2), 16);
  const mixed = [1, 3, 5].map((start) => {
    const [from, to] = [channel(VIRIDIS[below], start), channel(VIRIDIS[below + 1], start)];
    return Math.round(from + (place - below) * (to - from));
  });
  return `rgb(${mixed.join(",")})`;
}

/** Round numbers inside a range, about so many; `whole`: no fractions. */
function ticks(least, most, about, whole = false) {
  const rough = (most - least) / Math.max(about, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const round = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const step = whole ? Math.max(1, round) : round;
  const first = Math.ceil(least / step - 1e-9);
  const found = [];
  for (let number = first; number * step <= most + 1e-9 * step; number += 1) found.push(number * step);
  return { step, values: found };
}

/** A tick's text: the digits that its step needs. */
function tickText(value, step, format) {
  const kind = format[0];
  if (kind === "count" || kind === "bytes") return shown(value, format);
  const factor = kind === "share" ? 100 : 1;
  const digits = Math.max(0, -Math.floor(Math.log10(factor * step) + 1e-9));
  return (factor * value).toFixed(Math.min(digits, 8)).replace("-", "−") + (kind === "share" ? " %" : "");
}

/** A range with room around it. */
function padded(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const room = (most - least || Math.abs(most) || 1) * 0.06;
  return [least - room, most + room];
}

/** Scales and the drawn frame of a picture: {node, x, y}. x, y: {values, format, title, whole}. */
function frame(width, height, x, y) {
  const inside = { left: 62, right: width - 14, top: 14, bottom: height - 46 };
  const scaleOf = ([least, most], from, to) => (value) =>
    from + ((value - least) / (most - least)) * (to - from);
  const [rangeX, rangeY] = [padded(x.values), padded(y.values)];
  const [toX, toY] = [scaleOf(rangeX, inside.left, inside.right), scaleOf(rangeY, inside.bottom, inside.top)];
  const ticksX = ticks(...rangeX, (inside.right - inside.left) / 90, x.whole);
  const ticksY = ticks(...rangeY, (inside.bottom - inside.top) / 40);
  const middle = (inside.top + inside.bottom) / 2;
  const node = draw("g", { class: "axes" },
    ticksX.values.map((value) => [
      draw("line", { x1: toX(value), x2: toX(value), y1: inside.top, y2: inside.bottom }),
      draw("text", { x: toX(value), y: inside.bottom + 17, "text-anchor": "middle" },
        tickText(value, ticksX.step, x.format)),
    ]).flat(),
    ticksY.values.map((value) => [
      draw("line", { x1: inside.left, x2: inside.right, y1: toY(value), y2: toY(value) }),
      draw("text", { x: inside.left - 7, y: toY(value) + 4, "text-anchor": "end" },
        tickText(value, ticksY.step, y.format)),
    ]).flat(),
    draw("text", { class: "title", "text-anchor": "middle",
      x: (inside.left + inside.right) / 2, y: height - 8 }, x.title),
    draw("text", { class: "title", x: 14, y: middle, "text-anchor": "middle",
      transform: `rotate(-90 14 ${middle})` }, y.title));
  return { node, x: toX, y: toY };
}

/** What makes a group's mark: shape and colour go on at different paces, so that 56 differ. */
function markOf(number) {
  const round = Math.floor(number / COLOURS.length);
  return { colour: COLOURS[number % COLOURS.length], shape: SHAPES[(number + round) % SHAPES.length] };
}

/** Marks with their names below a picture; items: [path, attributes, name]. */
function legend(items) {
  return make("ul", { class: "legend" }, items.map(([path, attributes, name]) => make("li", null,
    draw("svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": "true" },
      draw("path", { d: path, ...attributes })), name)));
}
