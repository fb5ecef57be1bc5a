// Puts the page together.

function start() {
  const data = JSON.parse(byId("data").textContent);
  const rows = makeRows(data);
  const endOf = (name) => Math.max(0, ...rows.map((row) => (row[name] ? lastEnd(row[name]) : 0)));
  const state = {
    data,
    rows,
    tracks: "both",
    row: fullestRow(data, rows),
    simulatedEnd: endOf("simulated"),
    measuredEnd: endOf("measured"),
    labelWidth: clamp(longestLabel(rows), 130, 330),
    hover: null,
    pointer: null,
    drag: null,
    dragSpan: null,
    showsPath: false,
    path: null,
  };
  state.wholeEnd = Math.max(state.simulatedEnd + data.once_us, state.measuredEnd) || 1;
  state.view = wholeView(state.wholeEnd);
  fillHeader(data);
  fillBreakdown(data);
  fillDurations(data);
  fillPeaks(data);
  fillPlan(data);
  byId("source").textContent = sourceText(data);
  const redraw = painter(state);
  chooseTracks(state, redraw);
  chooseTheme(state, redraw);
  listen(state, redraw);
  new ResizeObserver(() => redraw()).observe(byId("scroll"));
  window.addEventListener("resize", () => redraw());
  redraw();
}

function fullestRow(data, rows) {
  const held = (row) => Object.values(data.kinds[row.kind].memory || {}).reduce((a, b) => a + b, 0);
  return rows.reduce((best, row, number) => (held(row) > held(rows[best]) ? number : best), 0);
}

/** Draws everything that time or the pointer changes, at most once a frame. */
function painter(state) {
  let waits = false;
  const paint = () => {
    waits = false;
    layOut(state);
    if (state.pathOf !== pathTrack(state)) state.wholePath = new Set(criticalPath(state));
    state.pathOf = pathTrack(state);
    state.path = state.showsPath ? state.wholePath : null;
    drawRows(byId("rows"), state);
    paintMemory(state);
    const { begin, end } = state.view;
    const apart = (end - begin) / 500;
    byId("range").textContent =
      `${moment(begin, apart, state.wholeEnd)} – ${moment(end, apart, state.wholeEnd)}`;
  };
  return () => {
    if (!waits) requestAnimationFrame(paint);
    waits = true;
  };
}

function layOut(state) {
  const scroll = byId("scroll");
  const scrollTop = scroll.scrollTop;
  const most = Math.max(240, Math.round(window.innerHeight * 0.72));
  state.place = rowsGeometry(state, scroll.clientWidth, most);
  state.place.scroll = Math.min(scrollTop, state.place.total - state.place.shown);
  scroll.style.height = `${state.place.shown}px`;
  byId("rows-height").style.height = `${state.place.total}px`;
  const { left, height } = state.place;
  Object.assign(byId("rows").dataset, { left, height, whole: state.wholeEnd });
}

function paintMemory(state) {
  const row = state.rows[state.row];
  byId("memory-figure").hidden = !state.data.kinds[row.kind].memory;
  if (byId("memory-figure").hidden) return;
  const key = `${state.row} ${state.tracks}`;
  if (state.memoryOf !== key || state.memoryTheme !== state.theme) {
    state.memory = memoryLayers(state, row);
    [state.memoryOf, state.memoryTheme] = [key, state.theme];
    byId("memory-title").textContent = `Memory of a GPU of ${row.label}${
      state.memory.known ? "" : ", with activations at their peak"
    }`;
    byId("memory-legend").replaceChildren(
      ...state.memory.layers.map((layer) => element("span", {}, swatch(layer.color), layer.name)),
    );
  }
  drawMemory(byId("memory"), state);
}

function chooseTracks(state, redraw) {
  const group = byId("tracks");
  group.hidden = !state.data.measured;
  for (const button of group.children) {
    button.addEventListener("click", () => {
      state.tracks = button.dataset.tracks;
      hideTip(state);
      for (const each of group.children) each.setAttribute("aria-pressed", `${each === button}`);
      redraw();
    });
  }
}

/** Follows the system's theme until the button is pressed. */
function chooseTheme(state, redraw) {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const apply = () => {
    root.dataset.theme = chosen || (system.matches ? "dark" : "light");
    state.theme = readTheme();
    state.colors = new Map(
      state.data.modules.map((each) => [each, moduleColors(each, state.theme)]),
    );
    fillLegend(byId("legend"), state);
    redraw();
  };
  system.addEventListener("change", apply);
  byId("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    apply();
  });
  apply();
}

start();
