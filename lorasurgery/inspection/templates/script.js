(() => {
  "use strict";
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const KEPT = "lorasurgery-theme";

  function theme(value) {
    if (value === "light" || value === "dark") root.dataset.theme = value;
    else delete root.dataset.theme;
  }

  let kept = null;
  try { kept = localStorage.getItem(KEPT); } catch { /* a browser may refuse storage to a local file */ }
  theme(kept);
  root.classList.add("script");

  function themes() {
    for (const input of all("input[name=theme]")) {
      input.checked = input.value === (root.dataset.theme || "auto");
      input.addEventListener("change", () => {
        theme(input.value);
        try { localStorage.setItem(KEPT, input.value); } catch { /* as above */ }
      });
    }
  }

  function modules() {
    const table = document.getElementById("table");
    if (!table) return;
    const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
    const words = new Intl.Collator("en", { numeric: true });
    const status = document.getElementById("count"), filter = document.getElementById("filter");
    const texts = rows.map((row) => row.textContent.toLowerCase());

    function value(row, column, numeric) {
      const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
      if (!numeric) return text;
      return text === "" ? NaN : Number(text.replaceAll(",", ""));
    }

    function sort(head) {
      const numeric = head.dataset.type === "number", column = heads.indexOf(head);
      const order = numeric ? ["none", "descending", "ascending"] : ["none", "ascending", "descending"];
      const next = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const keys = new Map(rows.map((row) => [row, value(row, column, numeric)]));
      const empty = (key) => key === "" || Number.isNaN(key);
      const sorted = next === "none" ? rows : [...rows].sort((one, two) => {
        const a = keys.get(one), b = keys.get(two);
        if (empty(a) || empty(b)) return empty(a) - empty(b);
        return sign * (numeric ? a - b : words.compare(a, b));
      });
      body.append(...sorted);
    }

    function narrow() {
      const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !wanted.every((word) => texts[i].includes(word));
        shown += !row.hidden;
      });
      status.textContent = wanted.length ? `${shown} of ${rows.length} modules` : `${rows.length} modules`;
    }

    for (const head of heads) head.querySelector("button")?.addEventListener("click", () => sort(head));
    filter.addEventListener("input", narrow);
    addEventListener("hashchange", () => {
      const row = document.getElementById(location.hash.slice(1));
      if (row?.hidden) {
        filter.value = "";
        narrow();
        row.scrollIntoView();
      }
    });
  }

  function heat() {
    const section = document.getElementById("heat");
    if (!section) return;
    const readout = document.getElementById("readout"), touch = matchMedia("(hover: none)");
    const keys = all("#table thead th").map((head) => head.dataset.key ?? "spectrum");
    for (const input of all("input[name=metric]")) {
      if (input.checked) section.dataset.metric = input.value;
      input.addEventListener("change", () => { section.dataset.metric = input.value; });
    }

    function show(link) {
      const row = document.getElementById(link.hash.slice(1));
      const cell = (key) => row.cells[keys.indexOf(key)];
      const name = document.createElement("a"), facts = document.createElement("span");
      name.href = link.hash;
      name.textContent = row.cells[0].firstChild.textContent;
      facts.textContent = [["rms", "RMS"], ["norm", "norm"], ["effective", "effective rank"], ["rank", "rank"], ["ninety", "for 90 %"]]
        .filter(([key]) => cell(key).textContent)
        .map(([key, label]) => `${label} ${cell(key).textContent}`).join(" · ");
      readout.classList.add("live");
      readout.replaceChildren(name, facts, ...all("svg", row).map((svg) => svg.cloneNode(true)));
      all(".shown", section).forEach((other) => other.classList.remove("shown"));
      link.classList.add("shown");
    }

    function grid(table) {
      const lines = [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.querySelector("a")));
      const links = lines.flat().filter(Boolean);
      links.forEach((link, i) => { link.tabIndex = i ? -1 : 0; });
      const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      table.addEventListener("keydown", (event) => {
        const move = moves[event.key];
        if (!move || !event.target.closest("td a")) return;
        event.preventDefault();
        let row = lines.findIndex((line) => line.includes(event.target));
        let column = lines[row].indexOf(event.target);
        do { row += move[0]; column += move[1]; } while (lines[row] && column in lines[row] && !lines[row][column]);
        lines[row]?.[column]?.focus();
      });
      table.addEventListener("focusin", (event) => {
        if (!event.target.closest("td a")) return;
        links.forEach((link) => { link.tabIndex = link === event.target ? 0 : -1; });
        show(event.target);
      });
      table.addEventListener("mouseover", (event) => {
        const link = event.target.closest("td a");
        if (link) show(link);
      });
      table.addEventListener("click", (event) => {
        const link = event.target.closest("td a");
        if (!link || !touch.matches) return;
        event.preventDefault(); // a finger cannot point: the first tap shows, the name in the readout leads on
        show(link);
      });
    }

    all("table.map").forEach(grid);
  }

  document.addEventListener("DOMContentLoaded", () => { themes(); modules(); heat(); });
})();
