// A click on a column's head sorts its table by that column, another one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
    const compare = (a, b) => (key(a) === "") - (key(b) === "") ||
      (falling ? -1 : 1) * (Number(key(a)) - Number(key(b)) || key(a).localeCompare(key(b), undefined, {numeric: true}));
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
}
