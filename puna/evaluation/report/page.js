"use strict";
const root = document.documentElement;
const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const button = document.getElementById("theme");
const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
try { const kept = localStorage.getItem("puna-theme"); if (kept) root.dataset.theme = kept; } catch { /* a file may have no storage */ }
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  try { localStorage.setItem("puna-theme", root.dataset.theme); } catch { /* then it is not remembered */ }
  name();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
name();

// In the lineage, a row lights up with the arcs that lead to it and from it, and the rows at their other ends.
const rows = [...document.querySelectorAll(".tree li")];
const arcs = [...document.querySelectorAll(".arc")];
rows.forEach((row, i) => {
  const near = arcs.filter(a => +a.dataset.from === i || +a.dataset.to === i);
  const mark = on => near.forEach(a => {
    a.classList.toggle("on", on);
    [a.dataset.from, a.dataset.to].forEach(j => rows[j].classList.toggle("on", on));
  });
  row.addEventListener("mouseenter", () => mark(true));
  row.addEventListener("mouseleave", () => mark(false));
});
