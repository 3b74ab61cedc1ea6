"use strict";
// A click on a column's name sorts its table, a second one the other way; empty cells stay last.
for (const table of document.querySelectorAll("table.points")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const rows = [...body.rows].sort((left, right) => {
        const a = key(left, column), b = key(right, column);
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (a > b ? 1 : a < b ? -1 : 0);
      });
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.classList.add("sorted");
      body.append(...rows);
    });
  });
}
