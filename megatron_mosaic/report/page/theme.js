// Colours of the canvas follow those of the style sheet.

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["paper", "panel", "track", "line", "text", "quiet", "accent", "alarm"];
  const theme = Object.fromEntries(names.map((name) => [name, read(name)]));
  return { ...theme, dark: document.documentElement.dataset.theme === "dark" };
}

/** Forward and backward colour of a module; on dark paper the light one of the pair is dimmed. */
function moduleColors(module, theme) {
  const [forward, backward] = module.colors;
  if (!theme.dark) return { forward, backward, onForward: "#ffffff", onBackward: "#333333" };
  const dimmed = mixed(forward, theme.paper, 0.55);
  return { forward, backward: dimmed, onForward: "#ffffff", onBackward: "#dfe4e8" };
}

function mixed(color, other, share) {
  const parts = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const from = parts(color);
  const to = parts(other);
  return `rgb(${from.map((part, n) => Math.round(part + share * (to[n] - part))).join(" ")})`;
}

/** Fits a canvas to a size in CSS pixels, sharp on any screen, and clears it. */
function prepared(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

const FONT = 'system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif';
