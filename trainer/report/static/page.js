// Draws the charts and switches the samples. Without this file the numbers and every sample are there as text.
"use strict";

(() => {
  const { charts, best } = JSON.parse(document.getElementById("data").textContent);
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 4], [1, 2]];
  const PAGE = 10;
  const MOST_DOTS = 60;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const printing = matchMedia("print");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const told = (value) => {
    if (value == null) return "–";
    const short = Number(value.toPrecision(4));
    return short !== 0 && Math.abs(short) < 1e-3 ? short.toExponential() : String(short);
  };

  // The value at a place, or the last one before it: held-out prompts are judged every so many steps only.
  const latest = (values, at) => {
    while (at > 0 && values[at] === undefined) at -= 1;
    return at;
  };

  function draw(place) {
    const chart = charts[place.dataset.chart];
    const xs = uPlot.join(chart.curves.map((curve) => [curve.x, curve.y]));
    const own = xs.slice(1);
    // Stacked curves are drawn from the sum of all down to the first, each over the one before.
    const drawn = chart.stacked
      ? own.map((_, top) => own[0].map((_, at) => own.slice(0, top + 1).reduce((sum, each) => sum + (each[at] ?? 0), 0)))
      : own;
    const order = chart.curves.map((_, index) => index);
    if (chart.stacked) order.reverse();
    const soft = colour("--soft");
    const axis = { stroke: soft, font: "12px system-ui, sans-serif", grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };

    const marks = (plot) => {
      const { ctx, bbox } = plot;
      const [low, high] = [plot.scales.x.min, plot.scales.x.max];
      const line = (step, dash, stroke) => {
        if (step == null || step < low || step > high) return;
        const at = Math.round(plot.valToPos(step, "x", true));
        ctx.save();
        ctx.beginPath();
        ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
        ctx.strokeStyle = stroke;
        ctx.lineWidth = devicePixelRatio;
        ctx.moveTo(at, bbox.top);
        ctx.lineTo(at, bbox.top + bbox.height);
        ctx.stroke();
        ctx.restore();
      };
      chart.resumes.forEach((steps) => steps.forEach((step) => line(step + 0.5, [6, 5], soft)));
      if (place.dataset.chart === "reward_mean") best.forEach((step) => line(step, [1, 3], colour("--ink")));
    };

    const plot = new uPlot(
      {
        width: Math.max(place.clientWidth, 200),
        height: 220,
        scales: {
          x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
          y: {
            range: (_, low, high) => {
              if (low == null) return [0, 1];
              const bottom = chart.floor == null ? low : Math.max(low, chart.floor);
              return uPlot.rangeNum(bottom, Math.max(high, bottom), { min: { pad: 0.1, soft: 0, mode: 3 }, max: { pad: 0.1, soft: 0, mode: 3 } });
            },
          },
        },
        axes: [
          { ...axis, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000] },
          { ...axis, size: 58, values: (_, splits) => splits.map(told) },
        ],
        cursor: {
          sync: { key: "steps" },
          points: { size: 7 },
          dataIdx: (plot, series, at) => (series === 0 ? at : latest(own[order[series - 1]], at)),
        },
        series: [
          { label: "step", value: (_, step) => (step == null ? "–" : String(step)) },
          ...order.map((index) => {
            const curve = chart.curves[index];
            const stroke = colour(`--curve-${curve.style}`);
            const dotted = curve.dots && curve.x.length <= MOST_DOTS;
            const alone = curve.y.filter((value) => value != null).length === 1;
            return {
              label: curve.label,
              stroke,
              width: curve.dots && !dotted ? 2.5 : 1.5,
              dash: chart.stacked ? [] : DASHES[curve.style],
              fill: chart.stacked ? stroke : undefined,
              points: { show: dotted || alone, size: 7, fill: stroke },
              value: (_, value, series, at) => (at == null ? "–" : told(own[index][at])),
            };
          }),
        ],
        hooks: { draw: [marks] },
      },
      [xs[0], ...order.map((index) => drawn[index])],
      place,
    );

    // One stop for the keyboard and for screen readers, which hears the values of the step that the cursor is at.
    const { over } = plot;
    const steps = xs[0];
    const say = (at) => {
      const values = chart.curves.map((curve, index) => `${curve.label} ${told(own[index][latest(own[index], at)])}`);
      over.setAttribute("aria-valuenow", steps[at]);
      over.setAttribute("aria-valuetext", `step ${steps[at]}: ${values.join(", ")}`);
    };
    over.tabIndex = 0;
    over.setAttribute("role", "slider");
    over.setAttribute("aria-label", `${chart.title}: step`);
    over.setAttribute("aria-valuemin", steps[0]);
    over.setAttribute("aria-valuemax", steps.at(-1));
    say(steps.length - 1);
    over.addEventListener("keydown", (event) => {
      const from = plot.cursor.idx ?? steps.length - 1;
      const moves = { ArrowLeft: from - 1, ArrowRight: from + 1, PageDown: from - PAGE, PageUp: from + PAGE, Home: 0, End: steps.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const at = Math.min(Math.max(moves[event.key], 0), steps.length - 1);
      plot.setCursor({ left: plot.valToPos(steps[at], "x"), top: 0 }, true, true);
      say(at);
    });
    return plot;
  }

  const places = [...document.querySelectorAll("[data-chart]")];
  let plots = [];
  const drawAll = () => {
    plots.forEach((plot) => plot.destroy());
    plots = places.map(draw);
  };
  drawAll();
  dark.addEventListener("change", drawAll);
  printing.addEventListener("change", drawAll);
  new ResizeObserver(() => {
    plots.forEach((plot, index) => plot.setSize({ width: Math.max(places[index].clientWidth, 200), height: 220 }));
  }).observe(document.getElementById("main"));

  for (const control of document.querySelectorAll("[data-shows]")) {
    const panels = [...document.querySelectorAll(`[data-panel="${control.dataset.shows}"]`)];
    const names = control.dataset.names && JSON.parse(control.dataset.names);
    const show = () => {
      panels.forEach((panel, index) => { panel.hidden = index !== Number(control.value); });
      if (!names) return;
      control.nextElementSibling.value = names[control.value];
      control.setAttribute("aria-valuetext", `step ${names[control.value]}`);
    };
    control.addEventListener("input", show);
    show();
  }
})();
