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
      const rows = series.flatMap(({ label, colour, lines, chance }) => {
        const value = nearest(lines[stage], at);
        return value === null ? [] : [row(colour, label, value, chance[stage])];
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

function short(value) {
  return Math.abs(value) >= 0.001 || value === 0 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

function row(colour, label, value, chance = null) {
  const element = document.createElement("span");
  element.className = colour;
  const number = document.createElement("strong");
  number.textContent = chance === null ? short(value) : `${short(value)}, chance ${short(chance)}`;
  element.append(document.createElement("i"), label, number);
  return element;
}

// The film: one moment of the run at a time.
const film = document.querySelector(".film");
if (film) {
  const { texts, seen, matrix } = JSON.parse(film.querySelector("script").textContent);
  const range = film.querySelector("input[type=range]");
  const play = film.querySelector("[data-play]");
  const shown = document.getElementById("time");
  const frames = film.querySelectorAll(".frame");
  const marks = film.querySelectorAll(".marks i");
  const look = film.querySelector(".look");
  const last = texts.length - 1;
  let timer = null;

  const go = (index) => {
    const time = Math.min(Math.max(index, 0), last);
    range.value = time;
    range.setAttribute("aria-valuetext", texts[time]);
    shown.textContent = texts[time];
    for (const frame of frames) frame.hidden = Number(frame.dataset.time) !== time;
    marks.forEach((mark, place) => mark.classList.toggle("now", place === time));
    if (look) look.querySelector("small").textContent = seen[time];
    if (matrix) drawMatrix(film.querySelector(".matrix"), matrix, time);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
    play.setAttribute("aria-label", "Play");
  };
  const start = () => {
    if (Number(range.value) === last) go(0);
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      go(Number(range.value) + 1);
      if (Number(range.value) === last) stop();
    }, 1000);
  };
  const toggle = () => (timer === null ? start() : stop());
  const step = (by) => {
    stop();
    go(Number(range.value) + by);
  };

  range.addEventListener("input", () => step(0));
  for (const button of film.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => step(Number(button.dataset.move)));
  }
  play.addEventListener("click", toggle);
  look?.addEventListener("change", () => film.classList.toggle("plain", !look.firstChild.checked));
  for (const veil of film.querySelectorAll(".veil")) drawVeil(veil);
  film.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last };
    const hasSpace = event.target.closest("button, [type=checkbox]");
    if (event.key === " " && !hasSpace) toggle();
    else if (event.key in moves) step(moves[event.key]);
    else return;
    event.preventDefault();
  });
  go(last);
}

// A dark picture of as many pixels as the grid has parts, clear where a score comes from.
function drawVeil(canvas) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  [...canvas.dataset.seen].forEach((letter, index) => {
    image.data[4 * index + 3] = 205 * (1 - parseInt(letter, 36) / 35);
  });
  context.putImageData(image, 0, 0);
}

function drawMatrix(figure, { values, closest, at, texts }, time) {
  const place = at[time];
  const svg = figure.querySelector("svg.heat");
  svg.querySelectorAll(".cell").forEach((cell, index) => {
    cell.style.fillOpacity = 0.04 + 0.0096 * values[place][index]; // as similarity.py draws the last one
  });
  svg.querySelectorAll(".closest").forEach((dot, row) => {
    dot.style.transform = `translateX(${svg.dataset.cell * closest[place][row]}px)`;
  });
  figure.classList.toggle("past", time !== at.indexOf(place));
  figure.querySelector("figcaption span").textContent = texts[time];
}
