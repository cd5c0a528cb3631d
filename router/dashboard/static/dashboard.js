// Keeps the page in step with the router: asks for the state every second and writes what changed.
// The markup is the server's alone: new pools, workers and hand-offs are clones of its <template>s.

const STATE_URL = new URL("../state", import.meta.url);
const POLL_MS = 1000;
const DEADLINE_MS = 5000;
const BYTE_UNITS = ["kB", "MB", "GB", "TB"];

// How values read: the same as FORMATS in routes.py.
export const FORMATS = {
  text: String,
  count: (count) => count.toLocaleString("en-US"),
  percent: (share) => `${Math.floor(share * 100 + 0.5)}%`,
  milliseconds: (seconds) => oneDecimal(seconds * 1000),
  bytes(count) {
    if (count < 1000) return `${count} B`;
    let value = count / 1000;
    let step = 0;
    for (; value >= 999.95 && step < BYTE_UNITS.length - 1; step += 1) value /= 1000;
    return `${oneDecimal(value)} ${BYTE_UNITS[step]}`;
  },
  duration(seconds) {
    const whole = Math.trunc(seconds);
    const part = (size) => Math.trunc(whole / size);
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${part(60)} min ${whole % 60} s`;
    if (whole < 86400) return `${part(3600)} h ${part(60) % 60} min`;
    return `${part(86400)} d ${part(3600) % 24} h`;
  },
  time: (unixS) => new Date(Math.trunc(unixS) * 1000).toISOString().slice(0, 19).replace("T", " "),
  wanted: (wanted) => (wanted === null ? "" : `of ${FORMATS.count(wanted)} wanted`),
  worker: (key) => key.slice(0, Math.max(0, key.lastIndexOf("/"))) || key || "–",
};

function oneDecimal(value) {
  const tenths = Math.floor(value * 10 + 0.5) / 10;
  return tenths.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
}

const one = (selector, scope = document) => scope.querySelector(selector);

// Untouched when unchanged: a selection survives, and a screen reader has nothing to announce.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function fill(scope, row) {
  for (const element of scope.querySelectorAll("[data-field]")) {
    const value = element.dataset.field.split(".").reduce((from, name) => from[name] ?? 0, row);
    if (element instanceof HTMLMeterElement) {
      element.value = value;
      continue;
    }
    element.dataset.value = value;
    if (element.hasAttribute("title")) element.title = value;
    setText(element, FORMATS[element.dataset.format](value));
  }
}

// Makes the list's children those of `rows`, in their order, keeping the elements that stay.
function fillList(list, kind, rows, keyOf, fillRow) {
  const known = new Map([...list.children].map((element) => [element.dataset[kind], element]));
  rows.forEach((row, index) => {
    const key = keyOf(row);
    const element = known.get(key) ?? one(`#${kind}`).content.firstElementChild.cloneNode(true);
    known.delete(key);
    element.dataset[kind] = key;
    fillRow(element, row);
    if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
  });
  while (list.children.length > rows.length) list.lastElementChild.remove();
}

function poolsOf(state) {
  const shown = [...one("[data-list=pools]").children].map((element) => element.dataset.pool);
  const pools = state.workers.map((worker) => worker.pool);
  const names = new Set([...shown, ...Object.keys(state.desired), ...pools]);
  return [...names].map((name) => {
    const workers = state.workers.filter((worker) => worker.pool === name);
    const ready = workers.filter((worker) => worker.state === "ready").length;
    return { name, ready, wanted: state.desired[name] ?? null, workers };
  });
}

function fillPool(element, pool) {
  const { name, ready, wanted, workers } = pool;
  element.toggleAttribute("data-short", wanted !== null && ready < wanted);
  setText(one("[data-field=name]", element), name);
  fill(one(".readiness", element), { ready, wanted });
  fillList(one("[data-list=workers]", element), "worker", workers, (w) => w.worker_id, fill);
  one(".none", element).hidden = workers.length > 0;
}

function show(state) {
  document.title = `Baton: ${state.cluster}`;
  one("[data-notice=redis]").hidden = state.redis_reachable;
  for (const section of document.querySelectorAll("[data-state]")) fill(section, state);
  fillList(one("[data-list=pools]"), "pool", poolsOf(state), (pool) => pool.name, fillPool);
  const handoffs = state.recent_handoffs;
  fillList(one("[data-list=handoffs]"), "handoff", handoffs, (row) => row.request_id, fill);
  one("[data-none=handoffs]").hidden = handoffs.length > 0;
}

function showLive(live, notice = "") {
  document.documentElement.dataset.live = live;
  setText(one("[data-status]"), live);
  setText(one("[data-notice=stale]"), notice);
  one("[data-notice=stale]").hidden = notice === "";
}

async function poll() {
  const signal = AbortSignal.timeout(DEADLINE_MS);
  const response = await fetch(STATE_URL, { cache: "no-store", signal });
  if (!response.ok) throw new Error(`${STATE_URL.pathname} answered ${response.status}`);
  show(await response.json());
}

async function visible() {
  while (document.visibilityState === "hidden") {
    await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
  }
}

async function follow() {
  let freshAt = FORMATS.time(Date.now() / 1000);
  for (;;) {
    await visible();
    try {
      await poll();
      freshAt = FORMATS.time(Date.now() / 1000);
      showLive("live");
    } catch (error) {
      const why = `no newer figures from the router (${error.message})`;
      showLive("stale", `Stale since ${freshAt} UTC: ${why}.`);
    }
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

follow();
