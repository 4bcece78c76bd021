"""What an attribution graph is: nodes, what each wrote into each other's input, and tables, pages and files of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ..arguments import as_path, whole
from ..results import Page, Prompts, Result
from .prune import of_edges


@dataclass(frozen=True)
class GraphNode:
    """A node of an attribution graph.

    Attributes:
        kind: "token", "head", "neuron", "mlp", "bias", "error" (what is left out) or "logit".
        layer: the block of a head, a neuron or an MLP; n_layers of the logit; -1 of tokens, biases, what is left out.
        pos: position in the prompt, the logit's too; -1 of the biases and of what is left out, one node each.
        unit: number of the head or neuron, token id of a token or the logit; else None.
        label: "'Mary' @3", "L3H7 @5", "L2N1021 @5", "L2.mlp @5", "bias", "left out", "logit ' his' - ' her'".
    """

    kind: str
    layer: int
    pos: int
    unit: int | None
    label: str


@dataclass(frozen=True, repr=False)
class AttributionGraph(Result):
    """How a logit came to be: what each node wrote into what each later one read.

    A node reads one number off the residual stream and writes one vector into it. Attention patterns, norms' scales and
    each neuron's ratio of output to input are as they were in the model's run: then all that is read is linear in what
    is written, and entries add up. See `attribution_graph` for what each kind of node reads.

    Attributes:
        prompt: the text, if it was one.
        tokens: the prompt's ids, BOS included.
        strings: each token as text.
        nodes: tokens by position, then heads, neurons or MLPs by layer, position and unit, then the biases, what is
            left out, and the logit.
        adjacency: the part of the receiver's input that the sender wrote. A row sums to the receiver's input.
        inputs: what each node reads: a neuron its pre-activation, a head or an MLP the length of what it writes (read
            along its direction), the logit itself; 0 of tokens, biases, what is left out.
        activations: what each node writes: a neuron its activation, a token, head or MLP the length of its vector, the
            logit its probability (0 of a difference); 0 of biases, what is left out.
        influence: each node's share in the logit, in [0, 1]: over all paths in this graph, the product of the entries'
            sizes, as shares of those of all entries of their receiver. 1 of the logit; tokens, biases and what is left
            out, where all paths begin, sum to 1.
        effects: by how many logits the logit falls, over all paths, when the node's vector is taken out while
            patterns, scales and ratios stay; of what is left out, all of it. Of the logit its value.
        discrepancy: with norms, sum |entry - exact| / sum |exact| over the entries that are kept, exact being what
            the input loses when the sender's vector is taken out of the stream and the norm computed again.
        kept: the share of the influence, before pruning, of all heads and neurons (or MLPs) that those here hold.
        model: its name.
        n_layers: its blocks.
        target, versus: the logit's token id, and the one whose logit is subtracted.
        prompts: the prompt and its model, as other results have them.
    """

    prompt: str | None
    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    nodes: tuple[GraphNode, ...]
    adjacency: Float[Tensor, "receiver sender"]
    inputs: Float[Tensor, " node"]
    activations: Float[Tensor, " node"]
    influence: Float[Tensor, " node"]
    effects: Float[Tensor, " node"]
    discrepancy: float
    kept: float
    model: str
    n_layers: int
    target: int
    versus: int | None
    prompts: Prompts | None = None

    def summary(self) -> str:
        """Of which logit and model, the shape, the share of the influence, and what holding the norms costs."""
        return (
            f"{self.nodes[-1].label} of {self.model} after {len(self.tokens)} tokens: "
            f"{len(self.nodes)} nodes, {int(self.adjacency.count_nonzero())} edges, {self.kept:.0%} of the influence, "
            f"discrepancy {self.discrepancy:.2g}"
        ).replace("\n", "⏎")

    def picture(self) -> str:
        """What each token does to the logit over all paths, the nodes of the largest effects, and the largest edges."""
        from ..figures.panels import graph_picture

        return graph_picture(self)

    def table(self, k: int | None = None):
        """One row per edge: sender, receiver, entry, its share of what the receiver reads, its influence on the logit.

        The largest influence first: entries of different receivers have different units. It is the receiver's own times
        the entry's size, as a share of those of all its entries.

        Args:
            k: how many; None: all.

        Raises:
            ValueError: k is below 1.
        """
        import pandas as pd

        k = None if k is None else whole(k, "k", least=1)
        entries = self.adjacency.double()
        influence = of_edges(entries, self.influence.double())
        to, of = entries.nonzero(as_tuple=True)
        order = influence[to, of].argsort(descending=True, stable=True)[:k]
        to, of = to[order], of[order]
        values, inputs = entries[to, of], self.inputs.double()[to]
        return pd.DataFrame(
            {
                "sender": [self.nodes[i].label for i in of.tolist()],
                "receiver": [self.nodes[i].label for i in to.tolist()],
                "entry": values.numpy(),
                "share": (values / inputs).numpy(),
                "influence": influence[to, of].numpy(),
            }
        )

    def node_table(self):
        """One row per node, in their order: node, what it reads, what it writes, influence, effect in logits."""
        import pandas as pd

        return pd.DataFrame(
            {
                "node": [node.label for node in self.nodes],
                "input": self.inputs.double().numpy(),
                "activation": self.activations.double().numpy(),
                "influence": self.influence.double().numpy(),
                "effect": self.effects.double().numpy(),
            }
        )

    def plot(self, path: str | Path | None = None) -> Page:
        """The graph as a page (HTML, with all it needs in it), which a notebook shows; written to the path if any."""
        from ..figures.graph import graph_page
        from ..files import replace_file

        page = Page(graph_page(self))
        if path is not None:
            replace_file(Path(as_path(path, "path")), lambda beside: beside.write_text(page, encoding="utf-8"))
        return page

    def save(self, path: str | Path) -> None:
        """Write the graph as JSON in the form that circuit-tracer's browser and Neuronpedia read."""
        from .saving import save_graph

        save_graph(self, Path(as_path(path, "path")))
