// Every table of class "sortable": a button in each header sorts by it, a field above keeps the rows that hold its words.
(() => {
  "use strict";
  const text = (row, column) => row.cells[column].textContent.trim();
  const number = (shown) => Number(shown.replace(/,|%$/g, ""));
  const blank = (shown) => shown === "" || shown === "–";

  const order = (rows, column, sign) => {
    const keyed = rows.map((row) => [text(row, column), row]);
    const filled = keyed.filter(([shown]) => !blank(shown));
    const numeric = filled.every(([shown]) => !Number.isNaN(number(shown)));
    filled.sort(([a], [b]) => sign * (numeric ? number(a) - number(b) : a.localeCompare(b, "en")));
    return [...filled, ...keyed.filter(([shown]) => blank(shown))].map(([, row]) => row); // blanks last, either way
  };

  const enliven = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const words = rows.map((row) => row.textContent.toLowerCase());
    heads.forEach((head, column) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        body.append(...order(rows, column, down ? -1 : 1));
      });
    });
    const field = Object.assign(document.createElement("input"), { type: "search", autocomplete: "off" });
    const count = document.createElement("output");
    const label = Object.assign(document.createElement("label"), { className: "table-filter" });
    label.append("Filter rows ", field, " ", count);
    const filter = () => {
      const wanted = field.value.toLowerCase().split(/\s+/);
      rows.forEach((row, i) => (row.hidden = !wanted.every((word) => words[i].includes(word))));
      count.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    };
    field.addEventListener("input", filter);
    table.parentElement.before(label);
    filter();
  };

  document.querySelectorAll("table.sortable").forEach(enliven);
})();
