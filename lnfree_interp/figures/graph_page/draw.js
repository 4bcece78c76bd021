"use strict";
// Draws the attribution graphs of the page, one at a time. Text is only ever set as text, never as markup.
const $ = (id) => document.getElementById(id);
const plot = $("plot");
const graphs = JSON.parse($("graphs").textContent).map(prepared);
// The path: the pinned node last, and how it was reached. `pointed`: the node under the pointer or with the focus.
// `chosen`: whether the slider has been moved.
const state = { graph: graphs[0], path: [], pointed: null, chosen: false };

// ---------------------------------------------------------------------------------------------------------
// Data

function prepared(graph) {
  const { nodes } = graph;
  nodes.forEach((node, i) => Object.assign(node, { i, into: [], outof: [], read: 0 }));
  graph.edges = graph.edges.map(([sender, receiver, entry]) => ({ from: nodes[sender], to: nodes[receiver], entry }));
  for (const edge of graph.edges) edge.to.read += Math.abs(edge.entry);
  for (const edge of graph.edges) {
    edge.share = edge.to.read ? Math.abs(edge.entry) / edge.to.read : 0;
    edge.influence = edge.share * edge.to.influence;
    edge.rest = isRest(edge.from);
    edge.to.into.push(edge);
    edge.from.outof.push(edge);
  }
  graph.edges.sort((a, b) => b.influence - a.influence);
  for (const node of nodes) {
    node.into.sort((a, b) => b.share - a.share);
    node.outof.sort((a, b) => b.influence - a.influence);
  }
  const inner = nodes.filter(({ kind }) => kind === "head" || kind === "neuron" || kind === "mlp");
  graph.most = Math.max(1e-9, ...inner.map((node) => node.influence));
  return graph;
}

function isRest(node) { return node.kind === "bias" || node.kind === "error"; }
function pinned() { return state.path[state.path.length - 1]; }
function sign(x) { return x > 0 ? "plus" : x < 0 ? "minus" : "none"; }
function percent(x) {
  if (x > 0 && x < 5e-5) return "<0.01%";
  return `${(100 * x).toFixed(x >= 0.0995 || x === 0 ? 0 : x >= 0.00995 ? 1 : 2)}%`;
}
function number(x, signed = false) {
  const size = Math.abs(x);
  const text = size === 0 ? "0" : size >= 1e5 || size < 1e-3 ? size.toExponential(2) : size.toPrecision(3);
  return (x < 0 ? "−" : signed && x > 0 ? "+" : "") + (text.includes("e") ? text : String(Number(text)));
}
function visible(text) { return text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥"); }

// ---------------------------------------------------------------------------------------------------------
// Elements

function html(tag, text = "", properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(text);
  return element;
}

function svg(tag, attributes, parent) {
  const element = document.createElementNS(plot.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

// ---------------------------------------------------------------------------------------------------------
// Where the nodes are: a column per position, two rows per layer (heads, then neurons or the MLP), the logit on top

const PITCH = { head: 23, mlp: 23, neuron: 15, token: 23, logit: 26, bias: 46, error: 46 };
const LAYERS_WIDTH = 42, TOKENS_HEIGHT = 36; // of the strips that stay while the plot scrolls: see the style
const PER_LINE = { head: 4, neuron: 6, mlp: 4 };

function rowOf(graph, node) {
  if (node.kind === "logit") return 2 * graph.n_layers + 1;
  return node.layer < 0 ? 0 : 2 * node.layer + (node.kind === "head" ? 1 : 2);
}

function laidOut(graph) {
  const cells = new Map();
  for (const node of graph.nodes) {
    const column = isRest(node) ? 0 : 1 + node.pos, row = rowOf(graph, node), key = `${row},${column}`;
    if (!cells.has(key)) cells.set(key, { row, column, nodes: [] });
    cells.get(key).nodes.push(node);
  }
  const width = [0, ...graph.tokens.map((token) => Math.min(96, Math.max(38, 8 * visible(token).length + 8)))];
  const height = Array(2 * graph.n_layers + 2).fill(10);
  for (const cell of cells.values()) {
    const { nodes } = cell, { kind } = nodes[0], pitch = PITCH[kind];
    const perLine = Math.max(PER_LINE[kind] || 4, Math.ceil(Math.sqrt(2 * nodes.length)));
    nodes.sort((a, b) => a.unit - b.unit);
    Object.assign(cell, { pitch, perLine, lines: Math.ceil(nodes.length / perLine) });
    width[cell.column] = Math.max(width[cell.column], pitch * Math.min(nodes.length, perLine) + 14);
    height[cell.row] = Math.max(height[cell.row], pitch * cell.lines + 18);
  }
  const left = [0], bottom = [0];
  width.forEach((w, i) => left.push(left[i] + w));
  height.forEach((h, i) => bottom.push(bottom[i] + h));
  const total = bottom[height.length];
  for (const { row, column, nodes, pitch, perLine, lines } of cells.values()) {
    const x = left[column] + width[column] / 2, y = total - bottom[row] - height[row] / 2;
    nodes.forEach((node, k) => {
      const line = Math.floor(k / perLine), there = Math.min(perLine, nodes.length - line * perLine);
      node.x = x + pitch * ((k % perLine) - (there - 1) / 2);
      node.y = y - pitch * (line - (lines - 1) / 2);
    });
  }
  return { left, width, bottom, height, total, right: left[width.length] };
}

function radius(graph, node) {
  if (node.kind === "logit") return 11;
  const size = Math.sqrt(Math.min(1, node.influence / graph.most));
  return node.kind === "neuron" ? 2.4 + 4.6 * size : 4.5 + 6 * size;
}

// ---------------------------------------------------------------------------------------------------------
// Drawing

function drawGraph() {
  const { graph } = state, at = laidOut(graph);
  graph.at = at;
  const [leftOut, logit] = graph.nodes.slice(-2);
  $("title").textContent = `Where ${logit.label} comes from`;
  const said = graph.prompt === null ? graph.tokens.join("") : graph.prompt;
  $("prompt").textContent = `${graph.model} on “${said}”`;
  const chance = graph.probability ? ` (p = ${number(graph.probability)})` : "";
  $("facts").textContent = [
    `${number(logit.input)} logits${chance}`,
    `${graph.nodes.length} nodes that hold ${percent(graph.kept)} of the influence of all, ${graph.edges.length} edges`,
    `over all paths ${percent(leftOut.influence)} comes from what is left out`,
    discrepancy(graph),
  ].join(" · ");
  plot.setAttribute("width", at.right);
  plot.setAttribute("height", at.total);
  plot.setAttribute("viewBox", `0 0 ${at.right} ${at.total}`);
  drawGround(graph, at);
  $("nodes").replaceChildren();
  for (const node of graph.nodes) drawNode(graph, node);
  drawAll();
}

function discrepancy(graph) {
  return `discrepancy of the norms ${percent(graph.discrepancy)}: entries ` +
    (graph.discrepancy < 5e-5 ? "are exact" : "hold each norm's scale as it is");
}

function drawGround(graph, at) {
  const ground = $("ground"), layers = $("layers"), tokens = $("tokens");
  for (const element of [ground, layers, tokens]) element.replaceChildren();
  for (let layer = 0; layer < graph.n_layers; layer++) {
    const from = at.bottom[2 * layer + 1], to = at.bottom[2 * layer + 3], y = at.total - to;
    if (layer % 2 === 0) svg("rect", { class: "band", x: 0, y, width: at.right, height: to - from }, ground);
    layers.append(html("div", `L${layer}`, { style: `top:${y + (to - from) / 2 - 6}px` }));
  }
  layers.append(html("div", "logit", { style: `top:${at.height[at.height.length - 1] / 2 - 6}px` }));
  layers.append(html("div", "token", { style: `top:${at.total - at.height[0] / 2 - 6}px` }));
  at.width.forEach((width, column) => {
    const x = at.left[column] + width / 2;
    if (column) svg("line", { class: "rule", x1: x, x2: x, y1: 0, y2: at.total }, ground);
    const style = `left:${at.left[column]}px;width:${width}px`;
    const text = column ? visible(graph.tokens[column - 1]) : "rest";
    const title = column ? graph.tokens[column - 1] : "biases, and what is left out";
    const label = html("div", text, { style, title });
    label.append(html("small", column ? String(column - 1) : ""));
    tokens.append(label);
  });
}

function drawNode(graph, node) {
  const { x, y, kind } = node, r = radius(graph, node);
  const g = svg("g", { class: `node ${sign(node.effect)}`, "data-node": node.i, role: "button" }, $("nodes"));
  g.setAttribute("tabindex", kind === "logit" ? 0 : -1);
  g.setAttribute("aria-label", `${node.label}, influence ${percent(node.influence)}`);
  const box = { x: x - r, y: y - r, width: 2 * r, height: 2 * r };
  if (kind === "head") svg("circle", { class: "shape", cx: x, cy: y, r }, g);
  else if (kind === "neuron") svg("circle", { class: "shape full", cx: x, cy: y, r }, g);
  else if (kind === "mlp") svg("rect", { class: "shape", ...box }, g);
  else if (kind === "token") svg("rect", { class: "shape full", ...box, rx: 3 }, g);
  else if (kind === "logit") svg("path", { class: "shape", d: `M${x} ${y - r}l${r} ${r}l${-r} ${r}l${-r} ${-r}z` }, g);
  else svg("path", { class: "shape", d: `M${x} ${y - r}l${r} ${1.8 * r}h${-2 * r}z`, "stroke-dasharray": "3 2" }, g);
  if (kind === "head" && r > 6.5) svg("text", { x, y: y + 3 }, g).textContent = node.unit;
  if (isRest(node)) svg("text", { x, y: y + r + 10 }, g).textContent = node.label;
  if (kind === "logit") {
    // Its name stands beside it, where there is room: the rest of its row is empty.
    const end = x > graph.at.right / 2;
    const style = `text-anchor:${end ? "end" : "start"}`;
    svg("text", { class: "beside", x: x + (end ? -17 : 17), y: y + 5, style }, g).textContent = node.label;
  }
  node.element = g;
}

// Edges hold numbers alone, so that they can be written as markup, which is much the fastest.
function curves(edges, width) {
  return edges.map((edge) => {
    const { x: x1, y: y1 } = edge.from, { x: x2, y: y2 } = edge.to, middle = (y1 + y2) / 2;
    const d = `M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`;
    const clear = (0.2 + 0.8 * Math.sqrt(edge.share)).toFixed(2);
    return `<path class="edge ${sign(edge.entry)}" d="${d}" stroke-width="${width(edge)}" stroke-opacity="${clear}"/>`;
  }).join("");
}

function thick(edge) { return (0.7 + 6 * edge.share).toFixed(2); }

// On the slider's own scale, by equal factors; at its beginning all edges.
function smallest() {
  const { edges } = state.graph, at = $("least").value / 100;
  if (!edges.length || at === 0) return 0;
  const most = edges[0].influence, least = Math.max(most * 1e-5, edges[edges.length - 1].influence);
  return most * (least / most) ** (1 - at);
}

function drawAll() {
  const { edges } = state.graph, least = smallest() * (1 - 1e-9), all = `${edges.length} edges`;
  const shown = edges.filter((edge) => edge.influence >= least && ($("rest").checked || !edge.rest));
  $("all").innerHTML = curves(shown, thick);
  $("shown").textContent = `${least ? `${percent(least)} of the influence` : "any"}: ${shown.length} of ${all}`;
  drawFocus();
}

// What is pointed at, or else pinned, with all its edges; and the path followed.
function drawFocus() {
  const { graph } = state, node = state.pointed || pinned();
  const edges = node ? [...node.into, ...node.outof] : [];
  const near = new Set([...(node ? [node] : []), ...state.path, ...edges.flatMap((edge) => [edge.from, edge.to])]);
  plot.classList.toggle("some", Boolean(node));
  $("hot").innerHTML = curves(edges, thick);
  $("trail").innerHTML = curves(steps().filter(Boolean), () => 2);
  for (const other of graph.nodes) {
    other.element.classList.toggle("near", near.has(other));
    other.element.classList.toggle("at", state.path.includes(other));
  }
}
