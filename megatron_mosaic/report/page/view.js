// The span of time that is visible: [begin, end] in microseconds inside [0, whole].

function wholeView(whole) {
  return { begin: 0, end: whole, whole };
}

/** Makes the span `factor` times as long, with the time `around` at its place. */
function zoomed(view, factor, around) {
  const least = Math.min(view.whole, 20);
  const length = clamp((view.end - view.begin) * factor, least, view.whole);
  const share = (around - view.begin) / (view.end - view.begin);
  return placed(view, around - share * length, length);
}

function moved(view, us) {
  return placed(view, view.begin + us, view.end - view.begin);
}

function spanning(view, begin, end) {
  const length = clamp(end - begin, Math.min(view.whole, 20), view.whole);
  return placed(view, begin, length);
}

function placed(view, begin, length) {
  const from = clamp(begin, 0, view.whole - length);
  return { begin: from, end: from + length, whole: view.whole };
}

function sum(numbers) {
  return numbers.reduce((whole, number) => whole + number, 0);
}

function clamp(value, low, high) {
  return Math.max(low, Math.min(high, value));
}
