#!/usr/bin/env python3
"""Times to first token of runs of `octavo bench serve --save-result --save-detailed`, sorted, as one plot.

ttft_plot.py RUN.json... --svg PATH
"""
import argparse
import html
import itertools
import json
import pathlib

WIDTH, HEIGHT, LEFT, TOP = 520, 300, 60, 20
COLOURS = ["#d08030", "#4878a8", "#58a058", "#b05050"]


def plot(runs):
    """runs: name -> seconds to the first token of each request."""
    slowest = max(max(ttfts) for ttfts in runs.values())
    tick = next(t for t in (m * 10.0 ** e for e in itertools.count(-3) for m in (1, 2, 5)) if slowest / t <= 8)
    out = []
    for i in range(int(slowest / tick) + 1):
        y = TOP + HEIGHT - i * tick / slowest * HEIGHT
        out.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{i * tick:g} s</text>')
    for percent in (0, 25, 50, 75, 99):
        x = LEFT + WIDTH * percent / 100
        out.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{percent} %</text>')
    for (name, ttfts), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        ttfts = sorted(ttfts)
        points = " ".join(f"{LEFT + WIDTH * i / len(ttfts):.1f},{TOP + HEIGHT * (1 - t / slowest):.1f}"
                          for i, t in enumerate(ttfts))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
                   f'<text x="{LEFT + WIDTH + 6}" y="{TOP + HEIGHT * (1 - ttfts[-1] / slowest) + 4:.1f}" '
                   f'fill="{colour}">{html.escape(name)}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 140}" height="{TOP + HEIGHT + 46}" '
            f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(out) + f'\n<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">'
            'requests whose first token came sooner</text>\n</svg>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--svg", required=True, type=pathlib.Path)
    args = parser.parse_args()
    runs = {}
    for path in args.runs:
        run = json.loads(path.read_text())
        if not run.get("ttfts"):
            parser.error(f"{path}: no ttfts; run octavo bench serve with --save-detailed")
        runs[path.stem] = run["ttfts"]
    args.svg.write_text(plot(runs))


main()
