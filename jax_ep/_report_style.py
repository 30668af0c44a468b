# SPDX-License-Identifier: Apache-2.0
"""How the report's page looks: one style sheet, for light and dark, narrow and wide."""

CSS = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1a2028; --soft: #5a6573;
  --line: #dfe3e8; --cold: #f1f4f9; --hot: #b02a24; --bar: #3b6fd4; --tail: #b9cbf0; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1c2229; --ink: #e8ebef;
  --soft: #9aa5b1; --line: #323a44; --cold: #262e38; --hot: #d9574c; --bar: #6d98ee;
  --tail: #3a4c72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
header h1 { margin: 0; font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; font-weight: 650;
  overflow-wrap: anywhere; }
header p { margin: 6px 0 0; color: var(--soft); }
.tiles { display: grid; gap: 12px; margin: 22px 0;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; display: flex; flex-direction: column; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 1.65rem; font-weight: 620; line-height: 1.25; }
.tile .remark { color: var(--soft); font-size: 13px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 18px 20px; margin: 16px 0; }
h2 { margin: 0 0 4px; font-size: 1.15rem; font-weight: 630; }
.finding { margin: 0 0 14px; max-width: 92ch; }
.finding.alone { margin: 0; }
figure { margin: 14px 0 0; min-width: 0; }
figcaption { font-weight: 580; font-size: 14px; margin-bottom: 5px; }
figcaption small { font-weight: 400; color: var(--soft); font-size: 12.5px; }
.pair { display: grid; gap: 4px 28px; grid-template-columns: 3fr 2fr; }
.side { display: grid; gap: 4px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, max(260px, var(--least))), 1fr)); }
.frame { display: grid; grid-template-columns: max-content minmax(0, 1fr); }
.frame .y { position: relative; min-width: 2.6em; font-size: 12px; color: var(--soft); }
.frame .y span { position: absolute; right: 7px; transform: translateY(-50%); white-space: nowrap; }
.frame .plot { min-width: 0; }
.frame .plot img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px; }
.frame svg { display: block; width: 100%; height: 168px; overflow: visible; }
.frame polyline { fill: none; stroke-width: 2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
.frame .grid line { stroke: var(--line); vector-effect: non-scaling-stroke; }
.frame .x { grid-column: 2; display: flex; justify-content: space-between; font-size: 12px;
  color: var(--soft); padding-top: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 3px 14px; align-items: center; font-size: 12.5px;
  color: var(--soft); margin-top: 8px; }
.legend:empty { display: none; }
.legend img { width: 130px; height: 12px; border-radius: 3px; image-rendering: auto; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); font-size: 12.5px; white-space: nowrap; }
.matrix td { min-width: 33px; height: 33px; padding: 0 2px; text-align: center; font-size: 13px;
  border-radius: 4px; background: color-mix(in oklab, var(--hot) calc(var(--v) * 100%),
  var(--cold)); }
.matrix td.hot { color: #fff; }
.matrix td.self { background: none; border: 1px dashed var(--line); }
.matrix .axis { font-weight: 400; font-size: 12px; text-align: left; }
.matrix th[scope=row] { text-align: right; padding-right: 6px; }
.matrix.dense { border-spacing: 1px; }
.matrix.dense td { min-width: 13px; width: 13px; height: 13px; padding: 0; font-size: 0;
  border-radius: 2px; }
.matrix.dense th { font-size: 9px; line-height: 1; }
.times { width: 100%; table-layout: fixed; border-spacing: 0; }
.times th[scope=col] { text-align: left; padding: 0 10px 4px; }
.times th[scope=row] { text-align: left; color: var(--ink); white-space: normal; }
.times tbody th, .times tbody td { border-top: 1px solid var(--line); padding: 7px 10px; }
.times tbody th { padding-left: 0; }
.numbers { display: flex; justify-content: space-between; gap: 8px; font-size: 13.5px; }
.numbers span, .none { color: var(--soft); }
.bar { position: relative; display: block; height: 6px; margin-top: 3px; border-radius: 3px;
  background: var(--cold); overflow: hidden; }
.bar i, .bar b { position: absolute; inset: 0 auto 0 0; border-radius: 3px; min-width: 1px; }
.bar i { background: var(--tail); }
.bar b { background: var(--bar); }
.counts { width: 100%; }
.counts td:nth-child(2) { text-align: right; padding: 0 10px; }
.counts td:last-child { width: 75%; }
.counts th { text-align: left; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--soft); }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
code { font-size: .92em; }
@media (max-width: 720px) {
  main { padding: 18px 10px 32px; }
  section { padding: 14px 12px; border-radius: 10px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile .value { font-size: 1.35rem; }
  .pair { grid-template-columns: 1fr; }
  .times thead { display: none; }
  .times, .times tbody, .times tr, .times th, .times td { display: block; }
  .times tr { border-top: 1px solid var(--line); padding: 8px 0; }
  .times tbody th, .times tbody td { border: 0; padding: 3px 0; }
  .times tbody td { display: grid; grid-template-columns: 4.6em 1fr; align-items: center; }
  .times tbody td::before { content: attr(data-label); color: var(--soft); font-size: 12.5px;
    grid-row: span 2; }
}
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
