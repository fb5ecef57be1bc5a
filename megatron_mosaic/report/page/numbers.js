// Numbers with units, for people.

/** Seconds with three digits, in the unit that suits them. */
function seconds(us) {
  const size = Math.abs(us);
  if (size === 0) return "0 s";
  if (size < 1000) return `${Math.round(us)} µs`;
  if (size < 1e5) return `${Number((us / 1e3).toPrecision(3))} ms`;
  if (size < 1e6) return `${(us / 1e3).toFixed(0)} ms`;
  return size < 1e7 ? `${(us / 1e6).toFixed(2)} s` : `${(us / 1e6).toFixed(1)} s`;
}

/** A point in time of a step of some length, with digits that tell points `apart` from it. */
function moment(us, apart, whole) {
  const [unit, name] = whole >= 1e6 ? [1e6, "s"] : [1e3, "ms"];
  const digits = Math.ceil(-Math.log10(apart / unit) - 1e-9);
  return `${(us / unit).toFixed(clamp(digits, 0, Math.log10(unit)))} ${name}`;
}

/** Text in which no line breaks between a number and its unit. */
function unbroken(text) {
  return text.replace(/(\d) (s|ms|µs|GiB)\b/g, "$1\u00a0$2");
}

function gib(bytes) {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

/** How much more or less, with its sign. */
function signed(share) {
  return `${share < 0 ? "−" : "+"}${percent(Math.abs(share))}`;
}

/** A round step between marks of an axis: 1, 2 or 5 times a power of ten, at least `least`. */
function roundStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= least * 0.999);
}
