"use strict";
// Tabs, zoom and reading of the curves, filters, masks by step. Without this script the page shows everything at once.
(function () {
  const WIDE = 10000, HIGH = 2000, MARGIN = 0.04;
  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
  document.documentElement.classList.add("scripted");

  // --- tabs ---
  function show(tab, focus) {
    const list = tab.closest("[role=tablist]");
    for (const other of all("[role=tab]", list)) {
      const is = other === tab;
      other.setAttribute("aria-selected", is);
      other.tabIndex = is ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).classList.toggle("shown", is);
    }
    if (focus) tab.focus();
  }
  for (const list of all("[role=tablist]")) {
    const tabs = all("[role=tab]", list);
    show(tabs[0]);
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => { show(tab); history.replaceState(null, "", "#" + tab.id); });
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        show(tabs[(to + tabs.length) % tabs.length], true);
      });
    });
  }
  function follow() {
    const wanted = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!wanted) return;
    for (let panel = wanted; panel; panel = panel.parentElement && panel.parentElement.closest("[role=tabpanel]")) {
      if (panel.getAttribute("role") === "tab") { show(panel); panel = panel.closest("[role=tabpanel]") || panel; }
      if (panel.getAttribute("role") === "tabpanel") show(document.getElementById(panel.getAttribute("aria-labelledby")));
    }
  }
  window.addEventListener("hashchange", follow);

  // --- curves ---
  function number(value) {
    if (!Number.isFinite(value)) return "none";
    const size = Math.abs(value);
    if (size === 0 || (size >= 1e-3 && size < 1e6)) return size < 1e4 ? String(+value.toPrecision(4)) : Math.round(value).toLocaleString("en");
    return value.toExponential(2).replace("e+", "e");
  }
  function ticks(low, high, about, isLog) {
    if (isLog && high - low < 2.5) {
      const found = [];
      for (let power = Math.floor(low); power <= high; power += 1) for (const factor of [1, 2, 5]) found.push(power + Math.log10(factor));
      return found.filter((place) => place >= low && place <= high);
    }
    const raw = (high - low) / about;
    if (!(raw > 0)) return [low];
    const size = Math.pow(10, Math.floor(Math.log10(raw)));
    let step = [1, 2, 5, 10].map((factor) => factor * size).find((value) => value >= raw);
    if (isLog) step = Math.ceil(step);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n += 1) found.push(n * step);
    return found;
  }
  function points(path) { // of "M x y l dx dy ...", in whole numbers
    const found = [];
    let x = 0, y = 0;
    for (const part of path.matchAll(/([Ml])(-?\d+) (-?\d+)/g)) {
      x = part[1] === "M" ? +part[2] : x + +part[2];
      y = part[1] === "M" ? +part[3] : y + +part[3];
      found.push([x, y]);
    }
    return found;
  }
  const charts = [];
  function Chart(figure) {
    const area = figure.querySelector(".area"), svg = area.querySelector("svg"), reading = figure.querySelector(".reading");
    const from = { x0: +figure.dataset.x0, x1: +figure.dataset.x1, y0: +figure.dataset.y0, y1: +figure.dataset.y1 };
    const isLog = figure.dataset.log === "1", groups = all(".line", svg), cursor = svg.querySelector(".cursor");
    const lines = groups.map((group) => points(group.querySelector(".curve").getAttribute("d")));
    const bands = groups.map((group) => { const band = group.querySelector(".band"); return band ? points(band.getAttribute("d")) : []; });
    const names = all(".toggle", figure).map((button) => button.childNodes[1].textContent.trim());
    let view = { left: 0, right: WIDE, top: 0, bottom: HIGH }, at = null;
    const stepAt = (x) => from.x0 + (x / WIDE) * (from.x1 - from.x0);
    const xOf = (step) => ((step - from.x0) / (from.x1 - from.x0)) * WIDE;
    const heightAt = (y) => from.y1 - (y / HIGH) * (from.y1 - from.y0);
    const valueAt = (y) => (isLog ? Math.pow(10, heightAt(y)) : heightAt(y));

    function draw() {
      svg.setAttribute("viewBox", [view.left, view.top, view.right - view.left, view.bottom - view.top].join(" "));
      svg.querySelector(".marks").setAttribute("transform", "translate(0 " + view.top + ") scale(1 " + (view.bottom - view.top) / HIGH + ")");
      const s0 = stepAt(view.left), s1 = stepAt(view.right), h0 = heightAt(view.bottom), h1 = heightAt(view.top);
      label(figure.querySelector(".xs"), ticks(s0, s1, Math.max(2, Math.min(6, area.clientWidth / 90))), "left", (step) => ((step - s0) / (s1 - s0)) * 100, number);
      const heights = ticks(h0, h1, 5, isLog);
      label(figure.querySelector(".ys"), heights, "top", (h) => ((h1 - h) / (h1 - h0)) * 100, (h) => number(isLog ? Math.pow(10, h) : h));
      svg.querySelector(".grid").replaceChildren(...heights.map((h) => {
        const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
        line.setAttribute("d", "M" + view.left + " " + ((from.y1 - h) / (from.y1 - from.y0)) * HIGH + "H" + view.right);
        return line;
      }));
      read();
    }
    function label(box, values, side, place, text) {
      box.replaceChildren(...values.map((value) => {
        const span = document.createElement("span"), percent = place(value);
        span.style[side] = percent.toFixed(2) + "%";
        if (side === "left" && percent < 2) span.style.transform = "none";
        if (side === "left" && percent > 98) span.style.transform = "translateX(-100%)";
        span.textContent = text(value);
        return span;
      }));
    }
    function range(left, right) { // zooms the steps; the heights follow what is seen
      const width = Math.max(10, Math.min(WIDE, right - left));
      left = Math.max(0, Math.min(WIDE - width, left));
      view.left = left; view.right = left + width;
      if (width === WIDE) { view.top = 0; view.bottom = HIGH; return draw(); }
      let top = Infinity, bottom = -Infinity;
      groups.forEach((group, place) => {
        if (group.classList.contains("off")) return;
        for (const [x, y] of lines[place].concat(bands[place])) if (x >= view.left && x <= view.right) { top = Math.min(top, y); bottom = Math.max(bottom, y); }
      });
      if (top <= bottom) {
        const room = MARGIN * Math.max(1, bottom - top);
        view.top = top - room; view.bottom = bottom + room;
      }
      draw();
    }
    function read() {
      if (at === null) { cursor.setAttribute("d", ""); reading.textContent = ""; return; }
      cursor.setAttribute("d", "M" + at + " " + view.top + "V" + view.bottom);
      const words = [];
      lines.forEach((line, place) => {
        if (!line.length || groups[place].classList.contains("off")) return;
        let near = line[0];
        for (const point of line) if (Math.abs(point[0] - at) < Math.abs(near[0] - at)) near = point;
        words.push((names.length > 1 ? names[place] + " " : "") + number(valueAt(near[1])));
      });
      reading.textContent = "step " + Math.round(stepAt(at)).toLocaleString("en") + ": " + words.join(", ");
    }
    function zoom(how) {
      const centre = at === null ? (view.left + view.right) / 2 : at, width = view.right - view.left;
      const next = { in: width / 2, out: width * 2, all: WIDE }[how];
      together((chart) => chart.range(chart.xOf(stepAt(centre)) - next / 2, chart.xOf(stepAt(centre)) + next / 2));
    }
    function together(work) { // the curves of one run show the same steps
      const group = figure.id.split("-")[0];
      for (const chart of charts) if (chart.figure.id.split("-")[0] === group) work(chart);
    }
    const place = (event) => {
      const box = area.getBoundingClientRect();
      return view.left + Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * (view.right - view.left);
    };
    let begun = null;
    const choice = area.querySelector(".choice");
    area.addEventListener("pointerdown", (event) => {
      at = place(event); read();
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      begun = at; area.setPointerCapture(event.pointerId);
    });
    area.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "mouse") return;
      at = place(event); read();
      if (begun === null) return;
      const share = (x) => ((x - view.left) / (view.right - view.left)) * 100;
      choice.hidden = false;
      choice.style.left = Math.min(share(begun), share(at)) + "%";
      choice.style.width = Math.abs(share(at) - share(begun)) + "%";
    });
    area.addEventListener("pointerup", (event) => {
      if (begun === null) return;
      const end = place(event), left = stepAt(Math.min(begun, end)), right = stepAt(Math.max(begun, end));
      if (Math.abs(end - begun) > 0.01 * (view.right - view.left)) together((chart) => chart.range(chart.xOf(left), chart.xOf(right)));
      begun = null; choice.hidden = true;
    });
    area.addEventListener("pointercancel", () => { begun = null; choice.hidden = true; });
    area.addEventListener("pointerleave", () => { if (begun === null && document.activeElement !== area) { at = null; read(); } });
    area.addEventListener("dblclick", () => zoom("all"));
    area.addEventListener("keydown", (event) => {
      const width = view.right - view.left, move = { ArrowLeft: -0.02, ArrowRight: 0.02, PageUp: -0.2, PageDown: 0.2 }[event.key];
      const how = { "+": "in", "=": "in", "-": "out", 0: "all", Escape: "all" }[event.key];
      if (move !== undefined) {
        at = Math.max(0, Math.min(WIDE, (at === null ? view.left : at) + move * width));
        if (at < view.left || at > view.right) range(at - width / 2, at + width / 2); else read();
      } else if (event.key === "Home" || event.key === "End") { at = event.key === "Home" ? view.left : view.right; read(); }
      else if (how) zoom(how);
      else return;
      event.preventDefault();
    });
    for (const button of all("[data-zoom]", figure)) button.addEventListener("click", () => zoom(button.dataset.zoom));
    all(".toggle", figure).forEach((button, index) => button.addEventListener("click", () => {
      const off = groups[index].classList.toggle("off");
      button.setAttribute("aria-pressed", !off);
      range(view.left, view.right);
    }));
    new ResizeObserver(() => { if (area.clientWidth) draw(); }).observe(area); // as many ticks as there is room, once it is seen
    this.figure = figure; this.range = range; this.xOf = xOf; this.draw = draw;
  }
  for (const figure of all("figure.chart")) charts.push(new Chart(figure));

  // --- the time line's filter, the settings' search ---
  for (const filter of all(".filter")) {
    const table = filter.parentElement.querySelector("table.events");
    filter.addEventListener("change", (event) => {
      for (const row of all("tr." + event.target.dataset.kind, table)) row.hidden = !event.target.checked;
    });
  }
  for (const search of all(".search")) search.addEventListener("input", () => {
    for (const row of all("tbody tr", document.getElementById(search.dataset.table))) row.hidden = !row.textContent.toLowerCase().includes(search.value.toLowerCase());
  });

  // --- masks by step ---
  function kept(hex, grid) { // one bit a patch, the first the highest: what is gone, as runs
    let path = "";
    const gone = (patch) => !((parseInt(hex[patch >> 2], 16) >> (3 - (patch & 3))) & 1);
    for (let row = 0; row < grid; row += 1) for (let column = 0; column < grid; ) {
      let end = column;
      while (end < grid && gone(row * grid + end)) end += 1;
      if (end > column) path += "M" + column + " " + row + "h" + (end - column) + "v1h-" + (end - column) + "z";
      column = end + 1;
    }
    return path;
  }
  for (const slider of all("input.at")) slider.addEventListener("input", () => {
    const panel = slider.closest("[role=tabpanel]"), frame = +slider.value;
    panel.querySelector(".at-step").textContent = slider.dataset.steps.split(" ")[frame];
    for (const svg of all("svg.kept", panel)) svg.querySelector("path").setAttribute("d", kept(svg.dataset.kept.split(" ")[frame], +svg.dataset.grid));
    for (const svg of all("svg.scores", panel)) {
      const hex = svg.dataset.scores.split(" ")[frame];
      all("rect", svg).forEach((cell, patch) => cell.setAttribute("fill-opacity", parseInt(hex.slice(2 * patch, 2 * patch + 2), 16) / 255));
    }
  });
  follow();
})();
