// Which runs are looked at: words and comparisons of one text, and a choice for each setting.

const TERM = /^([^<>=!]+)(<=|>=|!=|=|<|>)(.*)$/;

/** The keys that a name means: itself, or those that end with it. */
function keysNamed(name) {
  if (COLUMNS.has(name)) return [name];
  return [...COLUMNS.keys()].filter((key) => key.endsWith(`/${name}`));
}

function asNumber(text) {
  const percent = text.endsWith("%");
  const value = Number(percent ? text.slice(0, -1) : text);
  if (text.trim() === "" || Number.isNaN(value)) return null;
  return percent ? value / 100 : value;
}

function compares(key, row, sign, wanted) {
  const number = asNumber(wanted);
  const value = valueOf(key, row);
  if (sign === "=" || sign === "!=") {
    const text = value === null ? "none" : textOf(key, row);
    const same = text.toLowerCase() === wanted.toLowerCase() || (number !== null && value === number);
    return same === (sign === "=");
  }
  if (number === null || typeof value !== "number") return false;
  return { "<": value < number, ">": value > number, "<=": value <= number, ">=": value >= number }[sign];
}

const searched = new Map(); // a run's words, made when first asked for

function wordsOf(row) {
  if (!searched.has(row)) {
    const settings = SWEEP.columns.filter(({ setting, key }) =>
      setting || ["status", "error", "job"].includes(key));
    const words = settings.map(({ key }) => textOf(key, row));
    searched.set(row, [SWEEP.runs[row], SWEEP.why[row] ?? "", ...words].join("\n").toLowerCase());
  }
  return searched.get(row);
}

/** A text's terms as tests of a run, and the names that no key has. */
function parseTerms(text) {
  const tests = [];
  const unknown = [];
  for (const raw of text.match(/(?:[^\s"]|"[^"]*"?)+/g) ?? []) {
    const term = raw.replaceAll('"', "");
    const [, name, sign, wanted] = term.match(TERM) ?? [];
    if (!name) {
      tests.push((row) => wordsOf(row).includes(term.toLowerCase()));
      continue;
    }
    const keys = keysNamed(name);
    if (keys.length === 0) unknown.push(name);
    else tests.push((row) => keys.some((key) => compares(key, row, sign, wanted)));
  }
  return { tests, unknown };
}

/** The runs that meet the text and every choice; choices: key → text. */
function filtered(text, choices) {
  const { tests, unknown } = parseTerms(text);
  for (const [key, wanted] of choices) tests.push((row) => textOf(key, row) === wanted);
  return { rows: RUNS.filter((row) => tests.every((test) => test(row))), unknown };
}

/** The form: calls `onchange` after each input. */
function filterForm(state, onchange) {
  const input = make("input", {
    type: "search", id: "filter", autocomplete: "off", spellcheck: "false",
    placeholder: "words, key=value, kl<0.5, average>80%",
    oninput: () => { state.text = input.value; onchange(); },
  });
  const selects = SWEEP.columns
    .filter(({ varies, key, texts }) => (varies || key === "status") && texts.length > 1)
    .map((column) => choiceOf(column, state, onchange));
  const many = selects.length > 6;
  return make("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
    make("label", { class: "field wide" }, make("span", null, "filter"), input),
    selects.slice(0, many ? 5 : 6),
    many ? make("details", { class: "more" }, make("summary", null, `${selects.length - 5} more`),
      make("div", { class: "filters" }, selects.slice(5))) : null);
}

function choiceOf(column, state, onchange) {
  const order = column.texts.map((text, code) => [column.values[code], text]).sort(
    ([a], [b]) => compareValues(a, b));
  const texts = [...new Set(order.map(([, text]) => text))];
  const options = [["", "all"], ...texts.map((text) => [`=${text}`, text])];
  if (RUNS.some((row) => codeOf(column, row) < 0)) options.push([`=${MISSING}`, "none"]);
  return choice(column.key, options, "", (value) => {
    if (value) state.choices.set(column.key, value.slice(1));
    else state.choices.delete(column.key);
    onchange();
  });
}
