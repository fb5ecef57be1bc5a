// Everything beside the timeline, made once as elements of the page.

/** Makes an element; strings become text, never markup. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  made.append(...children);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

function swatch(color) {
  const made = element("i", {});
  made.style.background = color;
  return made;
}

function fillHeader(data) {
  document.title = `${data.name}: ${data.title}`;
  byId("name").textContent = data.name;
  byId("title").textContent = data.title;
  byId("summary").textContent = unbroken(data.summary);
  byId("numbers").append(
    ...data.numbers.map(({ label, value, note }) =>
      element(
        "div",
        {},
        element("dt", {}, label),
        element("dd", {}, value, element("small", {}, unbroken(note))),
      ),
    ),
  );
}

function sourceText(data) {
  const example =
    "Durations are an example: a microbatch takes 1 s forward and 2 s backward on every stage.";
  const measured = "The plan file predicts no durations: the simulation takes the measured ones.";
  const text = { example, measured, predicted: "" }[data.source];
  const traced = data.measured;
  if (!traced || traced.rows.length === traced.num_ranks) return text;
  return `${text} Of ${traced.num_ranks} traced ranks the first one of each kind is shown.`.trim();
}

function fillLegend(target, state) {
  const { data, theme } = state;
  const runs = (module, backward) =>
    data.tasks.stage.some(
      (stage, task) =>
        data.stages[stage].module === module && data.tasks.backward[task] === backward,
    );
  const entries = data.modules.flatMap((module, n) => {
    const colors = state.colors.get(module);
    const quota = module.quota ? ` (${module.quota})` : "";
    return [
      [colors.forward, `${module.name} forward${quota}`, 0],
      [colors.backward, `${module.name} backward${quota}`, 1],
    ].filter(([, , backward]) => runs(n, backward));
  });
  entries.push([theme.track, "waiting"]);
  const once = new Set(data.layouts.flatMap((layout) => Object.keys(layout.once_us)));
  for (const term of once) entries.push([data.colors.time[term], termName(term)]);
  if (state.allRows.some((row) => [...row.turns.values()].some((turn) => turn > 0)))
    entries.push(["", "lines in a task: how many stages of its module the rank has before it"]);
  target.replaceChildren(
    ...entries.map(([color, text]) => element("span", {}, ...(color ? [swatch(color)] : []), text)),
  );
}

/** A row of stacked pieces on a common scale. */
function stackRow(label, small, pieces, whole, value, limit) {
  const bars = element("div", { class: "bars" });
  let end = 0;
  for (const [name, size, color, text] of pieces) {
    const piece = swatch(color);
    piece.style.left = `${(100 * end) / whole}%`;
    piece.style.width = `${(100 * size) / whole}%`;
    piece.title = `${name} ${text}`;
    bars.append(piece);
    end += size;
  }
  if (limit) {
    const mark = element("i", { class: "limit", title: `a GPU has ${gib(limit)}` });
    mark.style.left = `${(100 * limit) / whole}%`;
    bars.append(mark);
  }
  const name = element(
    "div",
    { class: "label" },
    label,
    ...(small ? [element("small", {}, small)] : []),
  );
  return [name, bars, element("div", { class: "value" }, value)];
}

function fillBreakdown(data) {
  byId("breakdown-section").hidden = !data.breakdown.length;
  if (!data.breakdown.length) return;
  const us = (value) => value * 1e6;
  const sums = data.breakdown.map(({ terms }) => sum(Object.values(terms)));
  const whole = Math.max(...sums) || 1;
  const stack = element("div", { class: "stack tall" });
  data.breakdown.forEach(({ name, layout, terms, step_s: step }, n) => {
    const pieces = Object.entries(terms).map(([term, value]) => [
      termName(term),
      value,
      timeColor(data, term),
      seconds(us(value)),
    ]);
    stack.append(
      ...stackRow(name, layout, pieces, whole, seconds(us(step === null ? sums[n] : step))),
    );
  });
  byId("breakdown").replaceChildren(stack, breakdownTable(data));
}

function breakdownTable(data) {
  const heads = data.breakdown.map(({ name }) => element("th", { scope: "col" }, name));
  const table = element(
    "table",
    { class: "terms" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, ""), ...heads)),
  );
  const body = element("tbody", {});
  const named = (term) => data.breakdown.some(({ terms }) => term in terms);
  for (const term of Object.keys(data.colors.time).filter(named)) {
    const cells = data.breakdown.map(({ terms }) =>
      element("td", {}, seconds((terms[term] || 0) * 1e6)),
    );
    body.append(
      element("tr", {}, element("th", { scope: "row" }, swatch(timeColor(data, term)), termName(term)), ...cells),
    );
  }
  table.append(body);
  return table;
}

/** What is no work stands back on any paper. */
function timeColor(data, term) {
  return term === "bubble_s" ? "var(--waiting)" : data.colors.time[term];
}

function termName(term) {
  const names = {
    compute_s: "compute",
    imbalance_s: "imbalance of tokens and items",
    communication_s: "exposed communication",
    bubble_s: "waiting (bubble)",
    sync_s: "synchronising",
    optimizer_s: "optimizer",
  };
  return names[term] || term;
}

/** Predicted and measured durations of every stage, and how far they are apart. */
function fillDurations(data) {
  byId("durations-section").hidden = !data.durations.length;
  const heads = ["", "forward, predicted", "measured", "", "backward, predicted", "measured", ""];
  const rows = data.durations.map(({ stage, predicted_us: predicted, measured_us: measured }) => {
    const cells = predicted.flatMap((us, way) => [
      seconds(us),
      seconds(measured[way]),
      us ? signed(measured[way] / us - 1) : "",
    ]);
    return [
      element("th", { scope: "row" }, stage),
      ...cells.map((text) => element("td", {}, text)),
    ];
  });
  byId("durations").replaceChildren(
    element("thead", {}, rowOf(heads.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows.map(rowOf)),
  );
}

function rowOf(cells) {
  return element("tr", {}, ...cells);
}

function fillPeaks(data) {
  const kinds = data.kinds.filter((kind) => kind.memory && !kind.layout);
  const others = data.kinds.filter((kind) => kind.memory && kind.layout);
  byId("peaks-section").hidden = !kinds.length;
  if (!kinds.length) return;
  const fullest = (among, count) => [...among].sort((a, b) => peakBytes(b) - peakBytes(a)).slice(0, count);
  const shown = fullest(kinds, 16);
  const beside = fullest(others, 1);
  const whole = 1.03 * Math.max(data.capacity_bytes || 0, ...[...shown, ...beside].map(peakBytes)) || 1;
  const stack = element("div", { class: "stack" });
  for (const kind of [...kinds.filter((each) => shown.includes(each)), ...beside]) {
    const pieces = Object.keys(data.colors.memory)
      .filter((term) => kind.memory[term])
      .map((term) => [term, kind.memory[term], data.colors.memory[term], gib(kind.memory[term])]);
    const note = kind.layout ? "homogeneous, the fullest" : "";
    stack.append(
      ...stackRow(ranksLabel(kind), note, pieces, whole, gib(peakBytes(kind)), data.capacity_bytes),
    );
  }
  const legend = element(
    "div",
    { class: "legend" },
    ...Object.entries(data.colors.memory).map(([term, color]) =>
      element("span", {}, swatch(color), term),
    ),
  );
  const hidden = kinds.length - shown.length;
  if (hidden) legend.append(element("span", {}, `${hidden} emptier kinds of ranks left out`));
  byId("peaks").replaceChildren(stack, legend);
}

/** Bytes that a rank of a kind holds at its peak. */
function peakBytes(kind) {
  return sum(Object.values(kind.memory || {}));
}

function fillPlan(data) {
  byId("facts").append(
    ...Object.entries(data.plan.facts).map(([name, text]) =>
      element("li", {}, element("span", {}, name), text),
    ),
  );
  const { rows } = data.plan;
  const usual = new Set(["CP", "VPP", "EP"]); // columns of ones say nothing
  const names = Object.keys(rows[0]).filter(
    (name) => !usual.has(name) || rows.some((row) => row[name] > 1),
  );
  const texts = new Set(["module", "ranks", "layers", "trainable", "recompute", "loads", "share"]);
  const kind = (name) => (texts.has(name) ? { class: "text" } : {});
  const head = names.map((name) => element("th", { scope: "col", ...kind(name) }, name));
  const body = rows.map((row) =>
    element(
      "tr",
      {},
      ...names.map((name) =>
        name === "module"
          ? element("th", { scope: "row", ...kind(name) }, row[name])
          : element("td", kind(name), `${row[name]}`),
      ),
    ),
  );
  byId("plan").append(
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...body),
  );
  byId("yaml").textContent = data.plan.yaml;
}
