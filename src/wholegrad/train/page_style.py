"""The report's looks, for light and dark ground, and for paper."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #fbfbfa; --card: #ffffff; --ink: #1f242b; --muted: #66707b; --rule: #e2e4e7;
  --c1: #2563b8; --c2: #c2571a; --c3: #16805c; --c4: #7a3cbe; --bar: #cfe0f5; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171b; --card: #1c2026; --ink: #e6e8eb; --muted: #98a2ad; --rule: #323840;
  --c1: #74aaf2; --c2: #f0985c; --c3: #57c99c; --c4: #bd95ec; --bar: #29425f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 2.6rem 0 0.8rem; font-size: 1.2rem; }
p { margin: 0.3rem 0 0.9rem; } header p, h2 + p, small, figcaption { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 0.8rem; margin-top: 1.4rem; }
.tile, .chart, .picture { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 0.9rem 1.1rem; display: flex; flex-direction: column; }
.tile strong { font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 0.9rem; }
.chart { margin: 0; padding: 0.9rem 1rem 0.6rem; }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0.2rem 1rem; }
.chart b { color: var(--ink); } .chart svg { display: block; width: 100%; height: auto; margin-top: 0.4rem; }
.legend { display: flex; gap: 0.9rem; font-size: 0.85rem; }
.key::before { content: ""; display: inline-block; width: 0.9em; height: 3px; margin-right: 0.4em;
  vertical-align: middle; border-radius: 2px; background: var(--c); }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.faint { stroke-width: 1; opacity: 0.35; } .key.faint::before { opacity: 0.45; }
.dot { fill: var(--c); } .grid { stroke: var(--rule); } .tick { fill: var(--muted); font-size: 11.5px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.45rem 0.8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
tfoot td { border-bottom: 0; font-weight: 600; }
.bar { position: relative; min-width: 170px; }
.bar span { position: absolute; inset: 0.35rem auto 0.35rem 0; background: var(--bar); border-radius: 4px; }
.bar b { position: relative; font-weight: 600; }
.picture { margin: 0 0 0.9rem; padding: 0.8rem; } .picture img { display: block; width: 100%; border-radius: 6px; }
.picture figcaption { padding: 0.6rem 0.2rem 0; }
dl { margin: 0; } dt { font-weight: 600; margin-top: 0.7rem; } dd { margin: 0; color: var(--muted); }
details { margin-top: 0.9rem; } summary { cursor: pointer; color: var(--c1); }
pre { overflow-x: auto; padding: 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { .chart, .tile, .picture { break-inside: avoid; } }
"""
