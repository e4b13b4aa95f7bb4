// Asking the server, and saying plainly when it cannot answer.
const banner = document.getElementById("banner");
const text = document.getElementById("banner-text");
const dismissed = new Set();
let shown = "";

document.getElementById("banner-close").addEventListener("click", () => {
  dismissed.add(shown);
  banner.hidden = true;
});

export function complain(said) {
  if (dismissed.has(said)) return;
  shown = said;
  text.textContent = said;
  banner.hidden = false;
}

export function settled() { // the server answers again
  if (shown === closed.said) banner.hidden = true;
}

export const closed = { said: "The viewer was closed: wholegrad view no longer runs. Start it again to go on." };

export async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name !== "AbortError") complain(closed.said);
    throw error;
  }
  if (!response.ok) {
    if (response.status === 500) explain();
    throw new Error(`${response.status}`);
  }
  settled();
  return response.json();
}

let asking = false;
let asked = -Infinity;
export async function explain() { // why a tile is missing
  if (asking || performance.now() - asked < 1000) return;
  asking = true;
  asked = performance.now();
  try {
    const { problems } = await ask("problems.json");
    if (problems.length) complain(problems[problems.length - 1]);
  } catch { /* said already */ } finally {
    asking = false;
  }
}

// Ask again and again while work goes on; `on` gets every state. Returns a function that stops it.
export function follow(path, on) {
  let stopped = false;
  (async () => {
    for (let wait = 150; !stopped; wait = Math.min(1000, wait * 1.3)) {
      let state;
      try { state = await ask(path); } catch { return; }
      if (stopped) return;
      on(state);
      if (state.state !== "running") return;
      await new Promise((done) => setTimeout(done, wait));
    }
  })();
  return () => { stopped = true; };
}

let toasting;
export function toast(said) {
  const line = document.getElementById("toast");
  line.textContent = said;
  line.classList.add("on");
  clearTimeout(toasting);
  toasting = setTimeout(() => line.classList.remove("on"), 1600);
}

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
