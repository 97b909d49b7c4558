// What a transformer without modulation weights can draw: the schedules of its file, {steps, width, height}, or
// {steps, lightning} of any size. An empty list: everything can be drawn.

/** The sizes there are, as "WxH"; empty: any. */
export const sizes = (schedules) => [...new Set(schedules.filter((s) => s.width).map((s) => `${s.width}x${s.height}`))];

const nearest = (list, far) => list.reduce((best, s) => (far(s) < far(best) ? s : best));

/** The schedule that is nearest to the values, in its size first; none where everything can be drawn. */
export function fitting(schedules, { width, height, steps }) {
  if (!schedules.length) return undefined;
  const away = (s) => (s.width ? Math.abs(s.width - width) + Math.abs(s.height - height) : 0);
  const least = Math.min(...schedules.map(away));
  return nearest(schedules.filter((s) => away(s) === least), (s) => Math.abs(s.steps - steps));
}
