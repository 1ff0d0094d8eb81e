"use strict";
document.documentElement.classList.add("js");

// Curves: one cursor over all charts of a group, and the values of the chart under the pointer.
for (const group of document.querySelectorAll("[data-axis]")) {
  const { total, stages } = JSON.parse(group.dataset.axis);
  const crosses = group.querySelectorAll(".cross");

  const moveCursor = (step) => {
    for (const cross of crosses) {
      cross.setAttribute("x1", `${(100 * step) / total}%`);
      cross.setAttribute("x2", `${(100 * step) / total}%`);
    }
    group.classList.toggle("pointing", step !== null);
  };

  for (const panel of group.querySelectorAll(".panel")) {
    const svg = panel.querySelector(".plot");
    const tip = panel.querySelector(".tip");
    const series = JSON.parse(panel.querySelector("script").textContent);
    let at = total;

    const show = (step) => {
      at = Math.round(Math.min(Math.max(step, 0), total));
      const stage = Math.max(0, stages.findLastIndex(([, first]) => first <= at));
      moveCursor(at);
      const rows = series.flatMap(({ label, colour, lines }) => {
        const value = nearest(lines[stage], at);
        return value === null ? [] : [row(colour, label, value)];
      });
      tip.replaceChildren(heading(`${stages[stage][0]} · step ${(at - stages[stage][1]).toLocaleString("en")}`), ...rows);
      tip.hidden = false;
      tip.style.setProperty("--at", at / total);
      tip.classList.toggle("flip", at > total / 2);
    };
    const hide = () => {
      tip.hidden = true;
      moveCursor(null);
    };

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      show(((event.clientX - box.left) / box.width) * total);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", () => svg.matches(":focus-visible") && show(at));
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -total / 100, ArrowRight: total / 100, Home: -total, End: total };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(at + moves[event.key]);
    });
  }
}

function nearest([steps, values], at) {
  if (!steps.length) return null;
  let best = 0;
  for (let i = 1; i < steps.length; i++) {
    if (Math.abs(steps[i] - at) < Math.abs(steps[best] - at)) best = i;
  }
  return values[best];
}

function heading(text) {
  const element = document.createElement("b");
  element.textContent = text;
  return element;
}

function row(colour, label, value) {
  const element = document.createElement("span");
  element.className = colour;
  const number = document.createElement("strong");
  number.textContent = Math.abs(value) >= 0.001 || value === 0 ? Number(value.toPrecision(3)) : value.toExponential(1);
  element.append(document.createElement("i"), label, number);
  return element;
}

// Captions and answers: the frames of one sample time at a time.
const scrub = document.querySelector(".scrub");
if (scrub) {
  const range = scrub.querySelector("input");
  const play = scrub.querySelector("[data-play]");
  const shown = document.getElementById("time");
  const times = [...document.querySelectorAll("#times li")].map((item) => item.textContent);
  const frames = document.querySelectorAll(".frame");
  let timer = null;

  const go = (index) => {
    const time = Math.min(Math.max(index, 0), times.length - 1);
    range.value = time;
    range.setAttribute("aria-valuetext", times[time]);
    shown.textContent = times[time];
    for (const frame of frames) frame.hidden = Number(frame.dataset.time) !== time;
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
    play.setAttribute("aria-label", "Play");
  };
  const start = () => {
    if (Number(range.value) === times.length - 1) go(0);
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      go(Number(range.value) + 1);
      if (Number(range.value) === times.length - 1) stop();
    }, 700);
  };

  range.addEventListener("input", () => {
    stop();
    go(Number(range.value));
  });
  for (const button of scrub.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => {
      stop();
      go(Number(range.value) + Number(button.dataset.move));
    });
  }
  play.addEventListener("click", () => (timer === null ? start() : stop()));
  go(times.length - 1);
}
