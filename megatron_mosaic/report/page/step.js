// The step as rows of tasks, from the columns that the page carries.

/**
 * Makes the rows: one for each kind of ranks, with one or two tracks of tasks; with a trace
 * one for each traced rank. Where modules run at the same time each lane has a row; `whole` are
 * the tracks of all lanes together.
 *
 * A track holds its tasks in their order: `index` into the columns of tasks, start and end in
 * microseconds, and `behind`, how far back the task is that each waited for last.
 */
function makeRows(data) {
  const simulated = data.kinds.map((kind) => simulatedTrack(data, kind));
  const rowsOf = (kind, measured) => {
    const whole = {
      simulated: simulated[kind],
      measured: measured ? measuredTrack(data, simulated[kind], measured) : null,
    };
    const row = {
      kind,
      layout: data.kinds[kind].layout,
      label: measured ? `rank ${measured.rank}` : ranksLabel(data.kinds[kind]),
      stages: data.kinds[kind].label,
      turns: turnsOf(data, data.kinds[kind].stages),
      whole,
      ...whole,
    };
    const { lanes } = data.kinds[kind];
    return lanes.length ? lanes.map((lane) => laneRow(data, row, lane)) : [row];
  };
  const traced = data.measured ? data.measured.rows : [];
  const others = data.kinds.map((_, kind) => kind);
  const missing = others.filter((kind) => !traced.some((row) => row.kind === kind));
  return [
    ...traced.flatMap((row) => rowsOf(row.kind, row)),
    ...missing.flatMap((kind) => rowsOf(kind)),
  ];
}

/** The row of one lane, with the tasks of its stages. */
function laneRow(data, row, { stages, label }) {
  const own = new Set(stages);
  const part = (whole) => {
    if (!whole) return null;
    const places = [...whole.index.keys()].filter((at) => own.has(data.tasks.stage[whole.index[at]]));
    const times = places.map((at) => [whole.start[at], whole.end[at] - whole.start[at]]);
    return track(
      places.map((at) => whole.index[at]),
      whole.behind,
      times,
    );
  };
  return {
    ...row,
    stages: label,
    simulated: part(row.whole.simulated),
    measured: part(row.whole.measured),
  };
}

/** For every stage of a rank, how many earlier ones of the same module the rank has. */
function turnsOf(data, stages) {
  const count = new Map();
  return new Map(
    stages.map((stage) => {
      const { module } = data.stages[stage];
      count.set(module, (count.get(module) ?? -1) + 1);
      return [stage, count.get(module)];
    }),
  );
}

function simulatedTrack(data, kind) {
  const hosted = new Set(kind.stages);
  const index = [];
  data.tasks.stage.forEach((stage, task) => {
    if (hosted.has(stage)) index.push(task);
  });
  const { start_us: start, duration_us: duration, behind } = data.simulated;
  return track(
    index,
    behind,
    index.map((task) => [start[task], duration[task]]),
  );
}

function measuredTrack(data, simulated, row) {
  const index = row.index || simulated.index;
  const times = index.map((_, place) => [row.start_us[place], row.duration_us[place]]);
  return track(index, data.measured.behind, times);
}

function track(index, behind, times) {
  const start = Float64Array.from(times, ([begin]) => begin);
  const end = Float64Array.from(times, ([begin, duration]) => begin + duration);
  const busy = times.reduce((sum, [, duration]) => sum + duration, 0);
  return { index, behind, start, end, busy };
}

/** Position of the last task of a track that starts by a time; -1 before the first. */
function lastStarted(track, us) {
  let low = 0;
  let high = track.start.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (track.start[middle] <= us) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function moduleOf(data, task) {
  return data.modules[data.stages[data.tasks.stage[task]].module];
}

function stageName(data, stage) {
  return `${data.modules[data.stages[stage].module].name}.${data.stages[stage].stage}`;
}

function microbatches(data, task) {
  const first = data.tasks.first[task];
  const count = data.tasks.count[task];
  return count > 1 ? `${first}–${first + count - 1}` : `${first}`;
}

function taskName(data, task) {
  const kind = data.tasks.backward[task] ? "B" : "F";
  return `${kind}${microbatches(data, task)} ${stageName(data, data.tasks.stage[task])}`;
}

function ranksLabel(kind) {
  const name = kind.num_ranks > 1 ? "ranks" : "rank";
  const ranks = kind.ranks.replaceAll("-", "–");
  return `${name} ${ranks.length > 20 ? `${ranks.slice(0, 18)}…` : ranks}`;
}

/** The critical path of every layout that shows, made once for each choice of tracks. */
function criticalPaths(state) {
  state.pathsOf ??= {};
  state.pathsOf[state.tracks] ??= state.data.layouts.map((_, layout) =>
    criticalPath(state, layout),
  );
  const layouts = new Set(state.rows.map((row) => row.layout));
  return state.pathsOf[state.tracks].filter((_, layout) => layouts.has(layout));
}

/** The tasks from a step's beginning to its end, each of which the next one waited for. */
function criticalPath(state, layout) {
  const own = state.allRows.filter((row) => row.layout === layout);
  const tracks = own.map((row) => row[mainTrack(state, row)]);
  const last = tracks.reduce((best, track) => (lastEnd(track) > lastEnd(best) ? track : best));
  const path = [last.index[lastEnding(last)]];
  while (last.behind[path.at(-1)]) path.push(path.at(-1) - last.behind[path.at(-1)]);
  return new Set(path.reverse());
}

function lastEnd(track) {
  return track.end[lastEnding(track)];
}

function lastEnding(track) {
  return track.end.reduce((best, end, place) => (end > track.end[best] ? place : best), 0);
}
