"""The two still drawings: an answer as lanes of marks, and the worked example of a layout."""

from html import escape

from recording import QUESTION, Recording

from multiverse_hf import MultiverseForCausalLM, embedded_model
from multiverse_hf.modeling.layout import build_layout

WIDTH, LEFT = 860, 104
LANE, BAR = 46, 14  # height of a lane, and of the tokens in it
# The card has a background of its own: a page may be dark where the reader's system is light.
STYLE = """
.card{fill:#fff;stroke:#d0d7de} text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#1f2328}
text.mono{font-family:ui-monospace,monospace;font-size:11px;stroke:none}
.soft{fill:#59636e} .line{fill:none;stroke:#8c959f}
.c0{fill:#8250df;stroke:#8250df} .c1{fill:#0969da;stroke:#0969da} .c2{fill:#bc4c00;stroke:#bc4c00}
.c3{fill:#1a7f37;stroke:#1a7f37} .grey{fill:#8c959f;stroke:#8c959f} .forced{fill:none} .no{fill:#eaeef2}
@media (prefers-color-scheme:dark){
.card{fill:#0d1117;stroke:#3d444d} text{fill:#e6edf3} .soft{fill:#9198a1} .line{stroke:#656c76}
.c0{fill:#ab7df8;stroke:#ab7df8} .c1{fill:#4493f8;stroke:#4493f8} .c2{fill:#f0883e;stroke:#f0883e}
.c3{fill:#3fb950;stroke:#3fb950} .grey{fill:#656c76;stroke:#656c76} .forced{fill:none} .no{fill:#21262d}}
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def svg(height: int, title: str, shapes: list[str]) -> str:
    card = f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" width="{WIDTH}">'
    lines = [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", card, *shapes, "</svg>"]
    return "\n".join(lines) + "\n"


def draw_branches(recording: Recording) -> str:
    """Return the picture of an answer: branches as lanes on an axis of steps."""
    stats, total = recording.stats, len(recording.tokens)
    branches = ["", *sorted({branch for branch, *_ in recording.tokens} - {""})]
    cell = (WIDTH - LEFT - 24) / total
    lanes = {branch: 62 + LANE * lane for lane, branch in enumerate(branches)}

    def place(step: int) -> float:
        return LEFT + step * cell

    shapes = [text(16, 28, QUESTION, "mono"), text(WIDTH - 16, 28, "one mark is one token", "soft", "end")]
    fork, reduce = LEFT + (recording.fork + 1) * cell, LEFT + (recording.reduce + 1) * cell
    middle = lanes[""] + BAR / 2
    for number, branch in enumerate(branches):
        top, mine = lanes[branch], [token for token in recording.tokens if token[0] == branch]
        shapes.append(text(16, top + BAR - 2, f"path {branch}" if branch else "answer"))
        # What one step writes in a branch stands in one column: forced tokens come several at once.
        columns: dict[int, list[bool]] = {}
        for _, step, sampled, _ in mine:
            columns.setdefault(step, []).append(sampled)
        for step, row in columns.items():
            for at, sampled in enumerate(row):
                part = BAR / len(row)
                box = f'x="{place(step) + 0.3:.1f}" y="{top + at * part:.1f}" width="{cell - 0.9:.1f}"'
                kind = f"c{number % 4}" + ("" if sampled else " forced")
                shapes.append(f'<rect class="{kind}" {box} height="{part - 0.6:.1f}" stroke-width="0.4"/>')
        if branch:
            at, end = top + BAR / 2, place(max(columns) + 1)
            last = recording.tokenizer.decode([token for *_, token in mine]).strip().splitlines()[-2]
            shapes.append(text(fork + 4, top + BAR + 13, last.split(", ")[-1], "mono soft"))
            bend = f"M{fork - 4:.1f} {middle + BAR / 2} V{at - 4} Q{fork - 4:.1f} {at} {fork:.1f} {at}"
            back = f"M{end:.1f} {at} H{reduce - 6:.1f} Q{reduce:.1f} {at} {reduce:.1f} {at - 8} V{middle}"
            shapes += [f'<path class="line" d="{bend}"/>', f'<path class="line" d="{back}"/>']
    shapes.append(text(fork, lanes[""] - 6, "fork: </Goal>", "soft", "middle"))
    shapes.append(text(reduce, lanes[""] - 6, "merge: last </Path>", "soft", "middle"))
    end = LEFT + (stats.num_steps + 1) * cell
    shapes.append(text(end + 6, lanes[""] + BAR - 2, f"Answer: {recording.answer}, after {stats.num_steps} steps"))

    top = 62 + LANE * len(branches)
    shapes += [text(16, top + BAR - 2, "one a step", "soft")]
    shapes += [
        f'<rect class="grey" x="{LEFT + at * cell + 0.3:.1f}" y="{top}" width="{cell - 0.9:.1f}" height="{BAR}"/>'
        for at in range(total)
    ]
    shapes.append(text(LEFT, top + BAR + 13, f"the same {total} tokens, one after the other", "soft"))
    axis = top + LANE
    shapes.append(f'<path class="line" d="M{LEFT} {axis} H{LEFT + total * cell:.1f}"/>')
    for step in range(0, total, 50):
        x = LEFT + step * cell
        shapes.append(f'<path class="line" d="M{x:.1f} {axis} v4"/>' + text(x, axis + 17, str(step), "soft", "middle"))
    shapes.append(text(16, axis + 17, "step", "soft"))
    title = f"An answer of the embedded model: {total} tokens in {stats.num_steps} steps"
    return svg(axis + 30, title, shapes)


def draw_layout() -> str:
    """Return the picture of the worked example: the position of each token, and which tokens it sees."""
    tags = MultiverseForCausalLM.from_pretrained(embedded_model()).tags
    names = ["q", "<Parallel>", "<Goal>", *["<Outline>", "1", "</Outline>", "<Outline>", "2", "</Outline>"], "</Goal>"]
    names += ["\\n", "<Path>", "x", "y", "</Path>", "\\n", "<Path>", "z", "</Path>", "\\n", "<Conclusion>"]
    word = max(tags.control_ids) + 1  # any id that is no tag
    layout = build_layout([tags.ids.get(name, word) for name in names], tags)
    mask, segments = layout.mask().tolist(), layout.segment_ids.tolist()
    cell, left, top = 17, 250, 56
    shapes = [text(16, top - 12, "token", "soft"), text(150, top - 12, "position", "soft")]
    shapes.append(text(left, top - 30, "sees token", "soft"))
    for row, name in enumerate(names):
        y = top + row * cell
        shapes += [text(16, y + 12, str(row), "soft"), text(42, y + 12, name, "mono")]
        shapes.append(text(190, y + 12, str(int(layout.position_ids[row])), f"c{segments[row]} mono", "end"))
        if row % 2 == 0:
            shapes.append(text(left + row * cell + cell / 2, top - 10, str(row), "soft", "middle"))
        for column in range(row + 1):
            kind = f"c{segments[column]}" if mask[row][column] else "no"
            box = f'x="{left + column * cell + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="2"'
            shapes.append(f'<rect class="{kind}" {box} stroke="none"/>')
    legend = ["before the fork", "path 1", "path 2", "after the merge"]
    for number, words in enumerate(legend):
        y = top + 30 + 22 * number
        shapes.append(f'<rect class="c{number}" x="680" y="{y}" width="12" height="12" rx="2"/>')
        shapes.append(text(700, y + 11, words))
    shapes.append(f'<rect class="no" x="680" y="{top + 118}" width="12" height="12" rx="2"/>')
    shapes.append(text(700, top + 129, "not visible"))
    return svg(top + len(names) * cell + 18, "Positions and visibility of a block with two paths", shapes)
