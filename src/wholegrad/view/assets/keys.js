// Keyboard shortcuts, and the list of them.
import { el, toast } from "./net.js";

const dialog = document.getElementById("shortcuts");

// groups: [title, [[keys, what, action], ...]]; an action may return what to say.
export function bind(groups) {
  const actions = new Map();
  const list = document.getElementById("shortcut-list");
  for (const [title, keys] of groups) {
    const part = el("div", {}, el("h3", { text: title }));
    for (const [names, what, action] of keys) {
      part.append(el("p", {}, el("span", { text: what }), el("span", {}, ...names.filter((name) => LABELS[name] !== "").map((name) => el("kbd", { text: LABELS[name] || name })))));
      for (const name of names) actions.set(name, action);
    }
    list.append(part);
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    const field = event.target.closest?.("input, button, summary, select, textarea");
    const own = field && (event.key === " " || event.key === "Enter" || (field.type === "range" && /^(Arrow|Home|End|Page)/.test(event.key)));
    if (own) return;
    const action = actions.get(event.key) || (event.key.length === 1 ? actions.get(event.key.toLowerCase()) : undefined);
    if (!action) return;
    event.preventDefault();
    const said = action(event);
    if (typeof said === "string" && said) toast(said);
  });
  document.getElementById("help").addEventListener("click", () => dialog.showModal());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}

export function help() { dialog.showModal(); }

const LABELS = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", " ": "space", "=": "", "-": "−", Home: "" };
