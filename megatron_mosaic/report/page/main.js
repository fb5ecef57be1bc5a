// Puts the page together.

async function start() {
  draw(await unpacked(byId("data").textContent));
}

/** The page's data: zlib and base64, undone by the browser itself. */
function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

function draw(data) {
  const state = makeState(data);
  fillHeader(data);
  fillBreakdown(data);
  fillDurations(data);
  fillPeaks(data);
  fillPlan(data);
  byId("source").textContent = sourceText(data);
  const redraw = painter(state);
  chooseRows(state, redraw);
  chooseTheme(state, redraw);
  listen(state, redraw);
  new ResizeObserver(() => redraw()).observe(byId("scroll"));
  window.addEventListener("resize", () => redraw());
  redraw();
}

/** What the page shows, and what its reader has chosen. */
function makeState(data) {
  const allRows = makeRows(data);
  const state = {
    data,
    allRows,
    rows: allRows,
    tracks: "both",
    row: fullestRow(data, allRows),
    simulatedEnds: data.layouts.map((_, layout) =>
      latestEnd(allRows.filter((row) => row.layout === layout).map((row) => row.simulated)),
    ),
    measuredEnd: latestEnd(allRows.map((row) => row.measured).filter(Boolean)),
    labelWidth: clamp(longestLabel(allRows), 130, 330),
    hover: null,
    pointer: null,
    drag: null,
    dragSpan: null,
    showsPath: false,
    paths: [],
  };
  const ends = data.layouts.map((_, layout) => stepEnd(state, layout));
  state.wholeEnd = Math.max(...ends, state.measuredEnd) || 1;
  state.view = wholeView(state.wholeEnd);
  return state;
}

function latestEnd(tracks) {
  return Math.max(0, ...tracks.map(lastEnd));
}

function fullestRow(data, rows) {
  const peak = (row) => peakBytes(data.kinds[row.kind]);
  const own = rows.filter((row) => row.layout === rows[0].layout);
  return own.reduce((best, row, number) => (peak(row) > peak(own[best]) ? number : best), 0);
}

/** Draws everything that time or the pointer changes, at most once a frame. */
function painter(state) {
  let waits = false;
  const paint = () => {
    waits = false;
    layOut(state);
    state.paths = state.showsPath ? criticalPaths(state) : [];
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
  const { left, boxes } = state.place;
  const places = JSON.stringify(boxes.map(({ top, height }) => [top, height]));
  Object.assign(byId("rows").dataset, { left, places, whole: state.wholeEnd });
}

function paintMemory(state) {
  const row = state.rows[state.row];
  byId("memory-figure").hidden = !state.data.kinds[row.kind].memory;
  if (byId("memory-figure").hidden) return;
  const drawn = [row, state.tracks, state.theme];
  if (!state.memory || drawn.some((part, n) => part !== state.memory.of[n])) {
    state.memory = { ...memoryLayers(state, row), of: drawn };
    byId("memory-title").textContent = memoryTitle(state, row);
    byId("memory-legend").replaceChildren(
      ...state.memory.layers.map((layer) => element("span", {}, swatch(layer.color), layer.name)),
    );
  }
  drawMemory(byId("memory"), state);
}

function memoryTitle(state, row) {
  const { layouts } = state.data;
  const where = layouts.length > 1 ? [", this plan", ", homogeneous layout"][row.layout] : "";
  const what = state.memory.known ? "" : ", with activations at their peak";
  return `Memory of a GPU of ${row.label}${where}${what}`;
}

/** Lets a reader choose layouts, and between simulated and measured tasks. */
function chooseRows(state, redraw) {
  const { data, allRows } = state;
  offer(byId("layouts"), data.layouts.length > 1, (choice) => {
    state.rows = allRows.filter((row) => choice === "all" || row.layout === Number(choice));
    state.row = fullestRow(data, state.rows);
    hideTip(state);
    redraw();
  });
  offer(byId("tracks"), data.measured !== null, (choice) => {
    state.tracks = choice;
    hideTip(state);
    redraw();
  });
}

function offer(group, isOpen, choose) {
  group.hidden = !isOpen;
  for (const button of group.children) {
    button.addEventListener("click", () => {
      for (const each of group.children) each.setAttribute("aria-pressed", `${each === button}`);
      choose(button.dataset.choice);
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

start().catch((error) => {
  byId("summary").textContent = `The report needs a browser of 2023 or later (${error.message}).`;
  throw error;
});
