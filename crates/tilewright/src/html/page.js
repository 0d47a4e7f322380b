// Sorting, data-flow edges and what the mouse points at. The page reads well without it.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

for (const head of all("th[data-sort]")) {
  head.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const up = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && head.dataset.sort === "text");
    all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const compare = head.dataset.sort === "text" ? (a, b) => key(a).localeCompare(key(b)) : (a, b) => key(a) - key(b);
    const rows = [...body.rows].sort(compare);
    body.append(...(up ? rows : rows.reverse()));
  });
}

const flow = document.querySelector(".flow"), lines = flow?.querySelector("svg");
// What stands for a kernel now: its box, or the closed section that holds it.
const shown = (kernel) => {
  const scope = kernel.closest(".scope");
  return scope && !scope.open ? scope.firstElementChild : kernel.firstElementChild;
};
function draw() {
  if (!lines || lines.getBoundingClientRect().width === 0) return;
  const base = flow.getBoundingClientRect(), paths = new Map();
  const middle = (e) => { const r = e.getBoundingClientRect(); return r.top + r.height / 2 - base.top; };
  for (const kernel of all(".kernel", flow)) {
    for (const from of (kernel.dataset.after ?? "").split(" ").filter(Boolean)) {
      const source = document.getElementById("k" + from);
      if (!source) continue;
      const a = shown(source), b = shown(kernel);
      if (a === b) continue;
      const top = middle(a) + 4, bottom = middle(b) - 4, reach = Math.min(86, 10 + 14 * Math.log2(1 + (bottom - top) / 34));
      const d = `M94 ${top} C${94 - reach * 1.3} ${top} ${94 - reach * 1.3} ${bottom} 90 ${bottom}`;
      const known = paths.get(d) ?? { ends: [] };
      known.ends.push("k" + from, kernel.id);
      paths.set(d, known);
    }
  }
  for (const old of all("path.edge", lines)) old.remove();
  for (const [d, { ends }] of paths) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", d);
    path.setAttribute("class", "edge");
    path.setAttribute("marker-end", "url(#arrow)");
    path.dataset.ends = ends.join(" ");
    lines.append(path);
  }
}
draw();
addEventListener("resize", draw);
all(".flow details").forEach((d) => d.addEventListener("toggle", draw));
all("[data-open]").forEach((button) => button.addEventListener("click", () => {
  all(".flow .scope").forEach((d) => { d.open = button.dataset.open === "yes"; });
}));

const said = document.getElementById("said");
function mark(id, on) {
  all(`.point[data-k="${id}"]`).forEach((p) => p.classList.toggle("on", on));
  all("path.edge").forEach((p) => { if (p.dataset.ends.split(" ").includes(id)) p.classList.toggle("on", on); });
}
for (const e of all(".point, .kernel, tr[data-k]")) {
  const id = e.dataset.k ?? e.id;
  e.addEventListener("mouseenter", () => { mark(id, true); if (e.matches(".point")) said.textContent = e.querySelector("title").textContent; });
  e.addEventListener("mouseleave", () => mark(id, false));
}
