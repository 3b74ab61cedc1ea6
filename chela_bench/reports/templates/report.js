"use strict";
// Sorts and filters tables, draws samples when asked. The page is whole without this.

const make = (tag, properties, ...inside) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
};

// A second click sorts the other way; cells without a number stay last among numbers.
const sortable = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent;
    const [, number, scale] = /^(\d[\d.]*(?:e[-+]\d+)?)([kM]?)(?: [%m])?$/.exec(text) ?? [];
    return number === undefined ? text : number * ({ k: 1024, M: 1024 ** 2 }[scale] ?? 1);
  };
  heads.forEach((head, column) => {
    const button = make("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const rows = [...body.rows].sort((left, right) => {
        const a = key(left, column), b = key(right, column);
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return sign * (a > b ? 1 : a < b ? -1 : 0);
      });
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.classList.add("sorted");
      body.append(...rows);
    });
  });
};

// Every word must occur, from the start of one of the row's words: 4k finds 4k and not 64k.
const filterable = (table) => {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 2) return;
  const field = make("input", { type: "search", placeholder: "Filter" });
  field.setAttribute("aria-label", `Filter: ${table.caption.textContent}`);
  const count = make("output");
  const texts = rows.map((row) => [" ", ...row.cells].map((cell) => cell.textContent).join(" "));
  const occurs = (word, text) =>
    new RegExp("(^|[^a-z0-9])" + word.replace(/\W/g, "\\$&"), "i").test(text);
  field.addEventListener("input", () => {
    const words = field.value.split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) =>
        /^-./.test(word) ? !occurs(word.slice(1), texts[i]) : occurs(word, texts[i]));
    });
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
  table.closest(".scroll").before(make("div", { className: "filter" }, field, count));
};

const duration = (ns) => {
  const [scale, unit] = [[1e9, "s"], [1e6, "ms"], [1e3, "us"]].find(([s]) => ns >= s) ?? [1, "ns"];
  return `${(ns / scale).toPrecision(4)} ${unit}`;
};

// Left in the order taken, right how many lie at each time.
const draw = (svg, values) => {
  const ordered = [...values].sort((a, b) => a - b);
  const [low, high] = [ordered[0], ordered.at(-1)], median = ordered[ordered.length >> 1];
  const y = (value) => (high > low ? 20 + (220 * (high - value)) / (high - low) : 130);
  const add = (tag, attributes, text = "") => {
    const element = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    svg.append(element);
  };
  svg.replaceChildren();
  const labels = [low, high, median].map((value) => [y(value), value]);
  labels.forEach(([at, value], i) => {
    if (labels.slice(0, i).some(([other]) => Math.abs(other - at) < 16)) return;
    add("line", { x1: 90, x2: 630, y1: at, y2: at, class: "rule" });
    add("text", { x: 82, y: at + 4, "text-anchor": "end" }, duration(value));
  });
  values.forEach((value, i) => {
    add("circle", { cx: 96 + (360 * (i + 0.5)) / values.length, cy: y(value), r: 2 });
  });
  const bins = Array(22).fill(0);
  for (const value of values) bins[Math.min(21, Math.floor((y(value) - 20) / 10))] += 1;
  const most = Math.max(...bins);
  bins.forEach((count, i) => {
    if (count) add("rect", { x: 480, y: 20.5 + 10 * i, width: (150 * count) / most, height: 9 });
  });
  return `${duration(low)} to ${duration(high)}, median ${duration(median)}`;
};

const dialog = document.querySelector("dialog");
const [heading, svg, words, close] = dialog.children;
close.addEventListener("click", () => dialog.close());

for (const cell of document.querySelectorAll("[data-samples]")) {
  const of = `${cell.parentElement.cells[1].textContent} at T = ${cell.parentElement.cells[0].textContent}`;
  const button = make("button", { type: "button" }, ...cell.childNodes);
  button.setAttribute("aria-label", `${cell.textContent} samples of ${of}`);
  cell.append(button);
  button.addEventListener("click", () => {
    const [least, ...excess] = cell.dataset.samples.split(" ").map((word) => parseInt(word, 36));
    const shown = excess.length < Number(cell.dataset.value) ? `${excess.length} of ` : "";
    heading.textContent = of;
    words.textContent = `${shown}${cell.textContent} time samples: ` +
      `${draw(svg, excess.map((value) => least + value))}. Left in the order taken, right how many.`;
    dialog.showModal();
  });
}
for (const table of document.querySelectorAll(".scroll table")) {
  filterable(table);
  sortable(table);
}
