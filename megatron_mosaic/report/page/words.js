// What a tip says of the thing under the pointer.

/** The task, or the wait, that is on a track at a time; null outside the step. */
function taskAt(state, row, name, us) {
  const track = state.rows[row][name];
  const at = lastStarted(track, us);
  if (at >= 0 && us <= track.end[at]) return { row, name, at, waits: false };
  if (at + 1 < track.index.length) return { row, name, at: at + 1, waits: true };
  return null;
}

/** Lines of a tip: a heading with its colour, then pairs of a name and a text. */
function taskWords(state, found) {
  const row = state.rows[found.row];
  const track = row[found.name];
  const task = track.index[found.at];
  const kind = state.data.tasks.backward[task] ? "backward" : "forward";
  const count = state.data.tasks.count[task];
  const colors = state.colors.get(moduleOf(state.data, task));
  const wait = waited(track, found.at);
  const why = wait >= 1 ? [["waited", `${seconds(wait)}${waitedFor(state, found)}`]] : [];
  const lines = [
    ...(found.waits ? why : []),
    [kind, `microbatch${count > 1 ? "es" : ""} ${microbatches(state.data, task)}`],
    ["on", row.label],
    ...timeLines(state, track, found.at, row.measured ? found.name : ""),
    ...(row.measured ? comparison(state, row, found) : []),
    ...(found.waits ? [] : why),
  ];
  const color = kind === "backward" ? colors.backward : colors.forward;
  const name = taskName(state.data, task);
  return {
    heading: found.waits ? `waiting for input of ${name}` : name,
    color: found.waits ? null : color,
    lines,
  };
}

function timeLines(state, track, at, name) {
  const [start, end] = [track.start[at], track.end[at]];
  const apart = Math.max(1, (end - start) / 100);
  const { whole } = state.view;
  const span = `${moment(start, apart, whole)} to ${moment(end, apart, whole)}`;
  return [
    [name || "runs", span],
    ["takes", seconds(end - start)],
  ];
}

/** The same task as the other track has it. */
function comparison(state, row, found) {
  const other = found.name === "measured" ? "simulated" : "measured";
  const at = placeOf(state, found.row, other, row[found.name].index[found.at]);
  return at < 0 ? [] : timeLines(state, row[other], at, other);
}

function waitedFor(state, found) {
  const before = cause(state, found);
  if (!before) return "";
  const row = state.rows[before.row];
  const track = row[before.name];
  const own = state.rows[found.row][found.name];
  const way = own.start[found.at] - track.end[before.at];
  const name = taskName(state.data, track.index[before.at]);
  const where = before.row === found.row ? "" : ` on ${row.label}`;
  return ` for ${name}${where}${way >= 1 ? `, ${seconds(way)} of it for the transfer` : ""}`;
}

function memoryWords(state, us) {
  const held = heldAt(state.memory.points, us);
  const layers = [...state.memory.layers].reverse();
  const apart = (state.view.end - state.view.begin) / 500;
  return {
    heading: `${gib(total(layers, held))} at ${moment(us, apart, state.view.whole)}`,
    color: null,
    lines: layers.map((layer) => [layer.name, gib(layer.bytes(held))]),
  };
}

/** One sentence for a screen reader. */
function spoken({ heading, lines }) {
  return [heading, ...lines.map(([name, text]) => `${name} ${text}`.trim())].join(", ");
}

function showTip(tip, words, x, y) {
  const head = element("b", {}, ...(words.color ? [swatch(words.color)] : []), words.heading);
  const rows = words.lines.map(([name, text]) =>
    element("tr", {}, element("th", {}, name), element("td", {}, text)),
  );
  tip.replaceChildren(head, element("table", {}, ...rows));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > window.innerWidth ? x - 16 - width : x + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${clamp(y + 16, 4, Math.max(4, window.innerHeight - height - 4))}px`;
}
