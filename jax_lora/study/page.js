"use strict";

// Tables: a click on a column's name sorts by it, down, up, and back. Groups of rows stay together.
for (const table of document.querySelectorAll("table.sortable")) {
  const original = [...table.tBodies];
  for (const head of table.querySelectorAll("th[data-column]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, original, head));
  }
}

function sort(table, original, head) {
  const next = { descending: "ascending", ascending: null };
  const before = head.getAttribute("aria-sort");
  const order = before === null ? "descending" : next[before];
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  if (order === null) return table.append(...original);
  head.setAttribute("aria-sort", order);
  const cell = (group) => group.rows[0].cells[head.dataset.column];
  const sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => {
    const [x, y] = [cell(a), cell(b)];
    if (!head.classList.contains("number"))
      return sign * x.textContent.localeCompare(y.textContent, "en", { numeric: true });
    const [known, other] = [x, y].map((one) => "value" in one.dataset);
    if (!known || !other) return other - known; // what is missing comes last
    return sign * (x.dataset.value - y.dataset.value);
  };
  table.append(...[...original].sort(compare));
}

// Case studies: the filters are shown, and hide what does not fit.
for (const form of document.querySelectorAll("form.filters")) {
  const cases = [...form.parentElement.querySelectorAll(".case")];
  const { task, model, kind } = form.elements;
  const fits = (row) =>
    (!model.value || row.dataset.model === model.value) &&
    (!kind.value ||
      row.dataset.kind === kind.value ||
      (kind.value === "failure" && !["exact", "missing"].includes(row.dataset.kind)));
  const filter = () => {
    let count = 0;
    for (const one of cases) {
      const rows = [...one.querySelectorAll("tr[data-model]")];
      one.hidden = (task.value && one.dataset.task !== task.value) || !rows.some(fits);
      count += !one.hidden;
      for (const row of rows) row.hidden = model.value && row.dataset.model !== model.value;
    }
    form.querySelector("output").textContent = `${count} of ${cases.length} cases`;
  };
  form.hidden = false;
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
