"""
Figures as SVG: lines over steps and bars, with axes, units, standard errors, levels and a legend,
for a page or for a file.

    in:  {name: [(x, y)]} or {name: [(x, y, error)]}; for bars, {label: {series: (value, error)}}
    out: text: an HTML figure, or SVG elements. Every word that is shown in it is escaped

A figure of a page is W = 360 pixels wide, about as wide as a phone, so that its letters of 13
pixels are never shrunk; a wide window sets figures side by side.
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
    W x H pixels. A point (step, y, error) has its standard error drawn. The classes c0 … c3 are the
    colours of the lines."""
    points = [point for line in lines.values() for point in line]
    xs = [point[0] for point in points]
    ys = [y for point in points for y in ends(*point[1:])] + list(levels.values())
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
    for i, line in enumerate(lines.values()):
        for x, low, high in [(x, *ends(y, *error)) for x, y, *error in line if error]:
            svg.append(f"<path class='error c{i % 4}' d='M{X(x)} {Y(low)}V{Y(high)}'/>")
        line = thinned([(x, y) for x, y, *_ in line])
        path = " ".join(f"{X(x)},{Y(y)}" for x, y in line)
        svg.append(f"<polyline class='c{i % 4}' points='{path}'/>")
        if len(line) < 50:          # more would run together
            svg += [f"<circle class='c{i % 4}' cx='{X(x)}' cy='{Y(y)}' r='2'/>" for x, y in line]
    return "".join(svg)

def ends(y, error=0):
    """Where the bar of a standard error begins and ends."""
    return y - error, y + error

def legend(names):
    """The names of lines or series, each in its colour, on a line of their own → HTML.
    """
    if not names:
        return ""
    spans = [f"<span class=c{i % 4}>● {shown(name)}</span>" for i, name in enumerate(names)]
    return f"<div>{' '.join(spans)}</div>"

def figure(caption, names, W, H, elements):
    """A caption, a legend and SVG elements → an HTML figure."""
    return (f"<figure><figcaption>{shown(caption)}{legend(names)}</figcaption>"
            f"<svg viewBox='0 0 {W} {H}' role='img' aria-label='{shown(caption)}'>{elements}"
            "</svg></figure>")

def curve(title, lines, levels={}, W=360, H=236, by="step", unit=""):
    """The HTML figure of a plot, with the unit of y above its axis and what x is below it; "" if no
    line has a point."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    axes = (f"<text x='2' y='13'>{shown(unit)}</text>"
            f"<text x='{W - 16}' y='{H - 4}' class='end'>{shown(by)}</text>")
    inner = f"<g transform='translate(0 18)'>{plot(lines, levels, W, H - 34)}</g>"
    names = lines
    if len(lines) == 1 and not levels:
        names = []
    return figure(f"{title}, by {by}", names, W, H, axes + inner)

def bars(title, rows, unit="%", most=0.0, W=360):
    """Horizontal bars, rows {label: {series: (value, standard error or None)}} → an HTML figure; ""
    if there is no row. The unit % shows shares in per cent, on an axis up to 100 %."""
    rows = {label: series for label, series in rows.items() if series}
    if not rows:
        return ""
    names = list(dict.fromkeys(name for series in rows.values() for name in series))
    values = [value + (error or 0) for series in rows.values() for value, error in series.values()]
    top = 1.0 if unit == "%" else max(*values, most, 1e-9)
    # a letter is about 7.5 pixels wide
    left = 10 + round(7.5 * min(19, max(len(label) for label in rows)))
    X = Scale(0, top, left, W - 52)
    svg = []
    y = 8
    for label, series in rows.items():
        svg.append(f"<text x='{left - 6}' y='{y + 3 + 7.5 * len(series):.1f}' class='end'>"
                   f"{shown(cut(label, 19))}</text>")
        for name, (value, error) in series.items():
            svg.append(bar(X, y, names.index(name) % 4, value, error, unit))
            y += 15
        y += 8
    for tick in ticks(0, top, 4):
        svg.append(f"<path class='grid' d='M{X(tick)} 4V{y}'/><text x='{X(tick)}' y='{y + 16}' "
                   f"class='mid'>{number(tick, unit)}</text>")
    if unit != "%":
        svg.append(f"<text x='{W - 2}' y='{y + 32}' class='end'>{shown(unit)}</text>")
        y += 16
    if len(names) == 1:
        names = []
    return figure(title, names, W, y + 22, "".join(svg))

def bar(X, y, colour, value, error, unit):
    """One bar with its number, and its standard error if it has one → SVG elements."""
    end = X(min(max(value, 0), X.high))
    svg = f"<path class='bar c{colour}' d='M{X(0)} {y}H{end}V{y + 12}H{X(0)}z'/>"
    if error:
        low, high = (X(min(max(at, 0), X.high)) for at in ends(value, error))
        svg += f"<path class='error' d='M{low} {y + 6}H{high}M{low} {y + 3}v6M{high} {y + 3}v6'/>"
        end = high
    return svg + f"<text x='{end + 5}' y='{y + 10.5}'>{number(value, unit)}</text>"

def number(value, unit):
    """0.533 → 53%; 3047 → 3,047; 4.1754 → 4.18"""
    if unit == "%":
        return f"{value:.0%}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.3g}"

def cut(text, most):
    """A text of at most `most` letters."""
    return text if len(text) <= most else text[:most - 1] + "…"

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
FIGURE_STYLE = """
figure { margin: 0; break-inside: avoid } figcaption { font-size: .875rem; line-height: 1.4 }
figcaption span { font-weight: 600; margin-right: .5rem; display: inline-block }
figure svg { width: 100%; max-width: 26rem; font-size: 13px; display: block }
.bar { fill: currentColor; opacity: .8 } .error { stroke: currentColor; fill: none }
"""
