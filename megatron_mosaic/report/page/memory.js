// Memory of the chosen row over time: what stays, and activations between their passes.

const MEMORY_HEIGHT = 170;
const STAYS = ["weights", "gradients", "optimizer", "buffers"];

/**
 * Activations of a track over time: times, and for every module the bytes from each time on.
 *
 * They live from the beginning of the forward task to the end of the backward one, or to the
 * end of the forward task where there is no backward one. Of forward tasks that a schedule runs
 * for the next step the first ones were run before this one began.
 */
function liveBytes(data, track) {
  const { stage, backward, count } = data.tasks;
  const longest = data.stages.map(() => 1);
  const returns = new Set();
  for (const task of track.index) {
    longest[stage[task]] = Math.max(longest[stage[task]], count[task]);
    if (backward[task]) returns.add(stage[task]);
  }
  const events = [];
  track.index.forEach((task, at) => {
    const own = data.stages[stage[task]];
    const bytes = (own.task_bytes * count[task]) / longest[stage[task]];
    if (!backward[task]) events.push([track.start[at], own.module, bytes]);
    if (backward[task] || !returns.has(stage[task]))
      events.push([track.end[at], own.module, -bytes]);
  });
  return summed(
    events.sort(([one], [other]) => one - other),
    data.modules.length,
  );
}

function summed(events, numModules) {
  const held = new Array(numModules).fill(0);
  const least = new Array(numModules).fill(0);
  const points = events.map(([us, module, bytes]) => {
    held[module] += bytes;
    least[module] = Math.min(least[module], held[module]);
    return [us, [...held]];
  });
  const before = [0, least.map((bytes) => -bytes)];
  return [before, ...points.map(([us, all]) => [us, all.map((bytes, n) => bytes - least[n])])];
}

/** Layers of the picture from the bottom up, each with its bytes at every point in time. */
function memoryLayers(state, row) {
  const { data } = state;
  const terms = data.kinds[row.kind].memory;
  const track = row.whole[mainTrack(state, row)]; // memory is that of all lanes
  const known = data.kinds[row.kind].stages.every((s) => data.stages[s].task_bytes !== null);
  const points = known ? liveBytes(data, track) : [[0, []]];
  const stays = STAYS.filter((term) => terms[term]).map((term) => ({
    name: term,
    color: data.colors.memory[term],
    bytes: () => terms[term],
  }));
  const flat = {
    name: "activations",
    color: data.colors.memory.activations,
    bytes: () => terms.activations || 0,
  };
  const live = data.modules
    .map((module, n) => ({
      name: `activations of ${module.name}`,
      color: state.colors.get(module).forward,
      bytes: (held) => held[n],
    }))
    .filter((_, n) => points.some(([, held]) => held[n] > 0));
  const working = {
    name: "working, at most",
    color: data.colors.memory.working,
    bytes: () => terms.working || 0,
  };
  const isMeasured = mainTrack(state, row) === "measured";
  return {
    points,
    end: isMeasured ? state.measuredEnd : stepEnd(state, row.layout),
    layers: [...stays, ...(known ? live : [flat]), ...(terms.working ? [working] : [])],
    known,
  };
}

function heldAt(points, us) {
  let low = 0;
  let high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= us) low = middle + 1;
    else high = middle;
  }
  return points[Math.max(0, low - 1)][1];
}

function drawMemory(canvas, state) {
  const { place, theme, data, memory } = state;
  if (!memory) return;
  const pen = prepared(canvas, place.width, MEMORY_HEIGHT);
  const box = { top: 10, bottom: MEMORY_HEIGHT - 8 };
  const totals = memory.points.map(([, held]) => total(memory.layers, held));
  const most =
    1.08 *
    Math.max(
      data.capacity_bytes || 0,
      totals.reduce((a, b) => Math.max(a, b), 0),
    );
  const y = (bytes) => box.bottom - (bytes / most) * (box.bottom - box.top);
  pen.fillStyle = theme.track;
  pen.fillRect(place.left, box.top, plotWidth(place), box.bottom - box.top);
  clippedTo(pen, place, box, () => drawLayers(pen, state, y));
  drawMarks(pen, state, most, y);
  if (data.capacity_bytes) drawCapacity(pen, state, y(data.capacity_bytes));
  if (state.pointer !== null) {
    pen.globalAlpha = 0.5;
    pen.fillStyle = theme.text;
    pen.fillRect(xOf(state.pointer, state.view, place), box.top, 1, box.bottom - box.top);
    pen.globalAlpha = 1;
  }
}

function total(layers, held) {
  return sum(layers.map((layer) => layer.bytes(held)));
}

function clippedTo(pen, place, box, draw) {
  pen.save();
  pen.beginPath();
  pen.rect(place.left, box.top, plotWidth(place), box.bottom - box.top);
  pen.clip();
  draw();
  pen.restore();
}

/** Draws the highest sum first, so that each lower one covers it. */
function drawLayers(pen, state, y) {
  const { points, layers } = state.memory;
  const { view, place } = state;
  for (let n = layers.length; n > 0; n--) {
    pen.fillStyle = layers[n - 1].color;
    pen.beginPath();
    pen.moveTo(place.left, y(0));
    let height = y(0);
    points.forEach(([us, held]) => {
      const x = clamp(xOf(us, view, place), place.left - 2, place.width);
      pen.lineTo(x, height);
      height = y(total(layers.slice(0, n), held));
      pen.lineTo(x, height);
    });
    const end = Math.min(xOf(state.memory.end, view, place), place.width);
    pen.lineTo(end, height);
    pen.lineTo(end, y(0));
    pen.fill();
  }
}

function drawMarks(pen, state, most, y) {
  const step = roundStep(most / 2 ** 30 / 5) * 2 ** 30;
  pen.font = `11px ${FONT}`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  pen.fillStyle = state.theme.quiet;
  for (let bytes = 0; bytes < most; bytes += step) {
    pen.fillText(`${Number((bytes / 2 ** 30).toPrecision(3))} GiB`, state.place.left - 8, y(bytes));
  }
}

function drawCapacity(pen, state, y) {
  const { place, theme, data } = state;
  pen.fillStyle = theme.alarm;
  pen.fillRect(place.left, y - 0.75, plotWidth(place), 1.5);
  pen.font = `11px ${FONT}`;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.fillText(gib(data.capacity_bytes), place.width - RIGHT + 6, y);
}
