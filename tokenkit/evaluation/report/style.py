"""The report's style sheet: no font, picture or script comes from elsewhere."""

CSS = """
:root { color-scheme: light dark; --bg: #fcfcfa; --card: #fff; --ink: #1b1e23; --muted: #575d66; --line:
  #dcdfe3; --soft: #f1f2f0; --accent: #0b5cad; --good: #0f6b45; --bad: #a32d1d; --s0: #0b63b0; --s1:
  #bf4a0c; --s2: #0d7466; --s3: #9b2c7c; --s4: #866000; --s5: #4f56b3; --fill: #cfe2f5; --c0: #cfe2f7;
  --c1: #cdeed6; --c2: #fbe6ae; --c3: #f9d3e6; --c4: #dfd7fb; --c5: #c2eef3; --none: #e4e6e9; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14161a; --card: #1b1e24; --ink: #e8eaed; --muted: #a4abb5; --line: #31363e; --soft:
    #22262d; --accent: #7ab8ff; --good: #6fd3a0; --bad: #ff9d8a; --s0: #6fb4ff; --s1: #ff9f6b; --s2:
    #4ed0ba; --s3: #ef8fcf; --s4: #e2b650; --s5: #aab3ff; --fill: #24425f; --c0: #1f4468; --c1: #1d4a31;
    --c2: #54420f; --c3: #582542; --c4: #3c3169; --c5: #144a52; --none: #343941; }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", sans-serif; overflow-wrap: break-word }
main, header, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem }
header { padding-top: 3rem }
footer { color: var(--muted); font-size: .85rem; padding-bottom: 3rem }
h1, h2, .big { font-family: Charter, "Iowan Old Style", Georgia, "Times New Roman", serif; font-weight:
  600 }
h1 { font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; margin: .2rem 0 .6rem; overflow-wrap:
  anywhere }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .4rem; padding-top: 1.1rem; border-top: 1px solid var(--line)
  }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; overflow-wrap: anywhere }
p { max-width: 46rem; margin: .5rem 0 }
.lead, .note, figcaption, caption { color: var(--muted) }
.kicker { color: var(--accent); font-weight: 600; font-size: .85rem; margin: 0 }
a { color: var(--accent) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11.5rem), 1fr)); gap:
  .8rem; margin: 1.4rem 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem
  1rem }
.tile dt { color: var(--muted); font-size: .85rem }
.tile dd { margin: 0 }
.big { font-size: 1.75rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.big small { color: var(--muted); font-size: .7em; font-weight: 400 }
.under { color: var(--muted); font-size: .85rem }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap:
  1rem }
.panel { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem .8rem .6rem; min-width: 0 }
.panel figcaption { font-size: .9rem; font-weight: 600; color: var(--ink); margin: 0 0 .3rem .2rem }
.chart { width: 100%; height: auto; display: block }
.chart text { fill: var(--muted); font: 11px system-ui, sans-serif }
.chart path, .swatch line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.grid { stroke: var(--line) }
.chart .pale { opacity: .28; stroke-width: 1 }
.swatch { width: 1.4rem; height: .6rem }
.s0 { stroke: var(--s0) }
.s1 { stroke: var(--s1) }
.s2 { stroke: var(--s2) }
.s3 { stroke: var(--s3) }
.s4 { stroke: var(--s4) }
.s5 { stroke: var(--s5) }
.end { fill: var(--card); stroke-width: 1.8 }
.legend { list-style: none; margin: .3rem 0 0; padding: 0 .2rem; display: flex; flex-wrap: wrap; gap:
  .1rem 1rem; font-size: .82rem; color: var(--muted) }
.legend b { color: var(--ink); font-weight: 600 }
.legend li { overflow-wrap: anywhere; min-width: 0 }
.scroll { overflow-x: auto; margin: 1rem 0 }
.scroll:focus-visible { outline: 2px solid var(--accent) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem }
caption { text-align: left; font-size: .85rem; padding-bottom: .4rem }
th, td { padding: .38rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align:
  top }
th:first-child, td.words { text-align: left }
th:first-child { padding-left: .2rem }
thead th { color: var(--muted); font-weight: 500; font-size: .85rem; vertical-align: bottom }
tbody th { font-weight: 500; overflow-wrap: anywhere }
td.words { overflow-wrap: anywhere }
td.bar { width: 18%; background: linear-gradient(to right, var(--fill) var(--w), transparent 0)
  no-repeat left .2rem top .38rem / 100% 1.5em }
.good { color: var(--good) }
.bad { color: var(--bad) }
.track { position: relative; height: 1.9rem; margin: .3rem .6rem 0 }
.track::before { content: ""; position: absolute; left: 0; right: 0; top: 50%; border-top: 1px solid
  var(--line) }
.dot { position: absolute; top: 50%; width: .9rem; height: .9rem; margin: -.45rem 0 0 -.45rem;
  border-radius: 50%; border: 2px solid var(--s0); background: var(--card) }
.dot.after { background: var(--s0) }
.way { position: absolute; top: 50%; height: 4px; margin-top: -2px; background: var(--fill) }
.teacher { position: absolute; top: .2rem; bottom: .2rem; border-left: 3px solid var(--s1) }
.scale { display: flex; max-width: none; justify-content: space-between; color: var(--muted); font-size:
  .8rem; margin: 0 .6rem }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; color: var(--muted);
  list-style: none; padding: 0; margin: .6rem 0 }
.keys i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; border: 2px solid
  var(--s0); vertical-align: -.1rem }
.keys i.after { background: var(--s0) }
.keys i.line { width: 0; border-radius: 0; border: 0; border-left: 3px solid var(--s1) }
.stack { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; margin: .8rem 0 .4rem;
  gap: 2px }
.stack span { min-width: 2px }
.f0 { background: var(--s0) }
.f1 { background: var(--s2) }
.f2 { background: var(--s4) }
.f3 { background: var(--s3) }
.f4 { background: var(--s5) }
.f5 { background: var(--s1) }
.key i { display: inline-block; width: .8rem; height: .8rem; vertical-align: -.05rem; margin-right:
  .2rem }
.key i, .keys i.square { border: 0; border-radius: .2rem }
.aligned { line-height: 1; margin: .4rem 0 1.2rem }
.cell { display: inline-flex; flex-direction: column; margin: 0 3px 6px 0; border-radius: .3rem;
  vertical-align: top; font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, monospace; max-width: 100%;
  overflow: hidden }
.side { min-height: 1.5em; padding: 0 .2rem; white-space: pre-wrap; overflow-wrap: anywhere }
.side + .side { border-top: 1px solid var(--bg) }
.side bdi + bdi { border-left: 1px solid var(--muted) }
.side bdi { padding: 0 1px }
.k0 { background: var(--c0) }
.k1 { background: var(--c1) }
.k2 { background: var(--c2) }
.k3 { background: var(--c3) }
.k4 { background: var(--c4) }
.k5 { background: var(--c5) }
.kn { background: var(--none) }
blockquote { margin: .8rem 0; padding: .1rem 0 .1rem 1rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 46rem }
blockquote b { color: var(--accent); font-weight: 600 }
pre { background: var(--soft); border-radius: .4rem; padding: .8rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, monospace; margin: .6rem 0 }
details { margin: 1rem 0 }
summary { cursor: pointer; color: var(--accent); font-weight: 500 }
@media (max-width: 30rem) {
  header { padding-top: 1.6rem }
  th, td { padding: .35rem .3rem }
  table { font-size: .85rem }
}
@media print {
  body { font-size: 11pt }
  .panel, .tile, blockquote { break-inside: avoid }
  h2 { break-after: avoid }
}
"""
