// Pointer, wheel and keys.

function listen(state, redraw) {
  const scroll = byId("scroll");
  const canvas = byId("rows");
  const look = (view) => {
    state.view = view;
    redraw();
  };
  canvas.addEventListener("wheel", (event) => turned(event, state, look), { passive: false });
  canvas.addEventListener("pointerdown", (event) => pressed(event, state, redraw));
  canvas.addEventListener("pointermove", (event) => pointed(event, state, redraw));
  canvas.addEventListener("pointerup", (event) => released(event, state, redraw));
  canvas.addEventListener("dblclick", () => look(wholeView(state.wholeEnd)));
  canvas.addEventListener("pointerleave", () => left(state, redraw));
  scroll.addEventListener("scroll", () => redraw());
  scroll.addEventListener("keydown", (event) => keyed(event, state, redraw));
  scroll.addEventListener("blur", () => left(state, redraw));
  byId("memory").addEventListener("pointermove", (event) => pointedAtMemory(event, state, redraw));
  byId("memory").addEventListener("pointerleave", () => left(state, redraw));
  const middle = () => (state.view.begin + state.view.end) / 2;
  byId("in").addEventListener("click", () => look(zoomed(state.view, 0.5, middle())));
  byId("out").addEventListener("click", () => look(zoomed(state.view, 2, middle())));
  byId("all").addEventListener("click", () => look(wholeView(state.wholeEnd)));
  byId("chain").addEventListener("click", () => togglePath(state, redraw));
}

function turned(event, state, look) {
  const overflows = state.place.total > state.place.shown;
  const over = event.offsetX >= state.place.left;
  if (!over && overflows) return; // over the labels the list of rows scrolls
  event.preventDefault();
  const length = state.view.end - state.view.begin;
  const pixels = event.deltaMode === 1 ? 30 : 1; // lines or pixels
  const sideways = event.shiftKey ? event.deltaX || event.deltaY : event.deltaX;
  if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) {
    look(moved(state.view, (sideways * pixels * length) / plotWidth(state.place)));
    return;
  }
  const around = timeAt(Math.max(event.offsetX, state.place.left), state.view, state.place);
  look(zoomed(state.view, Math.exp(clamp(event.deltaY * pixels, -300, 300) * 0.0025), around));
}

function pressed(event, state, redraw) {
  event.target.setPointerCapture(event.pointerId);
  const us = timeAt(event.offsetX, state.view, state.place);
  const spans = event.shiftKey || event.offsetY < AXIS;
  state.drag = { x: event.offsetX, view: state.view, spans, us, far: false };
  redraw();
}

function pointed(event, state, redraw) {
  const { drag, place } = state;
  state.pointer = timeAt(event.offsetX, state.view, place);
  if (drag && Math.abs(event.offsetX - drag.x) > 3) drag.far = true;
  if (drag && drag.far) {
    hideTip(state);
    if (drag.spans) state.dragSpan = [drag.us, state.pointer];
    else dragged(event, state);
  } else {
    hovered(event, state);
  }
  redraw();
}

function dragged(event, state) {
  const length = state.drag.view.end - state.drag.view.begin;
  const us = ((state.drag.x - event.offsetX) * length) / plotWidth(state.place);
  state.view = moved(state.drag.view, us);
  event.target.classList.add("moving");
}

function released(event, state, redraw) {
  const { drag } = state;
  if (state.dragSpan) {
    const [one, other] = state.dragSpan;
    state.view = spanning(state.view, Math.min(one, other), Math.max(one, other));
  } else if (drag && !drag.far) {
    const row = rowAt(event.offsetY, state);
    if (row !== null) state.row = row;
  }
  state.drag = null;
  state.dragSpan = null;
  event.target.classList.remove("moving");
  redraw();
}

function rowAt(y, state) {
  const inList = y + state.place.scroll;
  const row = state.place.boxes.findIndex(
    ({ top, height }) => inList >= top && inList < top + height,
  );
  return y >= AXIS && row >= 0 ? row : null;
}

function hovered(event, state) {
  const row = rowAt(event.offsetY, state);
  const inside = event.offsetX >= state.place.left && event.offsetX <= state.place.width - RIGHT;
  hideTip(state);
  if (row === null || !inside) return;
  const y = event.offsetY - rowTop(state.place, row);
  const slot = tracksOf(row, state).find((each) => y < each.top + each.height + 1);
  const found = slot && taskAt(state, row, slot.name, state.pointer);
  if (!found) return;
  state.hover = found;
  showTip(byId("tip"), taskWords(state, found), event.clientX, event.clientY);
}

function pointedAtMemory(event, state, redraw) {
  hideTip(state);
  state.pointer = timeAt(event.offsetX, state.view, state.place);
  const { begin, end } = state.view;
  if (state.pointer >= begin && state.pointer <= end) {
    showTip(byId("tip"), memoryWords(state, state.pointer), event.clientX, event.clientY);
  }
  redraw();
}

function left(state, redraw) {
  state.pointer = null;
  hideTip(state);
  redraw();
}

function hideTip(state) {
  state.hover = null;
  byId("tip").hidden = true;
}

function keyed(event, state, redraw) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { view } = state;
  const length = view.end - view.begin;
  const middle = view.begin + length / 2;
  const views = {
    "+": () => zoomed(view, 0.5, middle),
    "=": () => zoomed(view, 0.5, middle),
    "-": () => zoomed(view, 2, middle),
    0: () => wholeView(state.wholeEnd),
    ArrowLeft: () => moved(view, -0.2 * length),
    ArrowRight: () => moved(view, 0.2 * length),
    Home: () => moved(view, -view.whole),
    End: () => moved(view, view.whole),
  };
  const steps = { ArrowUp: -1, ArrowDown: 1 };
  const tasks = { n: 1, p: -1 };
  if (views[event.key]) state.view = views[event.key]();
  else if (steps[event.key]) chooseRow(state, state.row + steps[event.key]);
  else if (tasks[event.key]) chooseTask(state, tasks[event.key]);
  else if (event.key === "c") togglePath(state, redraw);
  else if (event.key === "Escape") hideTip(state);
  else return;
  event.preventDefault();
  redraw();
}

function chooseRow(state, row) {
  state.row = clamp(row, 0, state.rows.length - 1);
  const { top, height } = state.place.boxes[state.row];
  const scroll = byId("scroll");
  scroll.scrollTop = clamp(scroll.scrollTop, top + height - state.place.shown, top - AXIS);
  hideTip(state);
  const { label, stages } = state.rows[state.row];
  byId("spoken").textContent = `${label}, ${stages}`;
}

/** Goes to the next task of the chosen row, moving the view if it must, and tells of it. */
function chooseTask(state, by) {
  const row = state.rows[state.row];
  const name = tracksOf(state.row, state)[0].name;
  const track = row[name];
  const here = state.hover && state.hover.row === state.row && state.hover.name === name;
  const first = Math.max(0, lastStarted(track, state.view.begin));
  const at = clamp(here ? state.hover.at + by : first, 0, track.index.length - 1);
  const outside = track.start[at] < state.view.begin || track.start[at] > state.view.end;
  if (outside)
    state.view = moved(state.view, track.start[at] - (state.view.begin + state.view.end) / 2);
  state.hover = { row: state.row, name, at, waits: false };
  const words = taskWords(state, state.hover);
  const box = taskBox(state, state.hover);
  const corner = byId("rows").getBoundingClientRect();
  const x = clamp(box.x + box.width / 2, state.place.left, state.place.width - RIGHT);
  showTip(byId("tip"), words, corner.left + x, corner.top + box.top + box.height);
  byId("spoken").textContent = spoken(words);
}

function togglePath(state, redraw) {
  state.showsPath = !state.showsPath;
  byId("chain").setAttribute("aria-pressed", `${state.showsPath}`);
  redraw();
}
