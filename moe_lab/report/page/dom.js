"use strict";
// Elements, SVG and the tip. What a report says becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function make(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** A section with its heading. */
function section(title, ...children) {
  return make("section", null, make("h2", null, title), ...children);
}

/** A remark. */
function quiet(text) {
  return make("p", { class: "quiet" }, text);
}

/** Names with what they stand for; pairs: [name, text] each. */
function pairsOf(pairs) {
  return make("dl", { class: "pairs" },
    pairs.map(([name, text]) => [make("dt", null, name), make("dd", null, text)]).flat());
}

/** What can be opened: `build` is called when it is for the first time. */
function foldable(title, build, open = false) {
  const node = make("details", { open }, make("summary", null, title));
  const show = () => {
    if (node.open && node.childElementCount === 1) node.append(...[build()].flat());
  };
  node.addEventListener("toggle", show);
  show();
  return node;
}

/** A select with its label; `options`: [value, text] each. */
function choice(label, options, chosen, onchange) {
  const select = make("select", { "aria-label": label, onchange: () => onchange(select.value) },
    options.map(([value, text]) => make("option", { value, selected: value === chosen }, text)));
  return make("label", { class: "field" }, make("span", null, label), select);
}

/** A plain table; a cell is text, a node, or [class, text]. */
function tableOf(head, rows, name) {
  const cell = (content, tag, attributes) =>
    Array.isArray(content)
      ? make(tag, { ...attributes, class: content[0] }, ...content.slice(1))
      : make(tag, attributes, content ?? MISSING);
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": name },
    make("table", { class: "plain" },
      make("thead", null,
        make("tr", null, head.map((content) => cell(content, "th", { scope: "col" })))),
      make("tbody", null, rows.map(([first, ...rest]) => make("tr", null,
        cell(first, "th", { scope: "row" }), rest.map((content) => cell(content, "td")))))));
}

/** Text to copy, with its button. */
function copyable(text, name) {
  const button = make("button", { type: "button", "aria-label": `copy ${name}` }, "copy");
  button.addEventListener("click", async () => {
    await copy(text);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  return make("div", { class: "copyable" }, make("pre", { tabindex: 0 }, text), button);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A file that was opened from disk may not have a clipboard: the older way needs a selection.
    const area = make("textarea", { readonly: true, class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

const tip = document.getElementById("tip");

/** Show lines of text beside a point of the window, inside it. */
function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((line) => make("div", null, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  const top = y + 14 + height > innerHeight ? y - 14 - height : y + 14;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function hideTip() {
  tip.hidden = true;
}

/** Draw again what depends on the width that is there. */
function drawnToWidth(render) {
  const node = make("div", { class: "drawn" });
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth === 0 || node.clientWidth === width) return;
    width = node.clientWidth;
    node.replaceChildren(render(width));
  }).observe(node);
  node.redraw = () => width && node.replaceChildren(render(width));
  return node;
}
