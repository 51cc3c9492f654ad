// The live page: asks /live.json once a second while it is seen, and draws what came (docs/live.md).
// Whatever a client or a worker said is only ever set as text. All that is kept has an upper size.

const POLL_MS = 1000;
const ANSWER_WITHIN_MS = 4000;
const KEPT_MS = 6000; // of finished actions
const KEPT_ACTIONS = 12000;
const TABLE_GPUS = 64;
const MEAN_SECONDS = 5;

const $ = (id) => document.getElementById(id);
const state = {
  data: null, // the last answer
  heardAt: null, // when it came
  life: null, // which controller gave it
  next: "",
  asked: "", // the filter of the actions that are kept
  actions: [], // of the lanes, as objects
  instances: new Map(), // id -> name
  frozenAt: null, // us: where the timeline stands still
  chosen: null, // the action that is described
  heat: null, // where the squares of the GPUs' seconds are, and the one pointed at
  pointed: null,
  drawn: [], // where the timeline drew what, for the pointer
  cursor: {}, // of the charts: second back from now
};

// ------------------------------------------------------------------------------------- asking

let timer = 0;
let asking = null;

async function ask() {
  clearTimeout(timer);
  if (document.hidden) return; // visibilitychange asks again
  asking?.abort();
  const mine = (asking = new AbortController());
  const gpus = $("gpus-filter").value;
  const query = new URLSearchParams({ gpus, models: $("models-filter").value });
  if (state.next && state.asked === gpus) query.set("since", state.next);
  const late = setTimeout(() => mine.abort(), ANSWER_WITHIN_MS);
  try {
    const answer = await fetch(`/live.json?${query}`, { signal: mine.signal, cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    take(await answer.json(), gpus);
    connection(true);
  } catch (error) {
    if (mine !== asking) return; // another question took its place
    connection(false);
  } finally {
    clearTimeout(late);
  }
  if (mine === asking) {
    clearTimeout(timer);
    timer = setTimeout(ask, POLL_MS);
  }
}

function connection(here) {
  if (here) state.heardAt = new Date();
  document.body.classList.toggle("here", here);
  document.body.classList.toggle("gone", !here);
  const since = state.heardAt ? ` since ${clockTime(state.heardAt)}` : "";
  setText($("connection"), here ? "connected" : `no answer${since}`);
  if (here) draw();
}

function take(data, gpus) {
  if (data.life !== state.life || gpus !== state.asked) {
    Object.assign(state, { actions: [], instances: new Map(), chosen: null, life: data.life, asked: gpus });
  }
  for (const [id, name] of Object.entries(data.instances)) state.instances.set(Number(id), name);
  const oldest = data.now_us - KEPT_MS * 1000;
  const more = data.actions.map(([lane, id, load, code, model, requests, from, to, begin, end]) => ({
    lane, id, load: load === 1, code, model, requests, from, to, begin, end, ran: end > 0,
  }));
  if (state.frozenAt === null) {
    state.actions = state.actions.concat(more).filter((a) => Math.max(a.end, a.to) > oldest);
    state.actions.sort((a, b) => start(a) - start(b));
    state.actions = state.actions.slice(-KEPT_ACTIONS);
    const seen = new Set(state.actions.map((a) => a.model));
    for (const id of state.instances.keys()) if (!seen.has(id)) state.instances.delete(id);
  }
  state.next = data.next;
  state.data = data;
}

const start = (a) => (a.ran ? a.begin : a.from);

// -------------------------------------------------------------------------------------- words

const two = (n) => String(n).padStart(2, "0");
const clockTime = (d) => `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
const stamp = (us) => {
  const d = new Date(us / 1000);
  return `${clockTime(d)}.${String(d.getMilliseconds()).padStart(3, "0")}`;
};
const count = (n) => Math.round(n).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
const ms = (us) => {
  const value = us / 1000;
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2).replace("-", "−");
};
const rate = (n) => (n >= 100 || n === Math.round(n) ? count(n) : n.toFixed(1));
// Rounded down: 100 % is all of them.
const percent = (part, whole) => {
  if (!whole) return "–";
  const share = (100 * part) / whole;
  return `${share >= 100 ? 100 : share >= 99 ? (Math.floor(share * 100) / 100).toFixed(2) : (Math.floor(share * 10) / 10).toFixed(1)} %`;
};

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Fill a table's body with rows of cells; a cell is a text or {text, className, meter}. Old cells are used again.
function setRows(id, rows, nothing) {
  const body = $(id).tBodies[0];
  const columns = $(id).tHead.rows[0].cells;
  const shown = rows.length ? rows : [[{ text: nothing, className: "none", span: columns.length }]];
  while (body.rows.length > shown.length) body.deleteRow(-1);
  shown.forEach((cells, i) => {
    const row = body.rows[i] ?? body.insertRow();
    while (row.cells.length > cells.length) row.deleteCell(-1);
    cells.forEach((said, j) => {
      const cell = row.cells[j] ?? row.insertCell();
      const { text, className = columns[j].className, span = 1, meter } = said?.text === undefined ? { text: said } : said;
      if (cell.className !== className) cell.className = className;
      if (cell.colSpan !== span) cell.colSpan = span;
      if (meter === undefined) return setText(cell, String(text));
      if (cell.children.length !== 2) cell.replaceChildren(document.createElement("i"), document.createElement("span"));
      cell.children[0].style.width = `calc((100% - 52px) * ${meter / 100})`;
      setText(cell.children[1], String(text));
    });
  });
}

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0);
const some = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
const ofInAll = (shown, all, what) => (shown < all ? `${count(shown)} of ${some(all, what)}` : some(all, what));
const bad = (text, is) => (is ? { text, className: "bad" } : text);

// ------------------------------------------------------------------------------------- drawing

let colours = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = "text soft line grid accent bad panel offered satisfied p50 p99 cell c0 c1 c2 c3 c4 c5 c6 c7 model-light";
  colours = Object.fromEntries(names.split(" ").map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
// Neighbouring numbers get hues far from one another.
const modelColour = (id, alpha = 1) => `hsl(${(id * 137.508) % 360} 62% ${colours["model-light"]} / ${alpha})`;

// A canvas at the screen's resolution; draws in CSS pixels.
function surface(canvas, height) {
  const scale = Math.min(window.devicePixelRatio || 1, 3);
  const width = canvas.clientWidth;
  if (height) canvas.style.height = `${height}px`;
  const tall = height ?? canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(tall * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
  }
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, tall);
  g.font = "11px system-ui, sans-serif";
  return { g, width, height: tall };
}

function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((top) => top >= value * 0.999);
}

const LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 30;

// One chart over the last seconds. `lines` are {name, colour, values, unit}; `stacked` ones lie upon each other.
function chart(id, lines, { stacked = false, unit, text }) {
  const canvas = $(id);
  const { g, width, height } = surface(canvas);
  const span = Number($("span").value);
  const shown = lines.map((line) => ({ ...line, values: line.values.slice(-span) }));
  const sums = Array.from({ length: span }, (_, i) => shown.reduce((sum, line) => sum + (line.values[i] ?? 0), 0));
  const peak = stacked ? Math.max(...sums) : Math.max(0, ...shown.flatMap((l) => l.values.filter((v) => v !== null)));
  const top = niceTop(peak);
  const x = (i) => LEFT + ((i + 0.5) / span) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - (value / top) * (height - TOP - BOTTOM);
  axes(g, width, height, span, top, y);
  if (stacked) stack(g, shown, span, x, y);
  else shown.forEach((line) => path(g, line, x, y));
  const at = state.cursor[id];
  const chosen = at === undefined ? span - 1 : Math.max(0, Math.min(span - 1, span - 1 - at));
  if (at !== undefined) {
    g.strokeStyle = colours.soft;
    g.lineWidth = 1;
    g.beginPath(); g.moveTo(x(chosen), TOP); g.lineTo(x(chosen), height - BOTTOM); g.stroke();
  }
  const when = at === undefined ? "last whole second" : clockTime(new Date((state.data.series.second - (span - chosen)) * 1000));
  key(`${id}-key`, when, shown.map((line) => [line.name, line.colour, text(line.values[chosen])]), unit);
  canvas.setAttribute("aria-label", `${unit}, last ${span} s, highest ${text(peak)}. ${$(`${id}-key`).textContent}`);
}

function axes(g, width, height, span, top, y) {
  g.lineWidth = 1;
  g.fillStyle = colours.soft;
  g.textAlign = "right"; g.textBaseline = "middle";
  for (let i = 0; i <= 4; i++) {
    const value = (top * i) / 4;
    g.strokeStyle = i ? colours.grid : colours.line;
    g.beginPath(); g.moveTo(LEFT, Math.round(y(value)) + 0.5); g.lineTo(width - RIGHT, Math.round(y(value)) + 0.5); g.stroke();
    g.fillText(value >= 1000 ? count(value) : String(Number(value.toPrecision(3))), LEFT - 6, y(value));
  }
  g.textAlign = "center"; g.textBaseline = "top";
  const step = span > 200 ? 60 : span > 100 ? 30 : 15;
  for (let back = 0; back <= span; back += step) {
    const at = width - RIGHT - (back / span) * (width - LEFT - RIGHT);
    g.fillText(back ? `−${back}` : "0", at, height - BOTTOM + 4);
  }
  g.fillText("seconds from now", (LEFT + width - RIGHT) / 2, height - 13);
}

function path(g, line, x, y) {
  g.strokeStyle = line.colour;
  g.lineWidth = 1.6;
  g.setLineDash(line.dash ?? []);
  g.beginPath();
  let pen = false;
  line.values.forEach((value, i) => {
    if (value === null) { pen = false; return; }
    if (pen) g.lineTo(x(i), y(value));
    else { g.moveTo(x(i), y(value)); g.lineTo(x(i) + 0.1, y(value)); }
    pen = true;
  });
  g.stroke();
  g.setLineDash([]);
}

function stack(g, lines, span, x, y) {
  const below = new Array(span).fill(0);
  const wide = Math.max(1, x(1) - x(0));
  for (const line of lines) {
    g.fillStyle = line.colour;
    line.values.forEach((value, i) => {
      if (value) g.fillRect(x(i) - wide / 2, y(below[i] + value), wide - (wide > 4 ? 1 : 0), y(below[i]) - y(below[i] + value));
      below[i] += value ?? 0;
    });
  }
}

// A legend that also says the values, so that nothing is told by the picture alone.
function key(id, when, entries, unit) {
  const parts = [[entries.length ? `${when}:` : when, null], ...entries.map(([name, colour, text]) => [`${name} ${text}`, colour])];
  const box = $(id);
  while (box.children.length > parts.length) box.lastChild.remove();
  parts.forEach(([text, colour], i) => {
    const part = box.children[i] ?? box.appendChild(document.createElement("span"));
    if (!part.children.length) part.append(document.createElement("i"), document.createElement("span"));
    part.children[0].className = colour ? "swatch" : "";
    part.children[0].style.background = colour ?? "none";
    setText(part.children[1], text);
  });
}

function drawCharts() {
  const s = state.data.series;
  const closed = (values) => values.slice(0, -1); // the open second is not whole
  chart("rates", [
    { name: "offered", colour: colours.offered, values: closed(s.offered), dash: [4, 3] },
    { name: "satisfied", colour: colours.satisfied, values: closed(s.satisfied) },
  ], { unit: "requests/s", text: (v) => count(v ?? 0) });
  const misses = s.misses
    .map((miss, i) => ({ name: miss.text, colour: colours[`c${i % 8}`], values: closed(miss.counts) }))
    .filter((line) => line.values.some((value) => value));
  chart("misses", misses, { stacked: true, unit: "requests/s not in time", text: (v) => count(v ?? 0) });
  if (!misses.length) key("misses-key", "none in the last 5 minutes", []);
  const inMs = (values) => closed(values).map((us) => (us === null ? null : us / 1000));
  chart("latency", [
    { name: "p99", colour: colours.p99, values: inMs(s.p99_us) },
    { name: "p50", colour: colours.p50, values: inMs(s.p50_us), dash: [4, 3] },
  ], { unit: "latency in ms", text: (v) => (v === null || v === undefined ? "–" : `${ms(v * 1000)} ms`) });
}

const HEAT_TOP = 8;

function drawBusy() {
  const gpus = state.data.gpus;
  const canvas = $("busy");
  const row = Math.max(1, Math.min(22, Math.floor(226 / Math.max(1, gpus.length))));
  const every = Math.ceil((row < 11 ? 24 : 11) / row); // as many names as have room
  const left = NAMES;
  const { g, width } = surface(canvas, Math.max(1, gpus.length) * row + HEAT_TOP + 20);
  const wide = (width - left - RIGHT) / 60;
  g.textBaseline = "middle";
  gpus.forEach((gpu, i) => {
    if (i % every === 0) {
      g.fillStyle = colours.text;
      g.textAlign = "right";
      g.fillText(gpu.name, left - 6, HEAT_TOP + i * row + row / 2);
    }
    gpu.exec.forEach((share, j) => {
      g.fillStyle = `rgba(${colours.cell}, ${0.04 + 0.96 * (share / 100)})`;
      g.fillRect(left + j * wide, HEAT_TOP + i * row, wide - (row > 4 ? 1 : 0), row - (row > 4 ? 1 : 0));
    });
  });
  const bottom = HEAT_TOP + gpus.length * row;
  g.fillStyle = colours.soft;
  g.textBaseline = "top";
  g.textAlign = "center";
  for (const back of [0, 15, 30, 45, 60]) {
    g.fillText(back ? `−${back}` : "0 s", Math.max(left + 10, Math.min(width - RIGHT - 8, width - RIGHT - back * wide)), bottom + 4);
  }
  state.heat = { left, row, wide };
  const means = gpus.map((gpu) => gpu.exec_mean);
  const least = gpus[means.indexOf(Math.min(...means))];
  const most = gpus[means.indexOf(Math.max(...means))];
  const said = gpus.length
    ? `last 10 s: mean ${mean(means).toFixed(0)} %, least ${least.exec_mean.toFixed(0)} % (${least.name}), most ${most.exec_mean.toFixed(0)} % (${most.name})`
    : "no GPU of that name has joined";
  const at = state.pointed;
  const gpu = at && gpus[at.row];
  const share = gpu?.exec[at.column];
  setText($("busy-key"), share === undefined ? said : `${gpu.name}, ${60 - at.column} s ago: ${share} %`);
  canvas.setAttribute("aria-label", `Exec time of each GPU; ${said}. The table beside it has the figures.`);
}

// ----------------------------------------------------------------------------------- timelines

const LANE = 38; // px of a lane: predicted and actual exec, actual and predicted load
const NAMES = 72;
const ROWS = { false: { predicted: [3, 5], actual: [9, 13] }, true: { actual: [23, 6], predicted: [30, 4] } };

function drawTimeline() {
  const lanes = state.data.lanes;
  const canvas = $("timeline");
  const { g, width, height } = surface(canvas, Math.max(1, lanes.length) * LANE + 34);
  const window_us = Number($("window").value) * 1000;
  const end = state.frozenAt ?? state.data.now_us;
  const begin = end - window_us;
  const x = (us) => NAMES + ((us - begin) / window_us) * (width - NAMES - RIGHT);
  state.drawn = [];
  g.textBaseline = "middle";
  lanes.forEach((name, lane) => {
    g.fillStyle = lane % 2 ? "transparent" : colours.grid;
    g.fillRect(NAMES, lane * LANE, width - NAMES - RIGHT, LANE);
    g.fillStyle = colours.text;
    g.textAlign = "right";
    g.fillText(name, NAMES - 6, lane * LANE + LANE / 2);
  });
  timelineAxis(g, lanes.length * LANE, width, window_us, x, begin);
  g.save();
  g.beginPath(); g.rect(NAMES, 0, width - NAMES - RIGHT, lanes.length * LANE); g.clip();
  for (const a of state.actions) {
    if (a.lane >= lanes.length || Math.max(a.end, a.to) < begin) continue;
    drawAction(g, a, x);
  }
  g.restore();
  if (state.chosen) describe(state.chosen);
  const said = `${some(lanes.length, "GPU")}, ${some(state.drawn.length, "action")} in the last ${window_us / 1e6} s${state.frozenAt ? ", paused" : ""}`;
  canvas.setAttribute("aria-label", `Timelines of ${said}. Arrow keys go from action to action.`);
}

function drawAction(g, a, x) {
  const { predicted, actual } = ROWS[a.load];
  const top = a.lane * LANE;
  const [from, to] = [x(a.from), Math.max(x(a.to), x(a.from) + 1)];
  g.lineWidth = 1;
  g.strokeStyle = a.ran ? modelColour(a.model) : colours.bad;
  g.setLineDash(a.ran ? [] : [3, 2]);
  if (to - from > 3) g.strokeRect(from + 0.5, top + predicted[0] + 0.5, to - from - 1, predicted[1] - 1);
  else { g.fillStyle = g.strokeStyle; g.fillRect(from, top + predicted[0], to - from, predicted[1]); }
  g.setLineDash([]);
  let [left, right] = [from, to];
  if (a.ran) {
    left = x(a.begin);
    right = Math.max(x(a.end), left + 1);
    g.fillStyle = modelColour(a.model, a.load ? 0.6 : 1);
    g.fillRect(left, top + actual[0], right - left - (right - left > 3 ? 0.6 : 0), actual[1]);
  }
  if (a === state.chosen) {
    g.strokeStyle = colours.text;
    g.lineWidth = 2;
    g.strokeRect(Math.min(left, from) - 1, top + Math.min(predicted[0], actual[0]) - 1, Math.max(right, to) - Math.min(left, from) + 2, a.load ? 14 : 22);
  }
  state.drawn.push({ a, left: Math.min(left, from), right: Math.max(right, to), top: top + (a.load ? 22 : 0), bottom: top + (a.load ? LANE : 22) });
}

function timelineAxis(g, bottom, width, window_us, x, begin) {
  g.strokeStyle = colours.line;
  g.fillStyle = colours.soft;
  g.lineWidth = 1;
  g.textBaseline = "top";
  for (let i = 0; i <= 5; i++) {
    const at = Math.round(x(begin + (window_us * i) / 5)) + (i === 5 ? -0.5 : 0.5);
    g.beginPath(); g.moveTo(at, 0); g.lineTo(at, bottom + 3); g.stroke();
    g.textAlign = i === 5 ? "right" : "center";
    const back = (window_us * (5 - i)) / 5000;
    g.fillText(back ? `−${Math.round(back)} ms` : state.frozenAt ? `0 = ${stamp(state.frozenAt)}` : "0", at, bottom + 6);
  }
}

function describe(a) {
  const what = a.load ? "Weight load" : `Exec of ${some(a.requests, "request")}`;
  const name = state.instances.get(a.model) ?? `model ${a.model}`;
  const took = a.ran
    ? `ran ${ms(a.end - a.begin)} ms from ${stamp(a.begin)}; predicted ${ms(a.to - a.from)} ms; ` +
      `began ${signed(a.begin - a.from)} and ended ${signed(a.end - a.to)} against the plan`
    : `did not run (code ${a.code}); was predicted for ${ms(a.to - a.from)} ms from ${stamp(a.from)}`;
  setText($("action"), `${what}, ${name}, on ${state.data.lanes[a.lane] ?? "a GPU"}: ${took}. Action ${a.id}.`);
}
const signed = (us) => (us === 0 ? "at once" : `${ms(Math.abs(us))} ms ${us < 0 ? "early" : "late"}`);

function choose(a) {
  if (a === state.chosen) return;
  state.chosen = a ?? null;
  if (a) describe(a);
  drawTimeline();
}

function pointAt(event) {
  const box = $("timeline").getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const near = state.drawn.filter((d) => py >= d.top && py < d.bottom && px >= d.left - 3 && px <= d.right + 3);
  near.sort((one, other) => distance(one, px) - distance(other, px));
  if (near.length) choose(near[0].a);
}
const distance = (d, px) => Math.abs((d.left + d.right) / 2 - px);

function moveChoice(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key === "Escape") return choose(null);
  const step = steps[event.key];
  if (!step || !state.drawn.length) return;
  event.preventDefault();
  pause(true); // what is being read must not move away
  const visible = state.drawn.map((d) => d.a);
  const now = visible.includes(state.chosen) ? state.chosen : visible[visible.length - 1];
  if (step[0]) {
    const lane = visible.filter((a) => a.lane === now.lane);
    const at = state.chosen === now ? lane.indexOf(now) + step[0] : lane.indexOf(now);
    return choose(lane[Math.max(0, Math.min(lane.length - 1, at))]);
  }
  const beside = visible.filter((a) => Math.sign(a.lane - now.lane) === step[1]);
  const lane = beside.length ? beside.map((a) => a.lane).reduce((p, c) => (step[1] * (c - p) < 0 ? c : p)) : null;
  beside.sort((p, c) => Math.abs(start(p) - start(now)) - Math.abs(start(c) - start(now)));
  choose(beside.find((a) => a.lane === lane) ?? now);
}

function pause(on) {
  if (on === (state.frozenAt !== null) || !state.data) return;
  state.frozenAt = on ? state.data.now_us : null;
  if (!on) Object.assign(state, { actions: [], chosen: null, next: "" }); // ask for what was missed
  $("pause").setAttribute("aria-pressed", String(on));
  setText($("pause"), on ? "Go on" : "Pause");
  if (!on) ask();
  if (!on) setText($("action"), "Point at an action, or use the arrow keys here, for its figures.");
  drawTimeline();
}

// ------------------------------------------------------------------------------ figures, tables

function drawTiles() {
  const { series, requests, gpus_in_all, workers_in_all: workers } = state.data;
  const lately = (values) => mean(values.slice(-1 - MEAN_SECONDS, -1));
  const [offered, satisfied] = [lately(series.offered), lately(series.satisfied)];
  const missed = series.misses.reduce((sum, miss) => sum + lately(miss.counts), 0);
  const p99 = series.p99_us.slice(-1 - MEAN_SECONDS, -1).filter((us) => us !== null);
  setText($("tile-offered"), `${rate(offered)}/s`);
  setText($("tile-satisfied"), percent(satisfied, offered));
  setText($("tile-missed"), `${rate(missed)}/s`);
  setText($("tile-p99"), p99.length ? `${ms(Math.max(...p99))} ms` : "–");
  setText($("tile-unanswered"), count(requests.arrived - requests.answered));
  setText($("tile-answered"), count(requests.answered));
  setText($("tile-busy"), gpus_in_all.gpus > gpus_in_all.hosts ? `${gpus_in_all.exec_mean.toFixed(0)} %` : "–");
  setText($("tile-workers"), `${workers.joined} of ${workers.workers}`);
}

function drawCascades() {
  const box = $("cascades");
  const lines = (state.data.cascades ?? []).map((c) => {
    const stages = c.stages.map((s) => `${s.stage} ${s.model}: ${count(s.queued)} queued${s.gpus === null ? "" : `, ${some(s.gpus, "GPU")}`}`);
    const given = Object.entries(c.verdicts).filter(([, n]) => n).map(([verdict, n]) => `${count(n)} ${verdict}`);
    return [`Cascade ${c.name}: threshold ${c.threshold.toFixed(3)}`, ...stages, given.join(", ") || "no verdict yet"].join("; ") + (c.ready ? "" : " (not ready)");
  });
  box.hidden = !lines.length;
  while (box.children.length > lines.length) box.lastChild.remove();
  lines.forEach((line, i) => setText(box.children[i] ?? box.appendChild(document.createElement("li")), line));
}

function drawFunctions(d) {
  const functions = d.functions ?? [];
  $("functions-section").hidden = !d.functions_in_all;
  if (!d.functions_in_all) return;
  setText($("functions-count"), ofInAll(functions.length, d.functions_in_all, "function"));
  setRows("functions", functions.map((f) => [
    { text: f.name, className: "long" }, f.gpu ? "GPU" : "host", count(f.ready_on), count(f.queued), count(f.calls), count(f.failed), count(f.cold),
    ms(f.wait_us), ms(f.run_us), ms(f.suspended_us),
  ]), "no function of that name is offered");
}

function drawTables() {
  const d = state.data;
  const inTable = d.gpus.length > TABLE_GPUS ? `the first ${TABLE_GPUS} in the table, ` : "";
  const inLanes = d.gpus.length > d.lanes.length ? `; ${inTable}${d.lanes.length} as timelines` : "";
  setText($("gpus-count"), ofInAll(d.gpus.length, d.gpus_in_all.gpus, "GPU") + inLanes);
  setRows("gpus", d.gpus.slice(0, TABLE_GPUS).map((g) => [
    g.host ? `${g.name} (host, ${some(g.slots, "slot")})` : g.name, { text: `${g.exec_mean.toFixed(0)} %`, className: "meter", meter: g.exec_mean }, `${g.load_mean.toFixed(0)} %`,
    g.suspended ? `${count(g.outstanding)}, ${count(g.suspended)} suspended` : count(g.outstanding), count(g.resident), `${count(g.free_pages)} of ${count(g.pages)}`,
  ]), "no GPU of that name has joined");
  const m = d.models_in_all;
  setText($("models-count"), `${ofInAll(d.models.length, m.names, "name")}, ${some(m.instances, "instance")}`);
  setRows("models", d.models.map((row) => [
    { text: row.name, className: "long" }, row.loading ? `${count(row.instances)} (${count(row.loading)} loading)` : count(row.instances),
    count(row.queued), count(row.resident), row.b1_us ? ms(row.b1_us) : "–",
  ]), "no model of that name is loaded");
  drawFunctions(d);
  setText($("clients-count"), ofInAll(d.clients.length, d.clients_in_all, "client"));
  setRows("clients", d.clients.map((c) => [{ text: c.name, className: "long" }, count(c.unanswered), count(c.models), c.weight]), "no client is connected");
  const w = d.workers_in_all;
  setText($("workers-count"), `${ofInAll(d.workers.length, w.workers, "worker")}, ${w.joined} joined`);
  setRows("workers", d.workers.map((row) => [
    row.worker, row.address, bad(row.state, row.state !== "joined"), row.device || "–", count(row.gpus), ms(row.clock_error_us), ms(row.there_us),
    ms(row.back_us), count(row.times_lost), count(row.errors), { text: row.activity || "–", className: "long" },
  ]), "no worker is named");
  setText($("missed-count"), d.missed.length ? `the last ${d.missed.length}, newest first` : "");
  setRows("missed", d.missed.map((r) => [
    stamp(r.at_us), r.request, { text: r.model, className: "long" }, r.slo_us > 0 ? ms(r.slo_us) : "–",
    r.slo_us > 0 ? ms(r.left_us) : "–", r.what, { text: r.reason || "–", className: "long" },
  ]), "none so far");
}

function draw() {
  const d = state.data;
  if (!d) return;
  const c = d.controller;
  const doing = c.draining ? "draining" : c.ready ? "ready" : "not ready: no GPU can be given work";
  setText($("what"), `${location.host}, version ${c.version}, ${c.policy}${c.fidelity === "paper" ? " (paper)" : ""}, ${doing}; drawn ${stamp(d.now_us).slice(0, 8)}`);
  drawTiles();
  drawCascades();
  drawCharts();
  drawBusy();
  drawTables();
  drawTimeline();
}

// ------------------------------------------------------------------------------------- events

function cursorOf(id) {
  const canvas = $(id);
  canvas.addEventListener("pointermove", (event) => {
    const span = Number($("span").value);
    const share = (event.offsetX - LEFT) / (canvas.clientWidth - LEFT - RIGHT);
    setCursor(id, Math.floor((1 - share) * span));
  });
  canvas.addEventListener("pointerleave", () => setCursor(id, undefined));
  canvas.addEventListener("blur", () => setCursor(id, undefined));
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return setCursor(id, undefined);
    const step = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    setCursor(id, (state.cursor[id] ?? 0) + step);
  });
}

function setCursor(id, back) {
  const span = Number($("span").value);
  state.cursor[id] = back === undefined ? undefined : Math.max(0, Math.min(span - 1, back));
  if (state.data) drawCharts();
}

function pointAtHeat(event) {
  const heat = state.heat;
  state.pointed = heat && event.type === "pointermove"
    ? { row: Math.floor((event.offsetY - HEAT_TOP) / heat.row), column: Math.floor((event.offsetX - heat.left) / heat.wide) }
    : null;
  if (state.data) drawBusy();
}

let typed = 0;
for (const id of ["gpus-filter", "models-filter"]) {
  $(id).addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(() => { pause(false); ask(); }, 200);
  });
}
for (const id of ["rates", "misses", "latency"]) cursorOf(id);
$("span").addEventListener("change", draw);
$("window").addEventListener("change", draw);
$("pause").addEventListener("click", () => pause(state.frozenAt === null));
$("busy").addEventListener("pointermove", pointAtHeat);
$("busy").addEventListener("pointerleave", pointAtHeat);
$("timeline").addEventListener("pointermove", pointAt);
$("timeline").addEventListener("keydown", moveChoice);
document.addEventListener("visibilitychange", ask);
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); draw(); });

readColours();
ask();
