// The timeline: a row for each kind of ranks, drawn on a canvas.

const AXIS = 26; // pixels of the axis above the rows
const RIGHT = 64; // of the shares behind them
const HEADING = 28; // above the rows of a layout, where there are several
const TRACK_NAMES = 62; // beside two tracks of a row

/**
 * Where things are, in CSS pixels: of the whole list of rows, and of the part that shows. A row
 * with two tracks is twice as high as one with one.
 */
function rowsGeometry(state, width, mostHeight) {
  const { rows, data } = state;
  const both = state.tracks === "both" && rows.some((row) => row.measured);
  const layouts = data.layouts.length > 1 ? [...new Set(rows.map((row) => row.layout))] : [];
  const tracks = rows.map((row) => (both && row.measured ? 2 : 1));
  const room = mostHeight - AXIS - layouts.length * HEADING;
  const trackHeight = clamp(Math.floor(room / sum(tracks)), 16, both ? 32 : 40);
  let total = AXIS;
  const headings = [];
  const boxes = rows.map(({ layout }, number) => {
    if (layouts.length && layout !== rows[number - 1]?.layout) {
      headings.push({ layout, top: total });
      total += HEADING;
    }
    const box = { top: total, height: tracks[number] * trackHeight };
    total += box.height;
    return box;
  });
  const left = Math.min(state.labelWidth + (both ? TRACK_NAMES : 0), 0.3 * width);
  const shown = Math.min(total, mostHeight);
  return { both, left, width, boxes, headings, total, shown, scroll: 0 };
}

/** Pixels of the longest label on one line. */
function longestLabel(rows) {
  const pen = document.createElement("canvas").getContext("2d");
  const width = (text, font) => {
    pen.font = `${font} ${FONT}`;
    return pen.measureText(text).width;
  };
  return (
    36 + Math.max(...rows.map((row) => width(row.label, "600 12px") + width(row.stages, "11px")))
  );
}

function plotWidth(place) {
  return place.width - place.left - RIGHT;
}

function xOf(us, view, place) {
  return place.left + ((us - view.begin) / (view.end - view.begin)) * plotWidth(place);
}

function timeAt(x, view, place) {
  return view.begin + ((x - place.left) / plotWidth(place)) * (view.end - view.begin);
}

/** Tracks of a row that show, each with its top and height inside the row. */
function tracksOf(number, state) {
  const { both, boxes } = state.place;
  const { measured } = state.rows[number];
  const { height } = boxes[number];
  const pad = height > 20 ? 3 : 1.5;
  const inner = height - 2 * pad;
  if (both && measured) {
    const half = (inner - 2) / 2;
    return [
      { name: "simulated", top: pad, height: half },
      { name: "measured", top: pad + half + 2, height: half },
    ];
  }
  return [{ name: mainTrack(state, state.rows[number]), top: pad, height: inner }];
}

function drawRows(canvas, state) {
  const { place, rows } = state;
  const pen = prepared(canvas, place.width, place.shown);
  pen.save();
  pen.beginPath();
  pen.rect(0, AXIS, place.width, place.shown - AXIS);
  pen.clip();
  place.headings.forEach((heading) => drawHeading(pen, state, heading));
  rows.forEach((_, number) => {
    const top = rowTop(place, number);
    const bottom = top + place.boxes[number].height;
    if (bottom > AXIS && top < place.shown) drawRow(pen, state, number);
  });
  state.paths.forEach((path) => drawPath(pen, state, path));
  drawPointer(pen, state);
  pen.restore();
  drawAxis(pen, state);
}

function rowTop(place, number) {
  return place.boxes[number].top - place.scroll;
}

function drawHeading(pen, state, { layout, top }) {
  const { place, theme, data } = state;
  pen.font = `13px ${FONT}`;
  pen.textAlign = "left";
  pen.textBaseline = "alphabetic";
  pen.fillStyle = theme.text;
  const text = fitted(pen, data.layouts[layout].title, place.width - 20);
  pen.fillText(text, 0, top - place.scroll + HEADING - 8);
}

function drawRow(pen, state, number) {
  const row = state.rows[number];
  const top = rowTop(state.place, number);
  const slots = tracksOf(number, state);
  drawLabel(pen, state, number, slots.length > 1 ? TRACK_NAMES : 0);
  for (const slot of slots) {
    const track = row[slot.name];
    const box = { top: top + slot.top, height: slot.height };
    pen.save();
    pen.beginPath();
    pen.rect(state.place.left, box.top, plotWidth(state.place), box.height);
    pen.clip();
    drawGround(pen, state, slot.name === "measured" ? null : row.layout, box);
    if (slot.name === "simulated") drawOnce(pen, state, row.layout, box);
    drawTasks(pen, state, row, track, box);
    pen.restore();
    if (slots.length > 1) drawTrackName(pen, state, slot.name, box);
    const whole = slot.name === "measured" ? state.measuredEnd : state.simulatedEnds[row.layout];
    drawShare(pen, state, whole ? 1 - track.busy / whole : 0, box);
  }
}

/** The ground of a track, as long as the step is. */
function drawGround(pen, state, layout, box) {
  const end = layout === null ? state.measuredEnd : stepEnd(state, layout);
  pen.fillStyle = state.theme.track;
  const width = xOf(end, state.view, state.place) - state.place.left;
  pen.fillRect(state.place.left, box.top, Math.max(0, width), box.height);
}

/** When a simulated step is over. */
function stepEnd(state, layout) {
  return state.simulatedEnds[layout] + sum(Object.values(state.data.layouts[layout].once_us));
}

function drawTrackName(pen, state, name, box) {
  pen.font = `10px ${FONT}`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  pen.fillStyle = state.theme.quiet;
  pen.fillText(name, state.place.left - 8, box.top + box.height / 2);
}

/** What a row is of, on one or two lines; `taken` pixels beside it are not its own. */
function drawLabel(pen, state, number, taken) {
  const { place, theme } = state;
  const { label, stages } = state.rows[number];
  const { height } = place.boxes[number];
  const top = rowTop(place, number);
  const middle = top + height / 2;
  if (number === state.row) {
    pen.fillStyle = theme.accent;
    pen.fillRect(0, top + 3, 3, height - 6);
  }
  pen.textBaseline = "middle";
  pen.textAlign = "left";
  const end = place.left - 12 - taken;
  const two = height >= 36 && (taken > 0 || state.labelWidth > place.left);
  pen.font = `600 ${height < 20 ? 11 : 12}px ${FONT}`;
  pen.fillStyle = theme.text;
  const name = fitted(pen, label, end - 10);
  pen.fillText(name, 10, two ? middle - 7 : middle);
  const used = 10 + pen.measureText(name).width + 10;
  pen.font = `${height < 20 ? 10 : 11}px ${FONT}`;
  pen.fillStyle = theme.quiet;
  if (two) pen.fillText(fitted(pen, stages, end - 10), 10, middle + 8);
  else if (end - used > 30) pen.fillText(fitted(pen, stages, end - used), used, middle);
}

function fitted(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let length = text.length;
  while (length > 1 && pen.measureText(`${text.slice(0, length)}…`).width > width) length--;
  return `${text.slice(0, length)}…`;
}

function drawTasks(pen, state, row, track, box) {
  const { view, place } = state;
  for (let n = Math.max(0, lastStarted(track, view.begin)); n < track.index.length; n++) {
    if (track.start[n] > view.end) break;
    const x = xOf(track.start[n], view, place);
    const width = Math.max(xOf(track.end[n], view, place) - x, 0.5);
    drawTask(pen, state, row, track.index[n], { x, width, ...box });
  }
}

function drawTask(pen, state, row, task, box) {
  const { data, theme, paths } = state;
  const faint = paths.length > 0 && !paths.some((path) => path.has(task));
  const { forward, backward, onForward, onBackward } = state.colors.get(moduleOf(data, task));
  const [color, onColor] = data.tasks.backward[task]
    ? [backward, onBackward]
    : [forward, onForward];
  pen.globalAlpha = faint ? 0.25 : 1;
  pen.fillStyle = color;
  pen.fillRect(box.x, box.top, box.width, box.height);
  pen.fillStyle = onColor;
  const turns = box.width > 8 ? row.turns.get(data.tasks.stage[task]) : 0;
  for (let turn = turns; turn > 0; turn--) {
    pen.fillRect(box.x + 2, box.top + box.height - 1 - 2 * turn, box.width - 3, 1);
  }
  pen.globalAlpha = 1;
  if (box.width > 5) {
    pen.fillStyle = theme.paper;
    pen.fillRect(box.x, box.top, 0.75, box.height);
  }
  const free = { ...box, height: box.height - 2 * turns };
  if (box.width > 12 && free.height >= 11 && !faint) drawNumber(pen, state, task, free, onColor);
}

/** Microbatches inside a task, in the part of it that shows. */
function drawNumber(pen, state, task, box, color) {
  const from = Math.max(box.x, state.place.left);
  const until = Math.min(box.x + box.width, state.place.width - RIGHT);
  const text = microbatches(state.data, task);
  const fits = [box.height < 15 ? 10 : 11, 9].some((size) => {
    pen.font = `${size}px ${FONT}`;
    return pen.measureText(text).width <= until - from - 1;
  });
  if (!fits) return;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillStyle = color;
  pen.fillText(text, (from + until) / 2, box.top + box.height / 2 + 0.5);
}

/** What a step does once, after its tasks. */
function drawOnce(pen, state, layout, box) {
  const { data, view, place } = state;
  let us = state.simulatedEnds[layout];
  for (const [term, length] of Object.entries(data.layouts[layout].once_us)) {
    const x = xOf(us, view, place);
    us += length;
    pen.fillStyle = data.colors.time[term];
    pen.fillRect(x, box.top, xOf(us, view, place) - x, box.height);
  }
}

function drawShare(pen, state, share, box) {
  pen.font = `11px ${FONT}`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  pen.fillStyle = state.theme.quiet;
  pen.fillText(percent(share), state.place.width - 6, box.top + box.height / 2);
}

/** The axis; marks are round numbers, as many as have room. */
function drawAxis(pen, state) {
  const { view, place, theme } = state;
  const step = roundStep(((view.end - view.begin) * 90) / plotWidth(place));
  pen.font = `11px ${FONT}`;
  pen.textBaseline = "alphabetic";
  pen.textAlign = "center";
  for (let us = Math.ceil(view.begin / step) * step; us <= view.end; us += step) {
    const x = xOf(us, view, place);
    pen.fillStyle = theme.quiet;
    pen.fillText(us ? moment(us, step, view.whole) : "0", x, 14);
    pen.fillStyle = theme.line;
    pen.fillRect(x, 19, 1, 7);
  }
  pen.textAlign = "right";
  pen.fillStyle = theme.quiet;
  pen.fillText("waiting", place.width - 6, 14);
}

/** The task under the pointer, the one that it waited for, and the pointer's time. */
function drawPointer(pen, state) {
  const { place, theme, hover, view } = state;
  if (state.pointer !== null) {
    const x = xOf(state.pointer, view, place);
    pen.globalAlpha = 0.5;
    pen.fillStyle = theme.text;
    if (x >= place.left && x <= place.width - RIGHT) pen.fillRect(x, AXIS, 1, place.shown);
    pen.globalAlpha = 1;
  }
  if (state.dragSpan) drawSpan(pen, state);
  if (!hover) return;
  const box = taskBox(state, hover);
  const before = cause(state, hover);
  if (before) {
    const source = taskBox(state, before);
    pen.strokeStyle = theme.accent;
    pen.lineWidth = 1.5;
    outline(pen, place, source);
    line(pen, place, [
      [source.x + source.width, middleOf(source)],
      [box.x, middleOf(box)],
    ]);
  }
  pen.strokeStyle = theme.text;
  pen.lineWidth = 1.5;
  outline(pen, place, box);
}

function drawSpan(pen, state) {
  const [from, until] = state.dragSpan.map((us) => xOf(us, state.view, state.place));
  pen.globalAlpha = 0.18;
  pen.fillStyle = state.theme.accent;
  pen.fillRect(Math.min(from, until), AXIS, Math.abs(until - from), state.place.shown);
  pen.globalAlpha = 1;
}

function taskBox(state, { row, name, at }) {
  const track = state.rows[row][name];
  const slot = tracksOf(row, state).find((each) => each.name === name);
  const x = xOf(track.start[at], state.view, state.place);
  const width = xOf(track.end[at], state.view, state.place) - x;
  return { x, width, top: rowTop(state.place, row) + slot.top, height: slot.height };
}

function middleOf(box) {
  return box.top + box.height / 2;
}

function outline(pen, place, { x, width, top, height }) {
  clipped(pen, place, () => pen.strokeRect(x, top + 0.5, Math.max(width, 1), height - 1));
}

function line(pen, place, points) {
  clipped(pen, place, () => {
    pen.beginPath();
    points.forEach(([x, y]) => pen.lineTo(x, y));
    pen.stroke();
  });
}

function clipped(pen, place, draw) {
  pen.save();
  pen.beginPath();
  pen.rect(place.left, AXIS, plotWidth(place), place.shown);
  pen.clip();
  draw();
  pen.restore();
}

/** The critical path as a line through its tasks; it changes rows only where it must. */
function drawPath(pen, state, path) {
  const points = [];
  let row = -1;
  for (const task of path) {
    if (row < 0 || placeShown(state, row, task) < 0)
      row = state.rows.findIndex((_, number) => placeShown(state, number, task) >= 0);
    if (row < 0) continue;
    const name = mainTrack(state, state.rows[row]);
    const box = taskBox(state, { row, name, at: placeOf(state, row, name, task) });
    const y = box.top + 0.82 * box.height; // below the numbers
    points.push([box.x, y], [box.x + box.width, y]);
  }
  pen.strokeStyle = state.theme.text;
  pen.lineWidth = 1.5;
  line(pen, state.place, points);
}

/** Name of the only track of a row that shows, or of the upper one of two. */
function mainTrack(state, row) {
  return state.tracks === "measured" && row.measured ? "measured" : "simulated";
}

function placeShown(state, number, task) {
  return placeOf(state, number, mainTrack(state, state.rows[number]), task);
}

function rowWith(state, name, task) {
  return state.rows.findIndex((_, number) => placeOf(state, number, name, task) >= 0);
}

/** Place of a task in a track of a row; -1 if it has none. */
function placeOf(state, number, name, task) {
  const track = state.rows[number][name];
  if (!track) return -1;
  if (!track.places) track.places = new Map(track.index.map((each, at) => [each, at]));
  return track.places.has(task) ? track.places.get(task) : -1;
}

/** The task that another waited for last, on the row where it is; null if it did not wait. */
function cause(state, { row, name, at }) {
  const track = state.rows[row][name];
  const task = track.index[at];
  const before = task - track.behind[task];
  if (before === task || waited(track, at) < 1) return null;
  const own = placeOf(state, row, name, before);
  const where = own >= 0 ? row : rowWith(state, name, before);
  return where < 0 ? null : { row: where, name, at: placeOf(state, where, name, before) };
}

/** Time between a task and the one before it on its ranks. */
function waited(track, at) {
  return track.start[at] - (at ? track.end[at - 1] : 0);
}
