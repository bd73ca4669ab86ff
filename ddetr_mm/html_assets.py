"""Style and script of our HTML pages, see :mod:`ddetr_mm.html_page`.

They are text in Python, so that a page needs no other file, neither here nor where it is opened.
"""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --panel: #f5f6f8; --text: #1c2128; --quiet: #59636e;
  --line: #d9dee4; --strong: #0b63c5; --bar: #cfe1f7; --good: #17723a; --bad: #b3261e; --note: #fff4d6;
  --alarm: #fdeae8; --shade: 11, 99, 197;
  --s0: #1f6fb4; --s1: #c8384c; --s2: #23834a; --s3: #8452bd; --s4: #b86700; --s5: #0b8083; --s6: #ac4a86;
  --s7: #596775; --s8: #6f7d00; --s9: #96491f }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --panel: #1e232a; --text: #e7eaee;
  --quiet: #a3adb8; --line: #363d47; --strong: #7fb8ff; --bar: #234a75; --good: #6fd08c; --bad: #ff8d86;
  --note: #3a3115; --alarm: #45211f; --shade: 88, 156, 240;
  --s0: #6cb2f0; --s1: #ff8a97; --s2: #6fd08c; --s3: #c3a3f0; --s4: #ffb454; --s5: #5fd3d4; --s6: #f09ccd;
  --s7: #b4c0cc; --s8: #c9d860; --s9: #e0a070 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 60px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 40px 0 8px } h3 { font-size: 16px; margin: 20px 0 4px }
p { margin: 6px 0; overflow-wrap: anywhere } .quiet { color: var(--quiet) }
button { font: inherit; color: inherit }
:focus-visible { outline: 3px solid var(--strong); outline-offset: 2px }
.note, .alarm { background: var(--note); border-left: 4px solid #d39a00; padding: 8px 12px;
  border-radius: 4px }
.alarm { background: var(--alarm); border-color: var(--bad) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 12px;
  margin: 18px 0 }
.tiles div { background: var(--panel); border-radius: 10px; padding: 12px 14px }
.tiles b { display: block; font-size: 25px; line-height: 1.2; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
.tiles span { display: block } .tiles span, .tiles small { color: var(--quiet) }
.tiles small { font-size: 13px }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: 8px 28px; margin: 14px 0 }
.facts dt { color: var(--quiet); font-size: 13px } .facts dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto; max-width: 100%; margin: 8px 0 }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
thead th { background: var(--panel); font-weight: 600 } thead th.number { white-space: normal }
.name { text-align: left; white-space: normal; overflow-wrap: anywhere }
tbody th.name { font-weight: 500; min-width: 124px; max-width: min(340px, 42vw) }
td.name { min-width: 210px }
tr > :first-child { position: sticky; left: 0; z-index: 1; background: var(--back) }
thead tr > :first-child { background: var(--panel) }
td[style] { background: linear-gradient(var(--bar), var(--bar)) no-repeat left center / var(--share) 72% }
.better { color: var(--good) } .worse { color: var(--bad) }
.sortable th button { all: unset; cursor: pointer }
.sortable th button:focus-visible { outline: 3px solid var(--strong) }
.sortable th button::after { content: "\\2195"; color: var(--quiet); padding-left: 5px }
.sortable th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--strong) }
.sortable th[aria-sort=descending] button::after { content: "\\2193"; color: var(--strong) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 12px 36px }
figure { margin: 8px 0; min-width: 0 }
.plot { position: relative; margin: 0 22px 26px 54px }
.area { position: relative; height: 280px; border: 1px solid var(--line); touch-action: pan-y;
  cursor: crosshair; user-select: none }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden }
.chart path { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round }
.chart path.grid { stroke: var(--line); stroke-width: 1 }
.chart path.mark { stroke: var(--text); stroke-dasharray: 6 5; stroke-width: 1.5 }
.chart path.point { stroke-width: 9; stroke-linecap: round }
.chart path.dashed { stroke-dasharray: 5 4 } .chart.steps path { fill-opacity: .3; stroke-linejoin: miter }
.x-ticks span, .y-ticks span { position: absolute; font-size: 12px; color: var(--quiet); white-space: nowrap;
  font-variant-numeric: tabular-nums }
.x-ticks span { top: 100%; transform: translateX(-50%); padding-top: 3px }
.y-ticks span { right: calc(100% + 6px); transform: translateY(50%) }
.y-ticks { position: absolute; inset: 0 }
.y-label, .x-label { font-size: 13px; color: var(--quiet); margin: 0 }
.y-label { margin-bottom: 10px }
.x-label { text-align: center } .x-label output:not(:empty) { color: var(--text); padding-left: 8px }
.cursor { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--text); pointer-events: none }
.chosen { position: absolute; top: 0; bottom: 0; background: rgba(var(--shade), .22); pointer-events: none }
[hidden] { display: none !important }
.tools { display: flex; flex-wrap: wrap; gap: 6px; margin: 6px 0 }
.tools button, dialog button { border: 1px solid var(--line); background: var(--panel); border-radius: 6px;
  padding: 3px 10px; font-size: 13px; cursor: pointer }
[aria-pressed=true] { border-color: var(--strong) !important; color: var(--strong) }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 8px 0;
  font-size: 13px }
.legend li { display: flex; align-items: center; overflow-wrap: anywhere; min-width: 0 }
.legend output { font-weight: 600; padding-left: 7px; font-variant-numeric: tabular-nums }
.key { flex: none; width: 16px; height: 0; border-top: 4px solid; margin-right: 7px }
.key.dashed, .key.mark { border-top-style: dashed; border-top-width: 3px }
.key.mark { border-color: var(--text) }
.s0 { --color: var(--s0) } .s1 { --color: var(--s1) } .s2 { --color: var(--s2) }
.s3 { --color: var(--s3) } .s4 { --color: var(--s4) } .s5 { --color: var(--s5) }
.s6 { --color: var(--s6) } .s7 { --color: var(--s7) } .s8 { --color: var(--s8) }
.s9 { --color: var(--s9) }
.chart path[class^=s] { stroke: var(--color) } .key[class*=" s"] { border-color: var(--color) }
.steps path[class^=s] { fill: var(--color) }
.matrix td, .matrix th { padding: 5px 8px } .matrix td { text-align: center; min-width: 44px }
.matrix thead th { vertical-align: bottom } .matrix .wide { text-align: center }
.matrix .upright span { writing-mode: vertical-rl; transform: rotate(180deg) }
.matrix td[style] { background: rgba(var(--shade), var(--share)) } .matrix td.own { font-weight: 700 }
.matrix tbody th { text-align: right; font-weight: 500; white-space: nowrap }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 18px }
figcaption { font-size: 13px; overflow-wrap: anywhere; margin-top: 4px }
summary { cursor: pointer; padding: 8px 0; font-weight: 600 }
.enlarge { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in }
.frame { display: block; position: relative } .frame img { display: block; width: 100%; height: auto }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100% }
rect { fill: none; vector-effect: non-scaling-stroke }
rect.dark { stroke: #000; stroke-width: 4 } rect.light { stroke: #fff; stroke-width: 3 }
rect.box { stroke-width: 2 } rect.missed { stroke-dasharray: 7 4 }
.true-positive { --mark: #007a3d; stroke: var(--mark) } .missed { --mark: #7a00cc; stroke: var(--mark) }
.wrong-class { --mark: #0050e6; stroke: var(--mark) }
.false-positive { --mark: #d10000; stroke: var(--mark) }
.key.true-positive, .key.missed, .key.wrong-class, .key.false-positive { height: 13px;
  border: 4px solid var(--mark); outline: 1px solid #fff; box-shadow: 0 0 0 2px #000;
  margin: 3px 10px 3px 3px }
.key.missed { border-style: dashed }
dialog { width: 100vw; height: 100dvh; max-width: none; max-height: none; border: 0; padding: 12px;
  background: var(--back); color: var(--text) }
dialog[open] { display: flex; flex-direction: column; gap: 8px }
dialog::backdrop { background: rgba(0, 0, 0, .7) }
dialog .tools { margin: 0; align-items: center } dialog .view { flex: 1; min-height: 0; display: flex;
  align-items: center; justify-content: center }
dialog rect.dark { stroke-width: 6 } dialog rect.light { stroke-width: 4.5 }
dialog rect.box { stroke-width: 3 } dialog .frame { line-height: 0 }
dialog p { font-size: 13px; margin: 0; white-space: pre-line }
.tag { position: absolute; font-size: 13px; line-height: 1.35; padding: 1px 5px; color: #fff;
  background: var(--mark); border: 1px solid #fff; white-space: nowrap; max-width: 100% }
@media (max-width: 640px) { main { padding: 14px 12px 40px } h1 { font-size: 22px } h2 { font-size: 18px }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(100px, 1fr)); gap: 8px }
  .tiles div { padding: 9px 11px }
  .tiles b { font-size: 21px } .plot { margin-left: 48px; margin-right: 16px } .area { height: 230px }
  th, td { padding: 5px 8px } }
@media print { .tools { display: none } .scroll { overflow: visible } }
"""

SCRIPT = r"""
"use strict";
(() => {
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
let usedAt = -1e9;  // when the pointer was last on a chart: the page then waits with its reload

// --- tables: a click on a header sorts; cells without a value stay last ---

for (const button of all("table.sortable th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const isNumber = head.classList.contains("number");
  const before = head.getAttribute("aria-sort");
  const sign = before ? (before === "descending" ? 1 : -1) : (isNumber ? -1 : 1);
  const key = row => {
    const cell = row.cells[head.cellIndex];
    return isNumber ? ("value" in cell.dataset ? Number(cell.dataset.value) : null) : cell.textContent;
  };
  const compare = (a, b) => {
    const first = key(a), second = key(b);
    if (first === null || second === null) return (first === null) - (second === null);
    return sign * (isNumber ? first - second : first.localeCompare(second, undefined, {numeric: true}));
  };
  for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  body.append(...[...body.rows].sort(compare));
});

// --- charts: hovering shows values in the legend, dragging zooms ---

const SIDE = 1000;
const shown = value => value === null || value === undefined ? "–" :
  Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

function ticks(low, high, most) {
  let step = 10 ** Math.floor(Math.log10((high - low) / most));
  step *= [1, 2, 5, 10, 20].find(factor => (high - low) / (step * factor) <= most - 1);
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place <= high / step + 1e-9; place++)
    found.push(Number((place * step).toPrecision(10)));
  return found;
}

function logTicks(low, high, most) {
  for (const factors of [[1, 2, 5], [1]]) {
    const found = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++)
      for (const factor of factors) found.push(power + Math.log10(factor));
    const inside = found.filter(place => place >= low && place <= high);
    if (inside.length >= 2 && inside.length <= most) return inside;
  }
  return high - low < 1 ? [low, (low + high) / 2, high] : ticks(low, high, most);
}

function tickText(value) {
  if (value && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3))
    return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

all(".chart").forEach((figure, number) => {
  const spec = JSON.parse(figure.dataset.chart);
  const area = figure.querySelector(".area"), svg = area.querySelector("svg");
  const paths = all("path[class^=s]", svg), marks = all("path.mark", svg), grid = svg.querySelector(".grid");
  const cursor = area.querySelector(".cursor"), chosen = area.querySelector(".chosen");
  const outputs = all(".legend output", figure), across = figure.querySelector(".x-label output");
  const stored = `${location.pathname}#${number}`;
  const unit = y => spec.log ? (y > 0 ? Math.log10(y) : -Infinity) : y;
  let view = {x: spec.x, y: spec.y};
  let drawn = true;  // whether the static drawing shows this view
  let at = null;

  function draw() {
    const [x0, x1] = view.x, [y0, y1] = view.y;
    const right = x => ((x - x0) / (x1 - x0) * SIDE).toFixed(1);
    const down = y => ((y1 - Math.max(unit(y), y0)) / (y1 - y0) * SIDE).toFixed(1);
    spec.series.forEach(([xs, ys, dots], index) => {
      let path = "", penIsDown = false;
      xs.forEach((x, place) => {
        const y = ys[place];
        if (y === null) { penIsDown = false; return; }
        if (spec.step) {
          path += `M${right(x - spec.step / 2)} ${SIDE}V${down(y)}H${right(x + spec.step / 2)}V${SIDE}`;
          return;
        }
        path += `${penIsDown ? "L" : "M"}${right(x)} ${down(y)}${penIsDown ? "" : "h.1"}`;
        penIsDown = !dots;
      });
      paths[index].setAttribute("d", path);
    });
    marks.forEach((path, index) => path.setAttribute("d", `M${right(spec.marks[index])} 0V${SIDE}`));
    const xTicks = ticks(x0, x1, 6), yTicks = (spec.log ? logTicks : ticks)(y0, y1, 7);
    const label = (side, share, value) => {
      const span = document.createElement("span");
      span.style[side] = `${(share * 100).toFixed(2)}%`;
      span.textContent = tickText(value);
      return span;
    };
    figure.querySelector(".x-ticks").replaceChildren(
      ...xTicks.map(x => label("left", (x - x0) / (x1 - x0), x)));
    figure.querySelector(".y-ticks").replaceChildren(
      ...yTicks.map(y => label("bottom", (y - y0) / (y1 - y0), spec.log ? 10 ** y : y)));
    grid.setAttribute("d", xTicks.map(x => `M${right(x)} 0V${SIDE}`).join("") + yTicks.map(y =>
      `M0 ${((y1 - y) / (y1 - y0) * SIDE).toFixed(1)}H${SIDE}`).join(""));
    drawn = false;
  }

  function zoom(low, high) {
    const [x0, x1] = spec.x, smallest = (x1 - x0) / 500;
    low = Math.max(low, x0); high = Math.min(high, x1);
    if (high - low < smallest) return;
    const whole = low <= x0 && high >= x1;
    view = {x: [low, high], y: spec.y};
    if (!whole && !spec.fixed && !spec.step) {
      const inside = spec.series.flatMap(([xs, ys]) =>
        ys.filter((y, place) => y !== null && xs[place] >= low && xs[place] <= high).map(unit))
        .filter(Number.isFinite);
      const bottom = Math.min(...inside), top = Math.max(...inside);
      if (inside.length && top > bottom) view.y = [bottom - (top - bottom) * .05, top + (top - bottom) * .05];
    }
    figure.dataset.view = view.x.join(" ");
    try {
      if (whole) sessionStorage.removeItem(stored);
      else sessionStorage.setItem(stored, JSON.stringify([low, high]));
    } catch { /* a browser that stores nothing: the zoom ends with a reload */ }
    if (!whole || !drawn) draw();
    hide();
  }

  function hide() {
    at = null; cursor.hidden = true; across.textContent = "";
    for (const output of outputs) output.textContent = "";
  }

  function show(x) {
    const [x0, x1] = view.x;
    at = Math.min(Math.max(x, x0), x1);
    // The nearest point of the first series that has one decides the place of the line.
    const nearest = xs => xs.reduce((best, value, place) =>
      Math.abs(value - at) < Math.abs(xs[best] - at) ? place : best, 0);
    let place = null;
    spec.series.forEach(([xs, ys], index) => {
      if (!xs.length) return;
      const best = nearest(xs);
      if (place === null) place = xs[best];
      outputs[index].textContent = shown(ys[best]);
    });
    if (place === null) return;
    at = place;
    across.textContent = shown(place);
    cursor.style.left = `${Math.min(Math.max((place - x0) / (x1 - x0), 0), 1) * 100}%`;
    cursor.hidden = false;
  }

  const share = event => {
    const frame = area.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - frame.left) / frame.width, 0), 1);
  };
  const value = part => view.x[0] + part * (view.x[1] - view.x[0]);
  let from = null;
  area.addEventListener("pointerdown", event => {
    if (event.button) return;
    from = share(event);
    area.setPointerCapture(event.pointerId);
  });
  area.addEventListener("pointermove", event => {
    usedAt = performance.now();
    const now = share(event);
    show(value(now));
    if (from === null) return;
    chosen.hidden = Math.abs(now - from) < .02;
    chosen.style.left = `${Math.min(from, now) * 100}%`;
    chosen.style.width = `${Math.abs(now - from) * 100}%`;
  });
  area.addEventListener("pointerup", event => {
    const now = share(event), first = from;
    from = null; chosen.hidden = true;
    if (first !== null && Math.abs(now - first) >= .02)
      zoom(value(Math.min(first, now)), value(Math.max(first, now)));
  });
  area.addEventListener("pointercancel", () => { from = null; chosen.hidden = true; });
  area.addEventListener("pointerleave", () => { if (from === null) hide(); });
  area.addEventListener("dblclick", () => zoom(...spec.x));
  const scaled = factor => {
    const middle = at ?? (view.x[0] + view.x[1]) / 2, half = (view.x[1] - view.x[0]) * factor / 2;
    zoom(middle - half, middle + half);
  };
  const actions = {in: () => scaled(.5), out: () => scaled(2), all: () => zoom(...spec.x)};
  for (const button of all("[data-zoom]", figure))
    button.addEventListener("click", () => actions[button.dataset.zoom]());
  area.addEventListener("keydown", event => {
    usedAt = performance.now();
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) {
      const [xs] = spec.series.find(([points]) => points.length) ?? [[]];
      const inside = xs.filter(x => x >= view.x[0] && x <= view.x[1]);
      const place = at === null ? (step > 0 ? -1 : inside.length) : inside.indexOf(at);
      if (inside.length) show(inside[Math.min(Math.max(place + step, 0), inside.length - 1)]);
    } else if (event.key === "+") actions.in();
    else if (event.key === "-") actions.out();
    else if (event.key === "0" || event.key === "Escape") actions.all();
    else return;
    event.preventDefault();
  });
  try {
    const range = JSON.parse(sessionStorage.getItem(stored));
    if (range) zoom(...range);
  } catch { /* nothing stored */ }
});

// --- pictures: enlarged in a dialog, with labels that do not cover one another ---

const pictures = all(".enlarge");
if (pictures.length) {
  const dialog = document.createElement("dialog");
  dialog.innerHTML = '<div class="tools"><button type="button" data-go="-1">Previous</button>' +
    '<button type="button" data-go="1">Next</button>' +
    '<button type="button" data-go="labels" aria-pressed="true">Labels</button>' +
    '<button type="button" data-go="0">Close (Esc)</button></div>' +
    '<p class="title"></p><div class="view"><span class="frame"></span></div>' +
    '<p class="left quiet"></p>';
  document.body.append(dialog);
  const frame = dialog.querySelector(".frame"), view = dialog.querySelector(".view");
  let current = 0, labelled = true;

  function place() {
    const source = pictures[current].querySelector("img");
    const ratio = source.naturalWidth / source.naturalHeight;
    const width = Math.min(view.clientWidth, view.clientHeight * ratio);
    frame.style.width = `${width}px`; frame.style.height = `${width / ratio}px`;
    for (const tag of all(".tag", frame)) tag.remove();
    const taken = [];
    let left = 0;
    for (const box of all("rect.box[data-label]", frame)) {
      if (!box.dataset.label || !labelled) continue;
      const tag = document.createElement("span");
      tag.className = `tag ${box.classList[1]}`;
      tag.textContent = box.dataset.label;
      frame.append(tag);
      const size = [tag.offsetWidth, tag.offsetHeight];
      const edge = name => Number(box.getAttribute(name)) / 1000;
      const x1 = edge("x") * width, y1 = edge("y") * width / ratio;
      const x2 = x1 + edge("width") * width, y2 = y1 + edge("height") * width / ratio;
      const rows = [y1 - size[1], y1, y2, y2 - size[1], y1 - 2 * size[1], y2 + size[1], y1 - 3 * size[1],
        y2 + 2 * size[1]];
      const spot = rows.flatMap(y => [[x1, y], [x2 - size[0], y]])
        .map(([x, y]) => [Math.min(Math.max(x, 0), width - size[0]),
                          Math.min(Math.max(y, 0), width / ratio - size[1])])
        .find(([x, y]) => x >= 0 && y >= 0 && !taken.some(other =>
          x < other[2] && other[0] < x + size[0] && y < other[3] && other[1] < y + size[1]));
      if (!spot) { tag.remove(); left += 1; continue; }
      tag.style.left = `${spot[0]}px`; tag.style.top = `${spot[1]}px`;
      taken.push([spot[0], spot[1], spot[0] + size[0], spot[1] + size[1]]);
    }
    dialog.querySelector(".left").textContent = left ? `${left} labels have no room and are not shown.` : "";
  }

  function open(index) {
    current = (index + pictures.length) % pictures.length;
    const source = pictures[current];
    source.closest("details")?.setAttribute("open", "");
    frame.replaceChildren(
      ...[...source.querySelector(".frame").childNodes].map(node => node.cloneNode(true)));
    const caption = source.closest("figure").querySelector("figcaption").innerText;
    dialog.querySelector(".title").textContent = `${current + 1} of ${pictures.length}: ${caption}`;
    if (!dialog.open) dialog.showModal();
    place();
  }

  pictures.forEach((button, index) => button.addEventListener("click", () => open(index)));
  dialog.addEventListener("click", event => {
    const go = event.target.dataset.go;
    if (go === "0" || event.target === view) dialog.close();
    else if (go === "labels") {
      labelled = !labelled;
      event.target.setAttribute("aria-pressed", labelled);
      place();
    }
    else if (go) open(current + Number(go));
  });
  dialog.addEventListener("keydown", event => {
    if (event.key === "ArrowLeft") open(current - 1);
    else if (event.key === "ArrowRight") open(current + 1);
  });
  dialog.addEventListener("close", () => pictures[current].focus());
  window.addEventListener("resize", () => { if (dialog.open) place(); });
}

// --- a page that renews itself, but not while somebody reads a value ---

const seconds = Number(document.body.dataset.refresh);
if (seconds) setTimeout(function again() {
  if (performance.now() - usedAt < 3000) setTimeout(again, 1000); else location.reload();
}, seconds * 1000);
})();
"""
