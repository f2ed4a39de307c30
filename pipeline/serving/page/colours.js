// Surprise in nats -> colours: dark blue for what was certain, over red, to yellow. Knows numbers
// alone.

const STOPS = [
  [23, 32, 86],
  [112, 34, 120],
  [201, 58, 87],
  [245, 130, 49],
  [252, 229, 112],
];

/** The colour of a share from 0 to 1, in CSS. */
export function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(at), STOPS.length - 2);
  const part = at - below;
  const mixed = STOPS[below].map((value, i) => Math.round(value + (STOPS[below + 1][i] - value) * part));
  return `rgb(${mixed.join(" ")})`;
}

/** All colours from left to right, as a CSS image. */
export function scale() {
  const stops = STOPS.map((_, i) => colour(i / (STOPS.length - 1)));
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

/** Whether letters on the colour are to be dark. */
export function isLight(share) {
  return share > 0.6;
}
