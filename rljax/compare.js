"use strict";
// Tables sort by a click, or Enter, on the head of a column: numbers by value, empty cells last.
const valueOf = (row, index) => {
  const cell = row.cells[index];
  return cell.dataset.value ?? cell.textContent.trim();
};
const compare = (a, b) => {
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b, undefined, { numeric: true }) : numbers[0] - numbers[1];
};
const sort = (table, head, index) => {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((one, other) => {
    const [a, b] = [valueOf(one, index), valueOf(other, index)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return down ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows);
};
for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head, index));
    head.append(button);
  });
}
// The field above leaves only the plots and rows of metrics whose names contain what is typed.
document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.trim().toLowerCase();
  for (const shown of document.querySelectorAll("figure[data-metric], tr[data-metric]")) {
    shown.hidden = !shown.dataset.metric.toLowerCase().includes(wanted);
  }
  for (const section of document.querySelectorAll(".drawn")) {
    section.hidden = !section.querySelector("figure:not([hidden])");
  }
});
