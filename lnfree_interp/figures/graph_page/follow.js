// What people do with the graphs that draw.js has drawn: point, pin, follow a path, change models.

// ---------------------------------------------------------------------------------------------------------
// Card, panel, path

const SHARE = "|entry|, of the sum of all |entries| that the reader reads";
const READS = { neuron: "reads (pre-activation)", logit: "logits" };
const WRITES = { neuron: "activation", head: "length it adds", mlp: "length it adds", token: "length it adds" };

function describe(node, most, follow) {
  const facts = html("dl"), parts = [html("h2", node.label), facts];
  const fact = (name, text) => facts.append(html("dt", name), html("dd", text));
  if (node.pos >= 0) fact("position", `${node.pos} “${visible(state.graph.tokens[node.pos])}”`);
  if (READS[node.kind]) fact(READS[node.kind], number(node.input));
  if (WRITES[node.kind]) fact(WRITES[node.kind], number(node.activation));
  if (node.kind === "logit" && state.graph.probability) fact("probability", number(state.graph.probability));
  fact("influence", percent(node.influence));
  fact("effect in logits", number(node.effect, true));
  parts.push(...listed("reads from", node.into, "from", most, follow));
  parts.push(...listed("read by", node.outof, "to", most, follow));
  return parts;
}

function listed(heading, edges, end, most, follow) {
  if (!edges.length) return [];
  const list = html("div", "", { className: "others" }), head = html("div", "", { className: "faint" });
  head.append(html("span", heading), html("span", "entry"), html("span", "share", { title: SHARE }));
  list.append(head);
  for (const edge of edges.slice(0, most)) {
    const row = html(follow ? "button" : "div");
    row.append(
      html("span", edge[end].label, { title: edge[end].label }),
      html("span", number(edge.entry, true), { className: sign(edge.entry) }),
      html("span", percent(edge.share)),
    );
    if (follow) row.addEventListener("click", () => moveTo(edge[end]));
    list.append(row);
  }
  const left = edges.slice(most).reduce((sum, edge) => sum + edge.share, 0);
  const said = `and ${edges.length - most} more${end === "from" ? ` (${percent(left)})` : ""}`;
  const more = edges.length > most ? [html("p", said, { className: "faint" })] : [];
  return [list, ...more];
}

function drawPanel() {
  const node = pinned();
  $("panel").replaceChildren(...(node ? describe(node, 60, true) : [
    html("h2", "Follow a path"),
    html("p", "Point at a node to see what it reads and who reads it. Click it, or press Enter, to pin it here; then " +
      "click one of its senders or readers, here or there, to go on. With the keyboard: Tab into the plot, " +
      "↑ and ↓ go along the strongest edge, ← and → to the node beside, Backspace a step back, Escape lets go."),
    html("p", "The entries of a node's edges add up to what it reads.", { className: "faint" }),
  ]));
}

function edgeBetween(a, b) {
  return b.into.find((edge) => edge.from === a) || a.into.find((edge) => edge.from === b);
}

function steps() { return state.path.slice(1).map((node, i) => edgeBetween(state.path[i], node)); }

function drawPath() {
  const nav = $("path"), parts = [], edges = steps();
  state.path.forEach((node, i) => {
    if (i) {
      const { entry, to } = edges[i - 1];
      parts.push(html("span", `${to === node ? "→" : "←"} ${number(entry, true)}`, { className: sign(entry) }));
    }
    const button = html("button", node.label);
    button.addEventListener("click", () => go(state.path.slice(0, i + 1)));
    parts.push(button);
  });
  // All steps the same way: the product of their shares is what comes along this path, of all that its end reads.
  const down = edges.every((edge, i) => edge.to === state.path[i]);
  const up = edges.every((edge, i) => edge.from === state.path[i]);
  if (edges.length && (down || up)) {
    const share = percent(edges.reduce((product, edge) => product * edge.share, 1));
    const end = down ? state.path[0] : pinned();
    parts.push(html("span", `${share} of what ${end.label} reads comes along this path`, { className: "faint" }));
  }
  if (!state.path.length) parts.push(html("span", "No node is pinned.", { className: "faint" }));
  nav.replaceChildren(...parts);
}

// ---------------------------------------------------------------------------------------------------------
// What people do

function go(path) {
  state.path = path;
  state.pointed = null;
  $("card").style.display = "none";
  drawPanel();
  drawPath();
  drawFocus();
  if (path.length) bringIntoView(pinned());
}

// One step on, or back where that is where one came from.
function moveTo(node) {
  const { path } = state;
  go(path[path.length - 2] === node ? path.slice(0, -1) : [...path, node]);
}

function point(node, showCard) {
  state.pointed = node;
  drawFocus();
  const card = $("card");
  if (!node || !showCard) {
    card.style.display = "none";
    return;
  }
  card.replaceChildren(...describe(node, 5, false));
  card.style.display = "block";
  const spot = node.element.getBoundingClientRect(), { offsetWidth: w, offsetHeight: h } = card;
  const left = spot.right + 12 + w < innerWidth ? spot.right + 12 : spot.left - 12 - w;
  card.style.left = `${Math.max(4, left)}px`;
  card.style.top = `${Math.max(4, Math.min(innerHeight - h - 4, spot.top - 20))}px`;
}

function bringIntoView(node) {
  const box = $("scroll"), margin = 60;
  const x = node.x + LAYERS_WIDTH - box.scrollLeft, y = node.y - box.scrollTop;
  const { clientWidth: width, clientHeight: height } = box;
  if (x < margin + LAYERS_WIDTH || x > width - margin) box.scrollLeft += x - width / 2;
  if (y < margin || y > height - margin - TOKENS_HEIGHT) box.scrollTop += y - height / 2;
}

function focusOn(node) {
  for (const other of state.graph.nodes) other.element.setAttribute("tabindex", other === node ? 0 : -1);
  bringIntoView(node);
  node.element.focus({ preventScroll: true });
}

function nodeOf(event) {
  const element = event.target.closest && event.target.closest(".node");
  return element ? state.graph.nodes[element.dataset.node] : null;
}

function beside(node, step) {
  const row = state.graph.nodes.filter((other) => Math.abs(other.y - node.y) < 1).sort((a, b) => a.x - b.x);
  return row[row.indexOf(node) + step];
}

plot.addEventListener("pointerover", (event) => point(nodeOf(event), true));
plot.addEventListener("pointerleave", () => point(null));
plot.addEventListener("click", (event) => {
  const node = nodeOf(event);
  if (node && pinned() && edgeBetween(pinned(), node)) moveTo(node);
  else go(node ? [node] : []);
});
// Not of the plot: a browser would let an SVG that listens for the focus have it.
$("scroll").addEventListener("focusin", (event) => {
  const node = nodeOf(event);
  if (node && node.element.matches(":focus-visible")) point(node, node !== pinned());
});
$("scroll").addEventListener("focusout", () => point(null));
$("scroll").addEventListener("keydown", (event) => {
  const node = nodeOf(event);
  if (!node || event.ctrlKey || event.altKey || event.metaKey) return;
  const { key } = event;
  const strongest = (edges) => edges.find((edge) => !edge.rest) || edges[0];
  const along = key === "ArrowDown" ? strongest(node.into)?.from : key === "ArrowUp" ? strongest(node.outof)?.to : null;
  if (key === "Backspace") go(state.path.slice(0, -1));
  const next = along || (key === "ArrowLeft" ? beside(node, -1) : key === "ArrowRight" ? beside(node, 1) : null);
  if (key === "Enter" || key === " ") go(node === pinned() ? [] : [node]);
  else if (next && along && node === pinned()) moveTo(next);
  if (next) focusOn(next);
  if (next || key === "Enter" || key === " ") event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") go([]);
});
$("least").addEventListener("input", () => {
  state.chosen = true;
  drawAll();
});
$("rest").addEventListener("change", drawAll);

// ---------------------------------------------------------------------------------------------------------
// Models side by side: a tab each. What was followed in one is followed in the next as far as it is there.

function choose(graph) {
  const labels = state.path.map((node) => node.label);
  Object.assign(state, { graph, path: [], pointed: null });
  [...$("tabs").children].forEach((tab, i) => {
    tab.setAttribute("aria-selected", graphs[i] === graph);
    tab.tabIndex = graphs[i] === graph ? 0 : -1;
  });
  if (!state.chosen) firstEdges(250);
  drawGraph();
  const path = [];
  for (const label of labels) {
    const node = graph.nodes.find((other) => other.label === label);
    if (!node || (path.length && !edgeBetween(path[path.length - 1], node))) break;
    path.push(node);
  }
  go(path);
  if (!path.length) bringIntoView(graph.nodes[graph.nodes.length - 1]);
}

graphs.forEach((graph, i) => {
  const tab = html("button", graph.model, { title: graph.prompt || "" });
  tab.setAttribute("role", "tab");
  tab.addEventListener("click", () => choose(graph));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = (i + step + graphs.length) % graphs.length;
    choose(graphs[next]);
    $("tabs").children[next].focus();
  });
  $("tabs").append(tab);
});
$("tabs").hidden = graphs.length < 2;

// Until the slider is moved, about as many edges as can be told apart.
function firstEdges(most) {
  const edges = state.graph.edges.filter((edge) => !edge.rest), slider = $("least");
  slider.value = 0;
  while (edges.length > most && slider.value < 100 && smallest() < edges[most].influence) slider.value++;
}

const SHAPES = [
  ["head (with its number)", '<circle class="shape" cx="7" cy="7" r="5"/>'],
  ["neuron", '<circle class="shape full" cx="7" cy="7" r="4"/>'],
  ["MLP", '<rect class="shape" x="2" y="2" width="10" height="10"/>'],
  ["token", '<rect class="shape full" x="2" y="2" width="10" height="10" rx="3"/>'],
  ["biases; what is left out", '<path class="shape" d="M7 2l5 9h-10z" stroke-dasharray="3 2"/>'],
];
for (const [name, shape] of SHAPES) {
  const entry = html("span");
  entry.innerHTML = `<svg width="14" height="14" aria-hidden="true"><g class="node none">${shape}</g></svg>`;
  entry.append(name);
  $("legend").append(entry);
}
for (const [name, of] of [["raises", "plus"], ["lowers", "minus"]]) {
  const entry = html("span");
  entry.innerHTML =
    `<svg width="26" height="14" aria-hidden="true"><path class="edge ${of}" d="M0 7h26" stroke-width="3"/></svg>`;
  entry.append(`${name} what is read (an edge), the logit (a node)`);
  $("legend").append(entry);
}
$("legend").append(
  html("span", `size of a node: its influence, over all paths to the logit; width of an edge, share: ${SHARE}`),
);
choose(graphs[0]);
