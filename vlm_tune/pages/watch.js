"use strict";
// Draw the curves and answers of runs. Data come from data.json, again and again, or once from the page itself.

const PLOTS = [
  { title: "Loss", log: true, series: [["train/loss", "training"], ["val/loss", "validation"]] },
  { title: "Learning rate", series: [["lr/vision", "vision"], ["lr/projector", "projector"], ["lr/llm", "language model"]] },
  { title: "Gradient norm, before clipping", log: true, series: [["grad/vision", "vision"], ["grad/projector", "projector"], ["grad/llm", "language model"]] },
  { title: "Tokens a second", zero: true, series: [["speed/tokens", "all devices"]] },
  { title: "Waiting for data", zero: true, percent: true, series: [["speed/waiting", "share of the time"]] },
  { title: "Memory, GiB", zero: true, scale: 1 / 1024, series: [["speed/memory_mb", "highest so far"]] },
  { title: "Arithmetic, TFLOP/s of a device", zero: true, series: [["speed/tflops", "estimated"]] },
  { title: "Model FLOPs utilisation", zero: true, percent: true, series: [["speed/mfu", "of the card's published rate"]] },
  { title: "Loss of pairs, by its parts", series: [["pairs/sigmoid", "DPO"], ["pairs/bco", "BCO"], ["pairs/nll", "chosen answer"]] },
  { title: "Chosen above rejected", zero: true, percent: true, series: [["pairs/accuracy", "training"], ["val/accuracy", "validation"]] },
  { title: "Reward", series: [["pairs/reward_chosen", "chosen"], ["pairs/reward_rejected", "rejected"], ["pairs/margin", "margin"]] },
  { title: "Reward, validation", series: [["val/reward_chosen", "chosen"], ["val/reward_rejected", "rejected"], ["val/margin", "margin"]] },
  { title: "Log-probability of an answer", series: [["pairs/logp_chosen", "chosen"], ["pairs/logp_rejected", "rejected"]] },
];
const COLOURS = ["#2a78d6", "#d9551c", "#0f8f69", "#6a57d5", "#b07a00", "#c2306f", "#1d8ba8", "#6d7a1e"];
const DARK = ["#5b9eec", "#f0854f", "#35c296", "#9c8cf5", "#dca832", "#ee79ab", "#4fbfdc", "#b0c04a"];
const DASHES = ["", "7 4", "2 4"];
const LEFT = 52, RIGHT = 12, TOP = 8, BOTTOM = 24, EVERY = 2000;

const byId = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
let runs = [];  // as described by the server, each with its colour
const hidden = new Set();
let zoom = null, at = null, drag = null, chosen = null;  // steps

function make(kind, attributes = {}, ...children) {
  const isSvg = ["svg", "line", "polyline", "circle", "text", "rect", "title", "path"].includes(kind);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", kind) : document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// numbers and times as people write them
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
}
function time(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${(seconds / 60).toFixed(1)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round(seconds % 3600 / 60)} min`;
}

// scales: as in the report's chart
function roundStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= step * (1 - 1e-9));
}
function axis(low, high, start, end, isLog) {
  const scale = isLog ? Math.log : Number;
  const place = (value) => start + (scale(Math.min(Math.max(value, low), high)) - scale(low)) / (scale(high) - scale(low)) * (end - start);
  const ticks = (count) => {
    if (!isLog) {
      const step = roundStep((high - low) / count), first = Math.ceil(low / step - 1e-9);
      return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, index) => +((first + index) * step).toPrecision(12));
    }
    for (const multiples of [[1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const each of multiples) if (each * 10 ** power >= low && each * 10 ** power <= high) found.push(each * 10 ** power);
      if (found.length <= count + 2) return found;
    }
    return [low, high];
  };
  return { low, high, place, ticks, invert: (pixel) => low + (pixel - start) / (end - start) * (high - low) };
}
// a mean over neighbours, which does not lag; toward the start its window shrinks on both sides
function smoothed(points) {
  const reach = Math.round(points.length * byId("smoothing").value / 200);
  return points.map(([step], index) => {
    const before = Math.min(index, reach), near = points.slice(index - before, index + before + 1);
    return [step, near.reduce((sum, point) => sum + point[1], 0) / near.length];
  });
}

const shownRuns = () => runs.filter((run) => !hidden.has(run.name));
const colour = (index) => (dark.matches ? DARK : COLOURS)[index % COLOURS.length];
function linesOf(plot) {
  const several = shownRuns().length > 1, lines = [];
  for (const run of shownRuns()) {
    plot.series.forEach(([column, label], index) => {
      const scale = plot.scale || 1, inside = (point) => !zoom || (point[0] >= zoom[0] && point[0] <= zoom[1]);
      const points = (run.curves[column] || []).map(([step, ...values]) => [step, ...values.map((value) => value * scale)]);
      if (!points.some((point) => point[1] !== 0) && column.startsWith("lr/")) return;  // frozen
      if (!points.length) return;
      const all = smoothed(points), isVal = column.startsWith("val/");
      lines.push({
        run, column, isVal, dash: several || isVal ? DASHES[index] : "", colour: colour(several ? run.place : index),
        label: several ? (plot.series.length > 1 ? `${run.label}, ${label}` : run.label) : label,
        raw: points.filter(inside), points: (isVal ? points : all).filter(inside),
      });
    });
  }
  return lines;
}

function draw() {
  const plots = byId("plots");
  PLOTS.forEach((plot, number) => {
    const lines = linesOf(plot), old = byId(`plot${number}`);
    if (!lines.some((line) => line.points.length)) { if (old) old.remove(); return; }
    const figure = old || make("figure", { class: "plot", id: `plot${number}` }, make("figcaption"));
    if (!old) plots.insertBefore(figure, [...plots.children].find((each) => +each.id.slice(4) > number) || null);
    figure.replaceChildren(legend(plot, lines), chart(plot, lines, figure.clientWidth - 32, number));
  });
  byId("whole").hidden = !zoom;
}

function legend(plot, lines) {
  const caption = make("figcaption", {}, make("b", {}, plot.title));
  if (at !== null) caption.append(make("span", {}, `step ${Math.round(at)}`));
  for (const line of lines) {
    const known = line.raw.filter((point) => at === null || point[0] <= at), point = known[known.length - 1];
    const mark = make("svg", { viewBox: "0 0 18 8", style: `--line: ${line.colour}` }, make("line", { class: "train", x1: 0, x2: 18, y1: 4, y2: 4, "stroke-width": 2.5, "stroke-dasharray": line.dash }));
    const value = point ? (plot.percent ? `${(100 * point[1]).toFixed(1)}%` : short(point[1])) : "–";
    caption.append(make("span", {}, mark, `${line.label} `, make("b", { style: "font-size: 13px" }, value)));
  }
  return caption;
}

function range(plot, lines) {
  const single = lines.flatMap((line) => line.raw.flatMap((point) => [point[2], point[3]])).sort((one, other) => one - other);
  const cut = Math.floor(single.length / 100), most = lines.flatMap((line) => line.points.map((point) => point[1]));
  const seen = most.concat(single.slice(cut, single.length - cut));
  let low = Math.min(...seen), high = Math.max(...seen);
  if (plot.log && byId("log").checked && low > 0 && high / low > 8) return [low / 1.15, high * 1.15, true];
  if (plot.percent || plot.zero) return [0, (high || 1) * 1.06, false];
  if (low === high) { low -= Math.abs(low) / 2 || .5; high += Math.abs(high) / 2 || .5; }
  const room = .06 * (high - low);
  return [low >= 0 && low < .5 * high ? 0 : low - room, high + room, false];
}

function chart(plot, lines, width, number) {
  const height = number ? 190 : 320, svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const steps = lines.flatMap((line) => line.raw.map((point) => point[0]));
  const last = Math.max(1, ...steps), x = zoom ? axis(zoom[0], zoom[1], LEFT, width - RIGHT) : axis(0, last, LEFT, width - RIGHT);
  const [low, high, isLog] = range(plot, lines), y = axis(low, high, height - BOTTOM, TOP, isLog);
  svg.append(make("title", {}, `${plot.title}: ${lines.map((line) => `${line.label} ${short(line.points.at(-1)?.[1] ?? 0)}`).join("; ")}`));
  for (const tick of y.ticks(number ? 4 : 6)) {
    const text = plot.percent ? `${+(100 * tick).toPrecision(6)}%` : short(tick);
    svg.append(make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.place(tick), y2: y.place(tick) }));
    svg.append(make("text", { x: LEFT - 8, y: y.place(tick) + 4, "text-anchor": "end" }, text));
  }
  svg.append(make("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }));
  for (const tick of x.ticks(width < 500 ? 4 : 8)) {
    if (tick !== Math.round(tick)) continue;
    svg.append(make("text", { x: x.place(tick), y: height - 6, "text-anchor": x.place(tick) > width - 30 ? "end" : "middle" }, tick.toLocaleString("en")));
  }
  const path = (points) => points.map(([step, value]) => `${x.place(step).toFixed(1)},${y.place(value).toFixed(1)}`).join(" ");
  const place = (step, value) => ({ cx: x.place(step), cy: y.place(value) });
  for (const line of lines) {
    const style = `--line: ${line.colour}`;
    if (!line.isVal && line.raw.length > 2)
      svg.append(make("polyline", { class: "raw line", style, points: path(line.raw.flatMap(([step, , least, most]) => least === most ? [[step, least]] : [[step, least], [step, most]])) }));
    if (line.points.length > 1) svg.append(make("polyline", { class: "train line", style, "stroke-dasharray": line.dash, points: path(line.points) }));
    if (line.isVal || line.points.length === 1)
      for (const [step, value] of line.points.length <= 40 ? line.points : [])
        svg.append(make("circle", { class: "dot", style, r: 4, ...place(step, value) }, make("title", {}, `${line.label}, step ${step}: ${short(value)}`)));
    if (line.column === "val/loss" && line.run.best && line.points.some((point) => point[0] === line.run.best[0]))
      svg.append(make("circle", { class: "best", style, r: 8, ...place(...line.run.best) }, make("title", {}, `best: ${short(line.run.best[1])} at step ${line.run.best[0]}`)));
  }
  if (!number) for (const run of shownRuns()) for (const odd of run.unusual) {
    if (odd.step < x.low || odd.step > x.high) continue;
    const what = odd.kind === "skipped" ? "skipped: the loss or a gradient is no number" : `a leap of the loss to ${odd.loss}`;
    svg.append(make("line", { class: "odd", x1: x.place(odd.step), x2: x.place(odd.step), y1: height - BOTTOM, y2: height - BOTTOM - 9 }, make("title", {}, `step ${odd.step} ${what}. Rows: ${(odd.rows || []).slice(0, 4).join(", ")}`)));
  }
  if (at !== null && at >= x.low && at <= x.high) svg.append(make("line", { class: "at", x1: x.place(at), x2: x.place(at), y1: TOP, y2: height - BOTTOM }));
  if (drag) {
    const [from, to] = [Math.min(...drag), Math.max(...drag)].map(x.place);
    svg.append(make("rect", { class: "chosen", x: from, width: to - from, y: TOP, height: height - BOTTOM - TOP }));
  }
  const stepAt = (event) => x.invert(Math.min(Math.max((event.clientX - svg.getBoundingClientRect().left), LEFT), width - RIGHT));
  svg.addEventListener("pointermove", (event) => { at = stepAt(event); if (drag) drag[1] = at; later(); });
  svg.addEventListener("pointerleave", () => { if (!drag) { at = null; later(); } });
  svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") { drag = [stepAt(event), stepAt(event)]; event.preventDefault(); } });
  return svg;
}
addEventListener("pointerup", () => {
  if (drag && Math.abs(drag[1] - drag[0]) >= 2) zoom = [Math.min(...drag), Math.max(...drag)];
  if (drag) { drag = null; later(); }
});
let isDue = false;
function later() {
  if (!isDue) { isDue = true; requestAnimationFrame(() => { isDue = false; draw(); }); }
}

function cards() {
  byId("runs").replaceChildren(...runs.map((run) => {
    const share = run.state === "finished" ? 1 : run.max_steps ? run.step / run.max_steps : 0, loss = run.last["train/loss"];
    const facts = [
      run.state === "running" && !run.step ? "starting" : run.state === "quiet" ? `no step for ${time(run.age)}` : run.state,
      run.max_steps ? `step ${run.step.toLocaleString("en")} of ${run.max_steps.toLocaleString("en")}` : "",
      run.state === "running" && run.seconds_left !== null && run.step ? `${time(run.seconds_left)} left` : "",
      loss === undefined ? "" : `loss ${short(loss)}`,
      run.best ? `best validation ${short(run.best[1])} at step ${run.best[0]}` : "",
      run.last.skipped ? `${run.last.skipped} steps skipped` : "",
      ...Object.entries(run.scores).map(([task, score]) => `${task.replaceAll("_", " ")} ${(100 * score).toFixed(1)}%`),
      ...Object.entries(run.differs).map(([key, value]) => `${key}=${value}`),
    ];
    const press = () => { if (!hidden.delete(run.name)) hidden.add(run.name); show(); };
    return make("button", { class: "run", type: "button", "aria-pressed": String(!hidden.has(run.name)), style: `--line: ${colour(run.place)}`, onclick: press },
      make("i"), make("b", {}, run.name), make("span", { class: "pill" + (run.state === "running" ? " good" : run.state === "quiet" ? " bad" : "") }, run.state),
      make("span", { class: "quiet" }, facts.slice(1).filter(Boolean).join(" · ") || facts[0]),
      make("span", { class: "track" }, make("i", { style: `width: ${(100 * share).toFixed(1)}%` })));
  }));
  byId("controls").hidden = !runs.length;
  const first = runs.find((run) => run.state === "running");
  document.title = first && first.max_steps ? `${Math.floor(100 * first.step / first.max_steps)}% · loss ${short(first.last["train/loss"])} · vlm_tune` : "Runs · vlm_tune";
}

function answers() {
  const groups = new Map();
  for (const run of shownRuns()) run.answers.forEach((answer, number) => {
    const key = JSON.stringify([answer.id, answer.question]);
    if (!groups.has(key)) groups.set(key, { ...answer, url: answer.url || (answer.picture ? `picture/${encodeURIComponent(run.name)}/${number}` : ""), by: [] });
    groups.get(key).by.push([run, answer.said]);
  });
  byId("answers").hidden = !groups.size;
  const gallery = byId("answers").querySelector(".gallery"), old = new Map([...gallery.querySelectorAll("img")].map((img) => [img.getAttribute("src"), img]));
  gallery.replaceChildren(...[...groups.values()].map((group) => {
    const card = make("article", { class: "card" });
    if (group.url) card.append(old.get(group.url) || make("img", { src: group.url, alt: group.question, loading: "lazy" }));
    const rows = group.by.map(([run, said]) => {
      const shown = said.filter(([step]) => chosen === null || step <= chosen).at(-1) || said[0];
      const squares = said.map((each) => make("button", {
        type: "button", title: `step ${each[0]}: ${each[1]}`, "aria-label": `step ${each[0]}`,
        class: (each[2] ? "is-right" : "") + (each === shown ? " is-shown" : ""),
        onclick: () => { chosen = each === said.at(-1) ? null : each[0]; answers(); },
      }));
      return make("div", { class: "said", style: `--line: ${colour(run.place)}` }, make("i"),
        make("span", { dir: "auto" }, make("span", { class: shown[2] ? "right" : "" }, shown[1] || "nothing"), make("span", { class: "quiet" }, ` step ${shown[0]}`)),
        make("div", { class: "steps" }, ...squares));
    });
    card.append(make("div", { class: "question" }, make("p", { dir: "auto" }, group.question), make("p", { class: "expected", dir: "auto" }, `expected: ${group.expected || "–"}`), ...rows));
    return card;
  }));
}

function show() {
  runs.forEach((run, index) => {
    const differs = Object.entries(run.differs).map(([key, value]) => `${key.split(".").at(-1)}=${value}`);
    run.place = index;
    run.label = differs.length && differs.length <= 2 ? differs.join(" ") : run.name;
  });
  cards();
  draw();
  answers();
}

async function poll() {
  try {
    const known = new URLSearchParams(runs.map((run) => [run.name, run.version]));
    const answer = await fetch(`data.json?${known}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const news = (await answer.json()).runs, old = new Map(runs.map((run) => [run.name, run]));
    const isNew = news.length !== runs.length || news.some((run) => run.curves);
    runs = news.map((run) => run.curves ? run : { ...old.get(run.name), ...run });
    byId("status").textContent = runs.length ? "" : "There is no run yet: it will appear here when it starts.";
    byId("status").className = "quiet";
    if (isNew) show(); else cards();
  } catch {
    byId("status").textContent = "No answer from the server. The page goes on when it is back: python -m vlm_tune watch";
    byId("status").className = "warn";
  }
  setTimeout(poll, EVERY);
}

for (const id of ["smoothing", "log"]) byId(id).addEventListener("input", draw);
byId("whole").addEventListener("click", () => { zoom = null; draw(); });
dark.addEventListener("change", () => show());
addEventListener("resize", later);
const given = byId("data");
if (given) { runs = JSON.parse(given.textContent).runs; show(); } else poll();
