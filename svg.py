"""
Figures as SVG: lines over steps, with ticks, levels and a legend, for a page or for a file.

    in:  {name: [(x, y)]}
    out: text: an HTML figure, or SVG elements. Every word that is shown in it is escaped
"""
import math
import re
from dataclasses import dataclass
from html import escape

NOT_XML = re.compile("[^\\t\\n\\x20-\\x7e\\xa0-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")

def shown(text):
    """A text from a run → HTML and XML: escaped, with U+FFFD for what neither can hold."""
    return escape(NOT_XML.sub("\ufffd", str(text)))

def ticks(low, high, most):
    """Round numbers between low and high: 0, 9.3, 5 → 0, 2, 4, 6, 8."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    for multiple in (1, 2, 5, 10):
        size = multiple * magnitude
        if (high - low) / size <= most:
            break
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]

def thinned(points, most=400):
    """At most `most` points, each the mean of its neighbours, so that a long run stays small."""
    size = math.ceil(len(points) / most)
    means = []
    for first in range(0, len(points), size):
        group = points[first:first + size]
        means.append((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)))
    return means

@dataclass(frozen=True)
class Scale:
    """Maps low … high to the pixels start … end."""
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value):
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

def plot(lines, levels, W, H):
    """Lines {name: [(step, y)]}, each with a point, and dashed levels {name: y} → SVG elements in
    W x H pixels. The classes c0 … c3 are the colours of the lines."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + list(levels.values())
    pad = 0.05 * (max(ys) - min(ys)) or 0.5     # 0.5 if all values are equal
    left = 56
    right = W - 16
    X = Scale(min(xs), max(max(xs), min(xs) + 1), left, right)
    Y = Scale(min(ys) - pad, max(ys) + pad, H - 30, 10)
    svg = []
    for y in ticks(Y.low, Y.high, 6):
        svg.append(f"<text x='{left - 6}' y='{Y(y) + 4}' class='end'>{y:.6g}</text>"
                   f"<path class='grid' d='M{left} {Y(y)}H{right}'/>")
    for x in ticks(X.low, X.high, W // 80):
        svg.append(f"<text x='{X(x)}' y='{H - 10}' class='mid'>{x:.6g}</text>")
    for i, (name, y) in enumerate(levels.items()):
        svg.append(f"<text x='{right - 2 - 110 * i}' y='{Y(y) - 4}' class='end'>{shown(name)} "
                   f"{y:.4g}</text><path class='level' d='M{left} {Y(y)}H{right}'/>")
    for i, points in enumerate(lines.values()):
        points = thinned(points)
        path = " ".join(f"{X(x)},{Y(y)}" for x, y in points)
        svg.append(f"<polyline class='c{i % 4}' points='{path}'/>")
        if len(points) < 50:        # more would run together
            svg += [f"<circle class='c{i % 4}' cx='{X(x)}' cy='{Y(y)}' r='2'/>" for x, y in points]
    return "".join(svg)

def curve(title, lines, levels={}, W=640, H=240, by="step"):
    """The HTML figure of a plot; "" if no line has a point."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    names = " ".join(f"<span class=c{i % 4}>● {shown(name)}</span>"
                     for i, name in enumerate(lines))
    return (f"<figure><figcaption>{shown(title)}, by {by}: {names}</figcaption>"
            f"<svg viewBox='0 0 {W} {H}'>{plot(lines, levels, W, H)}</svg></figure>")

def panel(title, lines, levels, W, H):
    """A title, a legend and a plot → SVG elements in W x H pixels."""
    lines = {name: points for name, points in lines.items() if points}
    svg = [f"<text x='20' y='30' class='title'>{shown(title)}</text>"]
    x = 20
    for i, name in enumerate(lines):
        svg.append(f"<text x='{x}' y='52' class='c{i % 4}'>● {shown(name)}</text>")
        x += 30 + 7 * len(name)     # a letter is about 7 pixels wide
    svg.append(f"<g transform='translate(0 60)'>{plot(lines, levels, W, H - 84)}</g>")
    svg.append(f"<text x='{W // 2 + 20}' y='{H - 14}' class='mid'>training step</text>")
    return "".join(svg)

GRAPHICS = """
text, circle { fill: currentColor } .mid { text-anchor: middle } .end { text-anchor: end }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5 }
.grid { stroke: #8884 } .level { stroke: currentColor; stroke-dasharray: 5 4 }
"""
SVG_STYLE = """
svg { color: #333; font: 12px system-ui, sans-serif } .title { font-size: 15px; font-weight: 600 }
.card { fill: #fff; stroke: #ddd } .c0 { color: #0b62c4 } .c1 { color: #c4530b }
.c2 { color: #1c7f3c } .c3 { color: #8a3fc0 }
"""
