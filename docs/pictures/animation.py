"""The animated picture: an answer of the embedded model, token by token, in the steps in which the engine wrote it."""

import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from recording import PROMPT, Recording

from multiverse_hf.viewing.picture import color_number

WIDTH, MARGIN, GAP = 800, 16, 12
CHAR, LINE = 8.4, 19  # width of a character and height of a line, at 14 px
COLUMNS = int((WIDTH - 2 * MARGIN) / CHAR)
LEAD_S, STEP_S, HOLD_S = 1.2, 0.09, 5.0  # before the first step, for each step, and after the last
GLOW = 4  # steps for which a new token has the colour of its branch
BARS, ROW = 124, 22  # where the bars begin, and the height of their rows
STYLE = """
.card{fill:var(--card);stroke:var(--line)} .box{fill:var(--paper);stroke:var(--line)}
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;fill:var(--f);--f:var(--ink)}
.tag{--f:var(--soft)} .ui{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif} .small{font-size:13px}
.bold{font-weight:600} .chip{--f:var(--card);font-weight:600}
.bend{fill:none;stroke:var(--h);stroke-width:2;stroke-linejoin:round} .fill{fill:var(--h)}
"""


class Clock:
    """The time of the animation, and the rules of style that show each part in its time."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.seconds = LEAD_S + STEP_S * (num_steps + 1) + HOLD_S
        names = f"text,g{{animation:{self.seconds:.2f}s step-end infinite}}"
        still = "@media(prefers-reduced-motion:reduce){*{animation:none!important}}"
        self.rules = {"all": names, "still": still}

    def at(self, step: int) -> str:
        return f"{100 * (LEAD_S + STEP_S * step) / self.seconds:.2f}%"

    def since(self, step: int) -> str:
        """Return the class of what is hidden before a step. A new text has the colour of its branch."""
        frames = f"0%{{visibility:hidden}}{self.at(step)}{{visibility:visible;fill:var(--h)}}"
        frames += f"{self.at(step + GLOW)}{{fill:var(--f)}}"
        return self._rule(f"s{step}", frames)

    def between(self, start: int, stop: int) -> str:
        """Return the class of what is only there from one step to another."""
        frames = f"0%{{visibility:hidden}}{self.at(start)}{{visibility:visible}}{self.at(stop)}{{visibility:hidden}}"
        return self._rule(f"b{start}-{stop}", frames, "visibility:hidden;")

    def moves(self, name: str, transforms: Sequence[str]) -> str:
        """Return the class of what has one transform before the first step, and another from each step on."""
        first, *rest = transforms
        frames = f"0%{{transform:{first}}}" + "".join(
            f"{self.at(step)}{{transform:{each}}}" for step, each in enumerate(rest)
        )
        return self._rule(name, frames, f"transform:{transforms[-1]};")

    def _rule(self, name: str, frames: str, still: str = "") -> str:
        self.rules[name] = f".{name}{{{still}animation-name:{name}}}@keyframes {name}{{{frames}}}"
        return name


def draw_answer(recording: Recording) -> str:
    """Return the animated picture.

    Every part is in the picture from the beginning, hidden until its step. Where nothing is animated, as for a reader
    who asks for less motion, the picture shows the whole answer.
    """
    trace, clock = recording.trace, Clock(recording.stats.num_steps)
    writer = Writer(trace["tokens"]["text"], recording.steps(), clock)
    at = next(index for index, item in enumerate(trace["tree"]) if item["kind"] == "block")
    block = trace["tree"][at]
    shapes = [text(MARGIN, 25, "prompt", "ui small tag"), text(MARGIN, 45, PROMPT)]
    shapes.append(text(MARGIN, 73, "answer", "ui small tag"))
    before, bottom = writer.write([*trace["tree"][:at], *block["goal"]], MARGIN, 93, COLUMNS)
    shapes.append(branch_group(trace, 0, before))

    paths, top = block["paths"], bottom + 30
    width = (WIDTH - 2 * MARGIN - GAP * (len(paths) - 1)) / len(paths)
    lefts = [MARGIN + number * (width + GAP) for number in range(len(paths))]
    lanes = [
        writer.write(path["items"], left + 10, top + 48, int((width - 18) / CHAR))
        for path, left in zip(paths, lefts, strict=True)
    ]
    floor = max(end for _, end in lanes) + 4
    forked, merged = clock.since(recording.fork), clock.since(recording.reduce)
    for path, left, (pieces, _) in zip(paths, lefts, lanes, strict=True):
        box = f'<rect class="box" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{floor - top}" rx="8"/>'
        head = lane_head(recording, clock, path["branch"], left, top, width)
        bends = bend(left + width / 2, top, top - 10), bend(left + width / 2, floor, floor + 10)
        lane = [group(forked, box, bends[0], *head), *pieces, group(merged, bends[1])]
        shapes.append(branch_group(trace, path["branch"], lane))
    stems = group(forked, stem(bottom, top - 10, "fork")), group(merged, stem(floor + 10, floor + 30, "merge"))
    shapes.append(branch_group(trace, 0, stems))

    after, bottom = writer.write(trace["tree"][at + 1 :], MARGIN, floor + 48, COLUMNS)
    shapes.append(branch_group(trace, 0, after))
    shapes += counters(recording, clock, bottom + 10)
    height = bottom + 10 + 2 * ROW + 14
    title = f"The embedded model writes {len(lanes)} paths at the same time: {PROMPT} Answer: {recording.answer}"
    card = f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" width="{WIDTH}">'
    style = "\n".join([colors() + STYLE, *clock.rules.values()])
    lines = [head, f"<title>{escape(title)}</title>", f"<style>{escape(style, quote=False)}</style>", card]
    return "\n".join([*lines, *shapes, "</svg>"]) + "\n"


class Writer:
    """Sets tokens as text, each piece in its step."""

    def __init__(self, texts: Sequence[str], steps: Sequence[int], clock: Clock) -> None:
        self.texts, self.steps, self.clock = texts, steps, clock

    def write(self, items: Sequence[dict[str, Any]], left: float, top: float, columns: int) -> tuple[list[str], int]:
        """Return the pieces of some items of a trace's tree, and the lower end of the last line."""
        indices = [(index, item["kind"]) for item in items for index in range(item["start"], item["stop"])]
        places = wrap("".join(self.texts[index] for index, _ in indices), columns)
        pieces, start = [], 0
        for index, kind in indices:
            for word in re.finditer(r"\S+", self.texts[index]):
                line, column = places[start + word.start()]
                style = f"{self.clock.since(self.steps[index])}{' tag' if kind == 'tag' else ''}"
                pieces.append(text(left + CHAR * column, top + LINE * line, word[0], style))
            start += len(self.texts[index])
        return pieces, int(top + LINE * places[-1][0] + 8)


def wrap(words: str, columns: int) -> list[tuple[int, int]]:
    """Return the line and the column of each character. A goal is one word, and no line is empty."""
    # a newline beside a tag is a space, but after a closing tag the text goes on in a new line
    words = re.sub(r"(<\w+>)\n|\n(?=<(?!Goal))", lambda found: f"{found[1] or ''} ", words)
    places, line, column = [], 0, 0
    for word in re.findall(r"<Goal>.*</Goal>|\S+|\s", words):
        if column and (word == "\n" or (word != " " and column + len(word) > columns)):
            line, column = line + 1, 0
        for char in word:
            places.append((line, column))
            column += char != "\n" and (char != " " or column > 0)
    return places


def lane_head(
    recording: Recording, clock: Clock, number: int, left: float, top: float, width: float
) -> tuple[str, ...]:
    """Return the name of a path and, once they are known, its tokens and for how long it waits."""
    branch = recording.trace["branches"][number]
    x, y, end = left + 10, top + 22, branch["step"][1] - 1
    chip = f'<circle class="fill" cx="{x + 9:.1f}" cy="{y - 5}" r="10"/>'
    name = text(x + 9, y, branch["name"], "ui small chip", "middle"), text(x + 27, y, branch["title"], "ui bold")
    wrote = text(left + width - 10, y, f"{branch['num_tokens']} tokens", f"ui small tag {clock.since(end)}", "end")
    if end >= recording.reduce:
        return (chip, *name, wrote)
    waits = text(left + width - 84, y, "waits", f"ui small tag {clock.between(end, recording.reduce)}", "end")
    return (chip, *name, wrote, waits)


def counters(recording: Recording, clock: Clock, top: int) -> list[str]:
    """Return two bars on one scale, for steps and for tokens, with their numbers; and at the end, # parallel."""
    stats, last = recording.stats, recording.stats.num_steps
    tokens = [sum(step <= now for _, step, *_ in recording.tokens) for now in range(-1, last + 1)]
    steps = [0, *range(last + 1)]  # the pass over the prompt is step 0
    pitch, room = 3 * ROW, WIDTH - MARGIN - BARS
    reel = [
        text(BARS - MARGIN - 10, at * pitch + row * ROW + 15, f"{name} {count}", "ui small", "end")
        for at, counts in enumerate(zip(steps, tokens, strict=True))
        for row, (count, name) in enumerate(zip(counts, ("steps", "tokens"), strict=True))
    ]
    turns = clock.moves("reel", [f"translateY({-at * pitch}px)" for at in range(len(steps))])
    window = f'<svg x="{MARGIN}" y="{top}" width="{BARS - MARGIN}" height="{pitch}">'
    shapes = [window + group(turns, *reel) + "</svg>"]
    for row, (name, counts) in enumerate((("steps", steps), ("tokens", tokens))):
        grows = clock.moves(name, [f"scaleX({count / stats.num_tokens:.4f})" for count in counts])
        bar = group(grows, f'<rect class="fill" width="{room}" height="12" rx="1"/>')
        color = "var(--c4)" if name == "steps" else "var(--c0)"
        place = f'transform="translate({BARS} {top + row * ROW + 4})" style="--h:{color}"'
        shapes.append(f"<g {place}>{bar}</g>")
    result = f"# parallel {stats.parallelism:.2f} = {stats.num_tokens} tokens / length {stats.length}"
    x = BARS + room * last / stats.num_tokens + 12
    shapes.append(group(clock.since(last), text(x, top + 15, result, "ui small bold")))
    return shapes


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    """Return a text. Monospaced ones have the same width in every font."""
    fits = f' textLength="{CHAR * len(words):.1f}" lengthAdjust="spacingAndGlyphs"'
    fits = fits if len(words) > 1 and "ui" not in kind else ""
    anchor = anchor and f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y}" class="{kind}"{anchor}{fits}>{escape(words, quote=False)}</text>'


def group(kind: str, *shapes: str) -> str:
    return f'<g class="{kind}">' + "".join(shapes) + "</g>"


def branch_group(trace: dict[str, Any], branch: int, shapes: Sequence[str]) -> str:
    color = f"var(--c{color_number(trace['branches'], branch)})"
    return f'<g style="--h:{color}">\n' + "\n".join(shapes) + "\n</g>"


def bend(x: float, edge: int, turn: int) -> str:
    """Return a line from the edge of a lane to the middle of the picture."""
    return f'<path class="bend" d="M{x:.1f} {edge} V{turn} H{WIDTH / 2}"/>'


def stem(start: int, stop: int, words: str) -> str:
    """Return a line where all lanes meet, and its name."""
    line = f'<path class="bend" d="M{WIDTH / 2} {start} V{stop}"/>'
    return line + text(WIDTH / 2 + 8, (start + stop) // 2 + 5, words, "ui small tag")


def colors() -> str:
    """Return the colours of the viewer's page, for light and for dark."""
    page = (resources.files("multiverse_hf.viewing") / "page/page.css").read_text(encoding="utf-8")
    light, dark = (
        ";".join(re.findall(r"--(?:card|paper|ink|soft|line|c[0-8]): [^;]+", each))
        for each in re.findall(r"^:root.*?\{(.*?)^\}", page, re.DOTALL | re.MULTILINE)[:2]
    )
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
