// The page's frame: views, key, theme, and what the server says of itself.

import { json, key, Refused, setKey } from "./api.js";
import { $, number } from "./dom.js";
import { Race } from "./race.js";
import { Server } from "./server.js";
import { Watch } from "./watch.js";

const VIEWS = ["watch", "race", "server"];
const THEMES = ["auto", "light", "dark"];
const THEME = "fastblt-theme";

function report(error) {
  const box = $("problem");
  box.hidden = error === null;
  if (error === null) return;
  box.textContent = error.message;
  if (error instanceof Refused && error.status === 401) {
    box.textContent = "This server wants an API key.";
    showKey(true);
    $("key").focus();
  } else if (!(error instanceof Refused)) {
    console.error(error);
  }
}

const watch = new Watch(report);
const race = new Race(report);
const server = new Server(report);

// Views

function view(name, focus) {
  for (const one of VIEWS) {
    const tab = $(`tab-${one}`);
    $(one).hidden = one !== name;
    tab.setAttribute("aria-selected", one === name);
    tab.tabIndex = one === name ? 0 : -1;
    if (one === name && focus) tab.focus();
  }
  server.open = name === "server";
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  window.dispatchEvent(new Event("resize"));
}

const fromHash = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "watch");

for (const name of VIEWS) {
  $(`tab-${name}`).addEventListener("click", () => view(name, true));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) view(VIEWS[(VIEWS.indexOf(name) + step + VIEWS.length) % VIEWS.length], true);
  });
}
window.addEventListener("hashchange", () => view(fromHash(), false));

// Key

function showKey(open) {
  $("key-form").hidden = !open;
  $("key-button").setAttribute("aria-expanded", open);
}

$("key-button").addEventListener("click", () => {
  showKey($("key-form").hidden);
  if (!$("key-form").hidden) $("key").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  showKey(false);
  meet();
});
$("key").value = key();

// Theme

const dark = window.matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try {
  theme = THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto";
} catch {
  // Without storage the system's theme is taken.
}

function paint() {
  document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  $("theme-button").textContent = `Theme: ${theme}`;
}

$("theme-button").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try {
    localStorage.setItem(THEME, theme);
  } catch {
    // It is kept for this visit only.
  }
  paint();
});
dark.addEventListener("change", paint);
paint();

// The model

async function meet() {
  try {
    const model = (await json("v1/models")).data[0];
    $("model-line").textContent = `${model.id} · up to ${number(model.max_model_len)} bytes · patches at ${model.patching_threshold.toFixed(2)} nats`;
    watch.settings.limit(model.block_sizes);
    race.limit(model.block_sizes);
    report(null);
    server.open = fromHash() === "server";
  } catch (error) {
    if (error instanceof Refused && error.status === 503) {
      $("model-line").textContent = `${error.message}…`;
      setTimeout(meet, 1000);
      return;
    }
    $("model-line").textContent = "no model yet";
    report(error);
    if (error.status === 0) setTimeout(meet, 3000);
  }
}

view(fromHash(), false);
meet();
