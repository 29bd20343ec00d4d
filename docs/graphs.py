"""Graphs of mermaid's ``A --> B`` lines, drawn as SVG when the site is built, so that no page loads a program for it.

GitHub draws the same blocks by itself. Nodes stand in layers, each above what it points to; an edge over several
layers passes through a place of its own in each.
"""

from __future__ import annotations

import re
from itertools import pairwise

from drawings import WIDTH, box, figure, put_figures_into, text

GRAPH = re.compile(r"^```mermaid\ngraph TD\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EDGE = re.compile(r"^\s*(\w+) --> (\w+)$", re.MULTILINE)
ROW, HEIGHT = 46, 22  # of a layer, of a node; in pixels on a phone
GAP, SWEEPS = 8, 24

Node = str | tuple[str, str, int]  # a name, or an edge's place in a layer that it passes


def layers_of(edges: list[tuple[str, str]]) -> dict[str, int]:
    """Return the layer of each node, 0 at the top: a node is one layer above the highest one that it points to."""
    below: dict[str, list[str]] = {name: [] for edge in edges for name in edge}
    for upper, lower in edges:
        below[upper].append(lower)

    def depth(name: str, seen: frozenset[str] = frozenset()) -> int:
        if name in seen:
            raise ValueError(
                f"{name} points to itself through {', '.join(sorted(seen))}: only graphs without circles"
            )
        return 1 + max((depth(other, seen | {name}) for other in below[name]), default=-1)

    depths = {name: depth(name) for name in below}
    return {name: max(depths.values()) - found for name, found in depths.items()}


def width_of(node: Node) -> float:
    """Return the width of a node's box, or of a passing edge."""
    return 6.4 * len(node) + 12 if isinstance(node, str) else 4.0


def places_of(edges: list[tuple[str, str]]) -> tuple[dict[Node, tuple[float, float]], list[list[Node]]]:
    """Return the middle of each node, and each edge as the nodes that it passes."""
    layer = layers_of(edges)
    rows: list[list[Node]] = [[] for _ in range(max(layer.values()) + 1)]
    for name, row in sorted(layer.items()):
        rows[row].append(name)
    paths: list[list[Node]] = []
    for upper, lower in edges:
        between: list[Node] = [(upper, lower, row) for row in range(layer[upper] + 1, layer[lower])]
        for node in between:
            rows[node[2]].append(node)
        paths.append([upper, *between, lower])
    neighbours: dict[Node, list[Node]] = {node: [] for row in rows for node in row}
    for path in paths:
        for one, other in pairwise(path):
            neighbours[one].append(other)
            neighbours[other].append(one)
    x: dict[Node, float] = {node: WIDTH * (at + 0.5) / len(row) for row in rows for at, node in enumerate(row)}
    for _ in range(SWEEPS):  # each node moves to the mean of its neighbours, then the nodes of a row apart
        for row in rows:
            wished = {node: sum(x[other] for other in neighbours[node]) / len(neighbours[node]) for node in row}
            row.sort(key=lambda node: (wished[node], str(node)))
            x.update(_apart(row, wished))
    ends = [x[node] + side * width_of(node) / 2 for node in x for side in (-1, 1)]
    shift = (WIDTH - max(ends) - min(ends)) / 2  # to the middle of the drawing
    return {node: (x[node] + shift, ROW * number + HEIGHT) for number, row in enumerate(rows) for node in row}, paths


def _apart(row: list[Node], wished: dict[Node, float]) -> dict[Node, float]:
    """Return places in the order of a row, as near to those wished as their widths and the drawing's admit."""
    widths = [width_of(node) for node in row]
    right = [0.0] * len(row)  # the place of each node if it and those before it lie as far right as they may
    edge = float(WIDTH - 2)
    for number in reversed(range(len(row))):
        right[number] = edge - widths[number] / 2
        edge -= widths[number] + GAP
    if edge + GAP < 0:
        raise ValueError(f"a layer of {', '.join(map(str, row))} is wider than the drawing, {WIDTH}")
    placed, edge = {}, 2.0
    for node, width, most in zip(row, widths, right, strict=True):
        placed[node] = min(max(wished[node], edge + width / 2), most)
        edge = placed[node] + width / 2 + GAP
    return placed


def draw_graph(edges: list[tuple[str, str]]) -> str:
    """Return a graph as a figure of HTML, in colours of the theme."""
    places, paths = places_of(edges)
    drawn = []
    for path in paths:
        (x, y), *between, (last_x, last_y) = (places[node] for node in path)
        way, y = [f"M{x:.1f},{y + HEIGHT / 2:.1f}"], y + HEIGHT / 2
        for to_x, to_y, down in [*((x, y - HEIGHT / 2, HEIGHT) for x, y in between), (last_x, last_y - 16, 0)]:
            middle = (y + to_y) / 2
            way.append(f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f} v{down}")
            x, y = to_x, to_y + down
        drawn.append(f'<path d="{" ".join(way)}" fill="none" stroke="var(--quiet)" marker-end="url(#head)"/>')
    for node, (x, y) in places.items():
        if isinstance(node, str):
            width = width_of(node)
            drawn.append(box(x - width / 2, y - HEIGHT / 2, width, HEIGHT, "panel", 'stroke="var(--line)" rx="4"'))
            drawn.append(text(x, y + 4, node, 'text-anchor="middle"'))
    label = "; ".join(f"{upper} imports {lower}" for upper, lower in edges)
    head = (
        '<defs><marker id="head" markerWidth="6" markerHeight="6" refX="1" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="var(--quiet)"/></marker></defs>'
    )
    height = max(y for _, y in places.values()) + HEIGHT
    return figure(height, f"{head}{''.join(drawn)}", label)


def put_graphs_into(page: str) -> str:
    """Return the text of a page in which drawings, with their style, stand in place of mermaid's blocks."""
    return put_figures_into(page, GRAPH, lambda found: draw_graph(EDGE.findall(found[1])))
