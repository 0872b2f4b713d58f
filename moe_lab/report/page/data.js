// The sweep's figures by key and run, and the parts that are unpacked when they are looked at.

const MISSING = "–";
const SWEEP = JSON.parse(document.getElementById("sweep").textContent);
const COLUMNS = new Map(SWEEP.columns.map((column) => [column.key, column]));
const RUNS = SWEEP.runs.map((_, row) => row);
const VARIANTS = variantsOf([...COLUMNS.keys()]);
const unpacked = new Map();

function variantsOf(keys) {
  const pattern = /^(dense|compressed|finetuned|quantized)(_top_\d+)?\//;
  const found = new Set(keys.map((key) => key.match(pattern)?.[0].slice(0, -1)).filter(Boolean));
  const order = ["dense", "compressed", "finetuned", "quantized"];
  return order.flatMap((name) =>
    [...found].filter((variant) => variant === name || variant.startsWith(`${name}_top_`)));
}

/** A figure's key split at its variant; [null, key] of a key without one. */
function split(key) {
  const [head, ...rest] = key.split("/");
  return VARIANTS.includes(head) ? [head, rest.join("/")] : [null, key];
}

function codeOf(column, row) {
  return column.codes === 0 ? 0 : column.codes[row];
}

/** A run's value as it is; null where it has none. */
function valueOf(key, row) {
  const column = COLUMNS.get(key);
  const code = column ? codeOf(column, row) : -1;
  return code < 0 ? null : column.values[code];
}

/** A run's value as it is shown; a dash where it has none. */
function textOf(key, row) {
  const column = COLUMNS.get(key);
  const code = column ? codeOf(column, row) : -1;
  return code < 0 ? MISSING : column.texts[code];
}

function numberOf(key, row) {
  const value = valueOf(key, row);
  return typeof value === "number" ? value : null;
}

/** Fixed digits as Python writes them: what is exactly half goes to the even digit. */
function fixed(value, digits) {
  const scaled = Math.abs(value) * 10 ** digits;
  const half = scaled % 1 === 0.5 && Number.isInteger(value * 2 ** (digits + 1));
  if (!half) return value.toFixed(digits);
  const even = 2 * Math.round(scaled / 2);
  return ((Math.sign(value) * even) / 10 ** digits).toFixed(digits);
}

/** So many digits in all, as Python's "g" writes them. */
function general(value, digits) {
  const [mantissa, power] = value.toExponential(digits - 1).split("e").map(Number);
  if (power >= -4 && power < digits) return String(Number(value.toPrecision(digits)));
  return `${mantissa}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
}

function scaled(value, units) {
  let power = 0;
  while (Math.abs(value) >= 999.95 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${fixed(value, power ? 1 : 0)} ${units[power]}`.trim();
}

/** A number as its key's figures are shown, zero without a sign. */
function shown(value, format) {
  const text = written(value, format);
  return /[1-9]/.test(text) ? text : text.replace(/^-/, "");
}

function written(value, [kind, digits, unit]) {
  if (kind === "share") return `${fixed(100 * value, 1)} %`;
  if (kind === "count") return scaled(value, ["", "k", "M", "B", "T"]);
  if (kind === "bytes") return scaled(value, ["B", "kB", "MB", "GB", "TB"]);
  if (kind === "truth") return { 0: "no", 1: "yes" }[value] ?? `${fixed(100 * value, 0)} % yes`;
  if (kind === "general") return general(value, digits);
  return fixed(value, digits) + unit;
}

/** How far `value` is from `base`: [class, text]; shares in points, amounts in percent. */
function difference(key, value, base) {
  if (typeof value !== "number" || typeof base !== "number") return ["", ""];
  if (key.endsWith("_stderr")) return ["", ""];
  const { format, better } = COLUMNS.get(key);
  const amount = ["count", "bytes"].includes(format[0]);
  let text;
  if (amount && base !== 0) text = `${signed(100 * (value / base - 1), 1)} %`;
  else if (format[0] === "share") text = signed(100 * (value - base), 1);
  else text = signed(value - base, format[0] === "fixed" ? format[1] : 3);
  const change = Math.sign(value - base) * better;
  if (!/[1-9]/.test(text)) return ["", ""];
  return [change > 0 ? "good" : change < 0 ? "bad" : "", text];
}

function signed(value, digits) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
}

/** What a key is called where there is room for words. */
function titleOf(key) {
  const [variant, name] = split(key);
  const title = SWEEP.titles[name] ?? name;
  return variant ? `${title} (${variant.replace("_top_", " top-")})` : title;
}

function runLink(row) {
  return `#run=${encodeURIComponent(SWEEP.runs[row])}`;
}

/** The settings that differ, as key=value. */
function settingsOf(row) {
  return SWEEP.columns
    .filter((column) => column.setting && column.shown !== null && codeOf(column, row) >= 0)
    .map((column) => `${column.key}=${textOf(column.key, row)}`);
}

/** A part's value, read from the page once; null where there is none. */
async function part(name) {
  if (!name) return null;
  if (!unpacked.has(name)) unpacked.set(name, unpack(name));
  return unpacked.get(name);
}

async function unpack(name) {
  const packed = document.getElementById(`part-${name}`).textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** A run's details with its parts in place of their names. */
async function detailsOf(row) {
  const found = { ...(await part(SWEEP.details[row])) };
  for (const name of ["plan", "scores", "usage", "curve"]) found[name] = await part(found[name]);
  return found;
}

function pictures(list) {
  return list.map(({ name, link, part: hash }) => {
    if (!hash) return make("p", null, make("a", { href: link }, `${name}.png`), " (beside the page)");
    const source = document.getElementById(`picture-${hash}`).textContent;
    return make("figure", null,
      make("a", { href: link },
        make("img", { src: `data:image/png;base64,${source}`, alt: name })),
      make("figcaption", null, name));
  });
}
