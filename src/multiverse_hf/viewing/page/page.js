"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const MOST_COLUMNS = 4, COLORS = 8, MOST_HITS = 5000;

function make(name, props = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") element.className = value;
    else if (key === "style") for (const [of, to] of Object.entries(value)) element.style.setProperty(of, to);
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// The greatest index whose value is at most x, in an ascending list.
function place(list, x) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (list[middle] <= x) low = middle; else high = middle - 1;
  }
  return low;
}

const number = (value) => value.toLocaleString("en-US");

// --- One result: its tokens, and where each stands -----------------------------------------------------------------

class Result {
  constructor(trace) {
    Object.assign(this, trace);
    const texts = this.tokens.text, count = texts.length;
    this.count = count;
    this.text = texts.join("");
    this.offset = new Uint32Array(count + 1);
    for (let i = 0; i < count; i++) this.offset[i + 1] = this.offset[i] + texts[i].length;
    this.segment = new Uint16Array(count);
    this.position = new Uint32Array(count);
    if (this.segments.length > 65535) this.segment = new Uint32Array(count);
    this.segments.forEach((segment, at) => {
      for (let i = segment.start; i < segment.stop; i++) {
        this.segment[i] = at;
        this.position[i] = segment.position + i - segment.start;
      }
    });
    this.forced = new Uint8Array(count);
    for (const [first, last] of this.tokens.forced) this.forced.fill(1, first, last + 1);
    this.own = this.branches.map(() => []); // the tokens of each branch
    for (let i = 0; i < count; i++) this.own[this.branch(i)].push(i);
    const first = new Map();
    this.branches.forEach((branch, at) => {
      if (!first.has(branch.block)) first.set(branch.block, at);
      const before = branch.parent === null ? 0 : this.branches[branch.parent].color;
      const among = branch.parent === null ? 0 : (branch.among = (first.get(`n${branch.block}`) ?? -1) + 1);
      first.set(`n${branch.block}`, among);
      branch.color = branch.parent === null ? 0 : 1 + (among + before) % COLORS;
    });
    this.rows = 1 + Math.max(...this.branches.map((branch) => branch.row));
  }
  branch(token) { return this.segments[this.segment[token]].branch; }
  time(token, axis) { return axis === "step" ? this.tokens.step[token] : this.position[token]; }
  // When a segment's first chosen token is written: the engine writes forced ones within the step before.
  begin(segment, axis) {
    let token = segment.start;
    while (axis === "step" && token < segment.stop - 1 && this.forced[token]) token++;
    return this.time(token, axis);
  }
  end(axis) { return axis === "step" ? this.stats.num_steps : this.stats.length; }
  at(offset) { return Math.min(place(this.offset, offset), this.count - 1); }
  sees(token, segment) {
    return this.segments[this.segment[token]].sees.some(([first, last]) => first <= segment && segment <= last);
  }
  numSeen(token) { // earlier tokens of the answer that it may attend to
    let seen = 0;
    for (const [first, last] of this.segments[this.segment[token]].sees)
      for (let at = first; at <= last; at++) seen += Math.max(Math.min(this.segments[at].stop, token) - this.segments[at].start, 0);
    return seen;
  }
  branchName(at) {
    const { parent, name } = this.branches[at];
    return parent === null ? "the answer itself" : `path ${name}`;
  }
}

const results = data.results.map((trace) => new Result(trace));
const state = { axis: "step", shown: [], columns: [], selected: null, hover: null, hits: [], hit: -1 };

// --- Highlights of text --------------------------------------------------------------------------------------------

const canHighlight = typeof Highlight === "function" && CSS.highlights;
function highlight(name, ranges, priority = 0) {
  if (!canHighlight) return;
  if (!ranges.length) return void CSS.highlights.delete(name);
  const found = new Highlight(...ranges);
  found.priority = priority;
  CSS.highlights.set(name, found);
}

// --- One column: a result on the page ------------------------------------------------------------------------------

class Column {
  constructor(index) {
    this.index = index;
    this.result = results[index];
    this.bases = []; // of each text node, the offset of its first character in the document
    this.nodes = [];
    this.base = new Map(); // node -> that offset
    this.runs = []; // [element, segment]
    this.lanes = new Map(); // branch -> its element
    this.view = null; // part of the time that is drawn: [begin, end]
    this.element = this.build();
  }

  build() {
    const result = this.result;
    const head = make("div", { class: "head" });
    if (results.length > 1) {
      const choice = make("select", { "aria-label": "Result shown here", onchange: (event) => {
        state.shown[state.columns.indexOf(this)] = Number(event.target.value);
        show(state.shown);
      } });
      results.forEach((each, at) => {
        const option = make("option", { value: at }, `${each.title} (${each.source})`);
        option.selected = at === this.index;
        choice.append(option);
      });
      head.append(choice, make("h2", { class: "unseen-heading" }, result.title));
      if (state.shown.length > 1) {
        head.append(make("button", { "aria-label": "Close this column", title: "Close this column", onclick: () => {
          show(state.shown.filter((_, at) => state.columns[at] !== this));
        } }, "×"));
      }
    } else head.append(make("h2", {}, result.title), make("span", { class: "source" }, result.source));
    const element = make("section", { class: "result", "aria-label": `Result ${result.title}` }, head);
    element.append(this.stats());
    for (const note of [...result.notes, ...(result.error ? [`Not answered: ${result.error}`] : [])])
      element.append(make("p", { class: "note" }, note));
    if (result.prompt !== null) element.append(make("div", { class: "card prompt", tabindex: "0", role: "group", "aria-label": "Prompt" }, result.prompt));
    if (result.count) {
      element.append(this.timeline());
      this.body = make("div", { class: "card answer", role: "group", "aria-label": "Answer" });
      this.flow(result.tree, this.body, 0);
      element.append(this.body);
      this.listen();
    }
    return element;
  }

  stats() {
    const { stats, counts, facts } = this.result;
    const list = make("ul", { class: "stats", "aria-label": "Counts" });
    const add = (name, value, kind = "") => {
      if (value !== undefined && value !== null && value !== "") list.append(make("li", { class: kind }, make("b", {}, String(value)), make("small", {}, name)));
    };
    const of = (name) => counts[name] ?? stats[name];
    add("# parallel", Number(of("parallelism")).toFixed(2));
    add("tokens", number(of("num_tokens")));
    add("length", number(of("length")));
    add("steps", number(of("num_steps")));
    add("paths", number(stats.num_paths));
    if (facts.answer !== undefined) {
      const judged = facts.correct === undefined ? "" : facts.correct ? "right" : "wrong";
      const mark = { right: " ✓", wrong: " ✗" }[judged] ?? "";
      add(judged ? `answer, ${judged}` : "answer", `${facts.answer}${mark}`, judged);
    }
    if (facts.correct === false) add("right answer", facts.gold);
    add("finished by", counts.finish_reason);
    add("model", facts.model);
    if (facts.seconds !== undefined) add("seconds", Number(facts.seconds).toFixed(2));
    return list;
  }

  // The text. Each run of tokens is one text node: a token is found by its offset, not by an element of its own.
  flow(items, into, branch) {
    let box = null, kind = "";
    const enter = (next) => { // text, and the conclusion under its block, have boxes of their own
      if (kind === next) return;
      kind = next;
      box = make("div", { class: next });
      if (next === "conclusion-box") {
        box.setAttribute("role", "group");
        box.setAttribute("aria-label", "Conclusion");
        box.style.setProperty("--tint", `var(--c${this.result.branches[branch].color})`);
      }
      into.append(box);
    };
    for (const item of items) {
      if (item.kind === "block") {
        kind = "";
        into.append(this.block(item, branch));
        continue;
      }
      if (item.kind === "conclusion") enter("conclusion-box");
      else if (item.kind === "text" || !kind) enter("prose");
      this.run(item, box);
    }
  }

  block(item, branch) {
    const result = this.result;
    const goal = make("div", { class: "goal" });
    for (const run of item.goal) if (run.kind === "tag") this.run(run, goal);
    const lanes = make("div", { class: "lanes" });
    for (const path of item.paths) {
      const at = result.branches[path.branch], level = Math.min(at.depth + 2, 6);
      const title = make("h3", { role: "heading", "aria-level": level });
      const [start, stop] = at.outline;
      if (stop > start) this.run({ kind: "outline", start, stop }, title, true);
      const ends = at.reduce[1] - at.step[1];
      title.append(make("span", { class: "when" }, `${number(at.num_tokens)} tokens, steps ${number(at.step[0])}–${number(at.step[1] - 1)}${ends ? `, waits ${number(ends)} for ${result.branches[at.waits_for].name}` : ""}${at.critical ? ", critical path" : ""}`));
      const lane = make("details", { class: "lane", open: "", style: { "--tint": `var(--c${at.color})`, "--leaves": leaves(path) } },
        make("summary", {}, make("span", { class: "chip", "aria-label": result.branchName(path.branch) }, at.name), title));
      const flow = make("div", { class: "flow" });
      this.flow(path.items, flow, path.branch);
      lane.append(flow);
      lanes.append(lane);
      this.lanes.set(path.branch, lane);
    }
    return make("div", { class: "block", role: "group", "aria-label": `${item.paths.length} parallel path${item.paths.length === 1 ? "" : "s"}` }, goal, lanes);
  }

  run(item, into, isTitle = false) {
    const result = this.result;
    const from = result.offset[item.start], to = result.offset[item.stop];
    if (from === to) return;
    const text = result.text.slice(from, to);
    const element = make("span", { class: `run ${item.kind}` });
    const body = text.trim();
    const lead = body ? text.length - text.trimStart().length : text.length;
    const label = isTitle ? /^\d+(?:\.\d+)*:\s*/.exec(text.slice(lead)) : null;
    const begin = lead + (label ? label[0].length : 0), end = lead + body.length;
    const node = (start, stop, edge) => {
      if (start >= stop) return;
      const of = document.createTextNode(text.slice(start, stop));
      this.base.set(of, from + start);
      this.nodes.push([from + start, of]);
      element.append(edge ? make("span", { class: "edge" }, of) : of);
    };
    // White space around a run stands between boxes of the page.
    const isTag = item.kind === "tag";
    node(0, begin, !isTag);
    node(begin, end, false);
    node(end, text.length, !isTag);
    into.append(element);
    this.runs.push([element, result.segment[item.start]]);
  }

  finish() {
    this.nodes.sort((a, b) => a[0] - b[0]);
    this.bases = this.nodes.map(([base]) => base);
    this.nodes = this.nodes.map(([, node]) => node);
  }

  range(from, to) { // of characters of the document
    if (from >= to || !this.nodes.length) return null;
    const range = document.createRange();
    const first = place(this.bases, from), last = place(this.bases, to - 1);
    range.setStart(this.nodes[first], Math.min(Math.max(from - this.bases[first], 0), this.nodes[first].length));
    range.setEnd(this.nodes[last], Math.min(Math.max(to - this.bases[last], 0), this.nodes[last].length));
    return range;
  }
  tokenRange(token) { return this.range(this.result.offset[token], this.result.offset[token + 1]); }

  tokenAt(x, y) {
    let node, offset;
    if (document.caretPositionFromPoint) {
      const found = document.caretPositionFromPoint(x, y);
      if (!found) return null;
      [node, offset] = [found.offsetNode, found.offset];
    } else {
      const found = document.caretRangeFromPoint?.(x, y);
      if (!found) return null;
      [node, offset] = [found.startContainer, found.startOffset];
    }
    const base = this.base.get(node);
    if (base === undefined) return null;
    for (const at of [offset, offset - 1]) { // the caret is at the nearer edge of a character
      if (at < 0 || at >= node.length) continue;
      const range = document.createRange();
      range.setStart(node, at);
      range.setEnd(node, at + 1);
      for (const box of range.getClientRects())
        if (box.left <= x && x <= box.right && box.top <= y && y <= box.bottom) return this.result.at(base + at);
    }
    return null;
  }

  listen() {
    let waiting = false;
    this.body.addEventListener("pointermove", (event) => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        hover(this, this.tokenAt(event.clientX, event.clientY));
      });
    });
    this.body.addEventListener("pointerleave", () => hover(this, null));
    this.body.addEventListener("click", (event) => {
      if (event.target.closest("summary") || String(getSelection())) return;
      const token = this.tokenAt(event.clientX, event.clientY);
      if (token !== null) select(this, token);
    });
  }

  // --- The timeline ---

  timeline() {
    const result = this.result;
    const zoom = make("span", { class: "zoom" },
      make("button", { "aria-label": "Zoom in", title: "Zoom in (+)", onclick: () => this.zoom(0.5) }, "+"),
      make("button", { "aria-label": "Zoom out", title: "Zoom out (−)", onclick: () => this.zoom(2) }, "−"),
      make("button", { title: "Show all (0)", onclick: () => this.zoom(0) }, "All"));
    const key = (kind, words) => make("span", { class: "key" }, make("i", { class: kind }), words);
    const bar = make("div", { class: "bar" }, key("", "writes"), key("waits", "waits"), key("critical", "critical path"), key("forced", "forced"), zoom);
    this.canvas = make("canvas", { tabindex: "0", role: "slider", "aria-label": `Timeline of ${result.title}: arrow keys move along and across branches`, "aria-valuemin": "1", "aria-valuemax": result.count, "aria-valuenow": "1" });
    this.setValue(null);
    this.pointer();
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.scroll = make("div", { class: "scroll" }, this.canvas);
    return make("div", { class: "card time" }, bar, this.scroll, this.table());
  }

  table() {
    const result = this.result;
    const body = make("tbody");
    const details = make("details", { class: "table" }, make("summary", {}, `${number(result.branches.length)} branch${result.branches.length === 1 ? "" : "es"} as a table`),
      make("div", { tabindex: "0", role: "region", "aria-label": "Branches" }, make("table", {}, make("thead", {}, make("tr", {},
        ...["branch", "tokens", "first step", "last step", "waits", "for", "critical"].map((name) => make("th", { scope: "col" }, name)))), body)));
    details.addEventListener("toggle", () => {
      if (body.childElementCount || !details.open) return;
      result.branches.forEach((branch, at) => {
        const words = branch.parent === null ? "the answer itself" : `${branch.name} ${branch.title}`;
        const go = make("button", { style: { "padding-left": `${branch.depth}rem` }, onclick: () => result.own[at].length && select(this, result.own[at][0], true) }, words);
        body.append(make("tr", {}, make("th", { scope: "row" }, go), ...[number(branch.num_tokens), number(branch.step[0]), number(branch.step[1] - 1),
          number(branch.reduce[1] - branch.step[1]), branch.waits_for === null ? "" : result.branches[branch.waits_for].name, branch.critical ? "yes" : ""].map((value) => make("td", {}, value))));
      });
    });
    return details;
  }

  // Steps or positions that every column draws, so that they can be compared.
  extent() { return Math.max(1, ...state.columns.map((column) => column.result.end(state.axis))); }
  span() { return this.view ?? [0, this.extent()]; }

  zoom(factor) {
    const [begin, end] = this.span(), all = this.extent();
    const selected = state.selected?.column === this ? this.result.time(state.selected.token, state.axis) : null;
    const middle = selected !== null && selected >= begin && selected <= end ? selected : (begin + end) / 2;
    const width = Math.max((end - begin) * factor, 12);
    if (!factor || width >= all) this.view = null;
    else {
      const from = Math.min(Math.max(middle - width / 2, 0), all - width);
      this.view = [from, from + width];
    }
    this.draw();
  }

  pointer() {
    let drag = null;
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, view: this.span(), moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag && this.view && Math.abs(event.clientX - drag.x) > 3) {
        drag.moved = true;
        const [begin, end] = drag.view, width = end - begin;
        const from = Math.min(Math.max(begin - (event.clientX - drag.x) * width / this.plot.width, 0), this.extent() - width);
        this.view = [from, from + width];
        this.draw();
      } else hover(this, this.hit(event));
    });
    canvas.addEventListener("pointerup", (event) => {
      const token = drag?.moved ? null : this.hit(event);
      drag = null;
      if (token !== null) select(this, token, true);
    });
    canvas.addEventListener("pointercancel", () => { drag = null; });
    canvas.addEventListener("pointerleave", () => { if (!drag) hover(this, null); });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8);
    }, { passive: false });
  }

  hit(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top - this.plot.top) / this.plot.row);
    const [begin, end] = this.span();
    const time = begin + (event.clientX - box.left - this.plot.left) / this.plot.width * (end - begin);
    return this.nearest(time, row);
  }

  // The token of a row that is written at a time. Branches of a row follow each other.
  nearest(time, row) {
    const result = this.result;
    let best = null, distance = 1.5;
    result.branches.forEach((branch, at) => {
      const own = result.own[at];
      if (branch.row !== row || !own.length) return;
      const times = (index) => result.time(own[index], state.axis);
      let low = 0, high = own.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (times(middle) <= time) low = middle; else high = middle - 1;
      }
      const away = times(low) > time ? times(low) - time : Math.max(time - times(low) - 1, 0);
      if (away < distance) [best, distance] = [own[low], away];
    });
    return best;
  }

  key(event) {
    const result = this.result;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "0") this.zoom(0);
    else if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) {
      const token = state.selected?.column === this ? state.selected.token : null;
      if (token === null) select(this, 0);
      else {
        const own = result.own[result.branch(token)], at = place(own, token);
        let next = null;
        if (event.key === "ArrowLeft") next = own[at - 1];
        else if (event.key === "ArrowRight") next = own[at + 1];
        else if (event.key === "Home") next = own[0];
        else if (event.key === "End") next = own[own.length - 1];
        else next = this.across(token, event.key === "ArrowUp" ? -1 : 1);
        if (next !== undefined && next !== null) select(this, next);
      }
    } else if (event.key === "Enter" && state.selected?.column === this) reveal(this, state.selected.token);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // The nearest token in time in the next branch above or below that was then at work.
  across(token, direction) {
    const result = this.result, row = result.branches[result.branch(token)].row, time = result.time(token, state.axis);
    for (let next = row + direction; next >= 0 && next < result.rows; next += direction) {
      let best = null, distance = Infinity;
      result.branches.forEach((branch, at) => {
        const own = result.own[at];
        if (branch.row !== next || !own.length) return;
        for (const index of [place(own.map((each) => result.time(each, state.axis)), time)]) {
          const away = Math.abs(result.time(own[index], state.axis) - time);
          if (away < distance) [best, distance] = [own[index], away];
        }
      });
      if (best !== null) return best;
    }
    return null;
  }

  setValue(token) {
    const result = this.result;
    this.canvas.setAttribute("aria-valuenow", token === null ? 1 : token + 1);
    const { stats } = result;
    this.canvas.setAttribute("aria-valuetext", token === null
      ? `${stats.num_paths} paths, ${stats.num_tokens} tokens in ${stats.num_steps} steps; no token selected`
      : describe(result, token).map(([name, value]) => `${name} ${value}`).join(", "));
  }

  draw() {
    const canvas = this.canvas;
    if (!canvas?.isConnected) return;
    const result = this.result, axis = state.axis, style = getComputedStyle(root);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const inks = Array.from({ length: COLORS + 1 }, (_, at) => color(`c${at}`));
    const [ink, soft, line, card] = ["ink", "soft", "line", "card"].map(color);
    const rows = result.rows, row = rows <= 14 ? 24 : rows <= 40 ? 17 : 10;
    const width = this.scroll.clientWidth, top = 20, left = 2;
    const plot = this.plot = { left, top, row, width: width - left - 8 };
    const height = top + rows * row + 4, ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, height);
    const [begin, end] = this.span(), scale = plot.width / (end - begin);
    const x = (time) => left + (time - begin) * scale, y = (at) => top + at * row;
    const thick = row - (row > 12 ? 8 : 3), middle = (at) => y(at) + row / 2;
    const selected = state.selected?.column === this ? state.selected.token : null;
    const hovered = state.hover?.column === this ? state.hover.token : null;
    pen.save();
    pen.beginPath();
    pen.rect(left, 0, plot.width + 6, height);
    pen.clip();
    // the axis
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const tick = niceTick((end - begin) / Math.max(plot.width / 90, 1));
    for (let at = Math.ceil(begin / tick) * tick; at <= end; at += tick) {
      pen.fillStyle = line;
      pen.fillRect(Math.round(x(at)), 14, 1, height);
      pen.fillStyle = soft;
      pen.fillText(number(at), x(at) + 3, 7);
    }
    // who waited, forks and reduces
    const at = axis === "step" ? 1 : 0;
    const times = (branch) => axis === "step" ? branch.step : branch.position;
    const blocks = new Map();
    for (const branch of result.branches) {
      if (branch.parent === null) continue;
      if (!blocks.has(branch.block)) blocks.set(branch.block, []);
      blocks.get(branch.block).push(branch);
      pen.strokeStyle = soft;
      pen.lineWidth = 1.4;
      pen.setLineDash([1.5, 3.5]);
      if (branch.reduce[at] > times(branch)[1]) stroke(pen, x(times(branch)[1]) + 2, middle(branch.row), x(branch.reduce[at]), middle(branch.row));
    }
    for (const paths of blocks.values()) {
      const parent = result.branches[paths[0].parent], last = paths[paths.length - 1];
      const fork = x(Math.min(...paths.map((path) => times(path)[0]))), reduce = x(paths[0].reduce[at]);
      if (reduce < 0 || fork > width) continue;
      pen.strokeStyle = soft;
      pen.lineWidth = 1.4;
      pen.setLineDash([1.5, 3.5]);
      stroke(pen, fork, middle(parent.row), reduce, middle(parent.row));
      pen.setLineDash([]);
      pen.lineWidth = 1;
      stroke(pen, fork, middle(parent.row), fork, middle(last.row));
      stroke(pen, reduce, middle(parent.row), reduce, middle(last.row));
    }
    pen.setLineDash([]);
    // what was written
    result.segments.forEach((segment, number_) => {
      if (segment.start === segment.stop) return;
      const branch = result.branches[segment.branch];
      const first = x(result.begin(segment, axis)), past = x(result.time(segment.stop - 1, axis) + 1);
      if (past < 0 || first > width) return;
      const seen = selected === null || result.sees(selected, number_);
      pen.globalAlpha = seen ? 1 : 0.22;
      pen.fillStyle = inks[branch.color];
      const high = y(branch.row) + (row - thick) / 2;
      if (scale < 4) pen.fillRect(first, high, Math.max(past - first, 1), thick);
      else this.cells(pen, segment, x, scale, high, thick, inks[branch.color], card);
      if (branch.critical) {
        pen.fillStyle = ink;
        pen.fillRect(first, high + thick, Math.max(past - first, 1), row > 12 ? 2.5 : 1.5);
      }
      if (scale < 4 && row > 12 && past - first > 26) {
        const from = Math.max(first, left) + 5;
        const words = branch.parent === null ? (segment.start === 0 ? "answer" : "") : segment.start === result.own[segment.branch][0] ? `${branch.name}  ${branch.title}` : "";
        pen.fillStyle = card;
        pen.font = "600 11px system-ui, sans-serif";
        const fits = fit(pen, words, past - from - 4);
        if (fits) pen.fillText(fits, from, high + thick / 2 + 0.5);
      }
    });
    pen.globalAlpha = 1;
    for (const [token, mark] of [[hovered, soft], [selected, ink]]) {
      if (token === null) continue;
      const from = x(result.time(token, axis)), high = y(result.branches[result.branch(token)].row);
      pen.fillStyle = mark;
      pen.globalAlpha = 0.35;
      pen.fillRect(from + Math.max(scale, 1) / 2 - 0.5, 14, 1, height);
      pen.globalAlpha = 1;
      pen.strokeStyle = mark;
      pen.lineWidth = 2;
      pen.strokeRect(from - 1.5, high + 1.5, Math.max(scale, 2) + 3, row - 3);
    }
    pen.restore();
  }

  // Tokens one by one. What one step writes in a branch shares its cell.
  cells(pen, segment, x, scale, high, thick, ink, card) {
    const result = this.result;
    pen.font = "11px ui-monospace, monospace";
    for (let token = segment.start; token < segment.stop;) {
      const time = result.time(token, state.axis);
      let past = token + 1;
      while (past < segment.stop && result.time(past, state.axis) === time) past++;
      const from = x(time);
      if (from + scale > 0 && from < this.plot.width + 10) {
        for (let each = token; each < past; each++) {
          const part = thick / (past - token), top = high + (each - token) * part;
          pen.fillStyle = pen.strokeStyle = ink;
          pen.lineWidth = 1;
          if (result.forced[each]) {
            if (part > 4) pen.strokeRect(from + 1, top + 0.5, scale - 2, part - 1.5);
            else { const alpha = pen.globalAlpha; pen.globalAlpha = alpha * 0.45; pen.fillRect(from + 0.5, top, scale - 1, part - 0.8); pen.globalAlpha = alpha; }
          } else pen.fillRect(from + 0.5, top, scale - 1, Math.max(part - 0.6, 0.6));
          if (part > 10 && scale > 14) {
            pen.fillStyle = result.forced[each] ? ink : card;
            const words = fit(pen, shown(result.tokens.text[each]), scale - 5);
            if (words) pen.fillText(words, from + 3, top + part / 2 + 0.5);
          }
        }
      }
      token = past;
    }
  }
}

function leaves(path) { // how many paths stand side by side in it at most
  let most = 1;
  for (const item of path.items) if (item.kind === "block") most = Math.max(most, item.paths.reduce((sum, each) => sum + leaves(each), 0));
  return Math.min(most, 6);
}
function stroke(pen, fromX, fromY, toX, toY) { pen.beginPath(); pen.moveTo(fromX, fromY); pen.lineTo(toX, toY); pen.stroke(); }
function niceTick(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
  return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= least);
}
function fit(pen, words, room) {
  if (room < 8 || !words) return "";
  if (pen.measureText(words).width <= room) return words;
  let kept = words.slice(0, Math.max(Math.floor(room / 5), 0));
  while (kept && pen.measureText(`${kept}…`).width > room) kept = kept.slice(0, -1);
  return kept ? `${kept}…` : "";
}
const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "�");

// --- Selection, tied both ways -------------------------------------------------------------------------------------

function describe(result, token) {
  const text = shown(result.tokens.text[token]), logprob = result.tokens.logprob?.[token];
  const seen = result.numSeen(token);
  return [
    ["token", `${number(token + 1)} of ${number(result.count)}`, text],
    ["branch", result.branchName(result.branch(token))],
    ["step", number(result.tokens.step[token])],
    ["position", number(result.position[token])],
    ...(logprob === undefined || logprob === null ? [] : [["log-probability", `${logprob.toFixed(3)} (${(100 * Math.exp(logprob)).toFixed(1)} %)`]]),
    ...(result.forced[token] ? [["forced:", "written by the engine"]] : []),
    ["sees", `${number(seen)} of ${number(token)} tokens before it${result.prompt === null ? "" : ", and the prompt"}`],
  ];
}

function tell() {
  const of = state.hover ?? state.selected, details = $("details");
  details.setAttribute("aria-live", state.hover ? "off" : "polite");
  if (!of) return void details.replaceChildren(make("span", {}, "Point at a token or a bar, or select one. Arrow keys move along the timeline."));
  details.replaceChildren(...describe(of.column.result, of.token).map(([name, value, text]) => {
    const part = make("span", {}, `${name} `, make("b", {}, value));
    if (text !== undefined) part.append(" ", make("code", {}, text));
    return part;
  }));
}

function hover(column, token) {
  if ((state.hover?.token ?? null) === token && (token === null || state.hover.column === column)) return;
  const before = state.hover?.column;
  state.hover = token === null ? null : { column, token };
  const range = token === null ? null : column.tokenRange(token);
  highlight("hover", range ? [range] : [], 2);
  tell();
  column.draw();
  if (before && before !== column) before.draw();
}

function select(column, token, reveals = false) {
  const before = state.selected?.column;
  state.selected = token === null ? null : { column, token };
  if (before) mark(before, null);
  if (token === null) highlight("select", []);
  else {
    mark(column, token);
    const range = column.tokenRange(token);
    if (canHighlight) highlight("select", range ? [range] : [], 5);
    else if (range) { getSelection().removeAllRanges(); getSelection().addRange(range); }
    keepInView(column, token);
    if (reveals) reveal(column, token);
  }
  tell();
  if (before && before !== column) before.draw();
  column?.draw();
}

// Dim what the token does not see.
function mark(column, token) {
  const result = column.result;
  const seen = token === null ? null : result.segments.map((_, at) => result.sees(token, at));
  for (const [element, segment] of column.runs) element.classList.toggle("unseen", seen !== null && !seen[segment]);
  const here = token === null ? null : result.branch(token);
  for (const [branch, lane] of column.lanes) lane.classList.toggle("here", branch === here);
  column.setValue(token);
}

function keepInView(column, token) {
  const [begin, end] = column.span(), time = column.result.time(token, state.axis), width = end - begin;
  if (column.view && (time < begin || time > end - width * 0.02)) {
    const from = Math.min(Math.max(time - width / 2, 0), column.extent() - width);
    column.view = [from, from + width];
  }
  if (!column.plot) return;
  const y = column.plot.top + column.result.branches[column.result.branch(token)].row * column.plot.row;
  const box = column.scroll;
  if (y < box.scrollTop + column.plot.top || y + column.plot.row > box.scrollTop + box.clientHeight) box.scrollTop = y - box.clientHeight / 2;
}

function open(node) {
  for (let element = node.parentElement; element; element = element.parentElement) if (element.matches?.("details")) element.open = true;
}

function reveal(column, token) {
  const range = column.tokenRange(token);
  if (range) scrollToRange(range);
}

function scrollToRange(range) {
  open(range.startContainer);
  const element = range.startContainer.parentElement;
  let box = range.getBoundingClientRect();
  if (!box.height) { // a tag that is not shown: the element around it
    let around = element;
    while (around && !around.getClientRects().length) around = around.parentElement;
    around?.scrollIntoView({ block: "nearest" });
    return;
  }
  const low = ($("results").getBoundingClientRect().top, document.querySelector("header").offsetHeight + 8), high = innerHeight - $("details").offsetHeight - 8;
  if (box.top < low || box.bottom > high) {
    element.scrollIntoView({ block: "nearest" }); // lays out what was skipped
    box = range.getBoundingClientRect();
    scrollBy({ top: box.top - innerHeight * 0.4 });
  }
}

// --- Search --------------------------------------------------------------------------------------------------------

function search(words) {
  state.hits = [];
  state.hit = -1;
  if (words) {
    const sought = words.toLowerCase();
    for (const column of state.columns) {
      const text = column.result.lower ??= column.result.text.toLowerCase();
      // a text that changes its length in lower case has other offsets: it is searched as it is
      const within = text.length === column.result.text.length ? text : column.result.text;
      for (let at = within.indexOf(sought); at >= 0 && state.hits.length < MOST_HITS; at = within.indexOf(sought, at + sought.length))
        state.hits.push([column, at, at + sought.length]);
    }
  }
  highlight("hit", state.hits.map(([column, from, to]) => column.range(from, to)).filter(Boolean), 3);
  step(state.hits.length ? 1 : 0);
}

function step(by) {
  const count = state.hits.length;
  state.hit = count ? (state.hit + by + count) % count : -1;
  $("results").parentElement.classList.toggle("searches", Boolean($("search").value));
  $("hits").textContent = $("search").value ? (count ? `${state.hit + 1} / ${count}${count === MOST_HITS ? "+" : ""}` : "none") : "";
  if (!count) return highlight("hit-now", []);
  const [column, from, to] = state.hits[state.hit];
  const range = column.range(from, to);
  highlight("hit-now", range ? [range] : [], 4);
  if (range) scrollToRange(range);
}

// --- The page ------------------------------------------------------------------------------------------------------

function show(indices) {
  state.shown = indices.slice(0, MOST_COLUMNS);
  state.selected = state.hover = null;
  highlight("select", []);
  highlight("hover", []);
  state.columns = [];
  state.columns = state.shown.map((index) => new Column(index));
  state.columns.forEach((column) => column.finish());
  root.style.setProperty("--columns", state.columns.length);
  $("results").replaceChildren(...state.columns.map((column) => column.element));
  $("add").hidden = results.length < 2 || state.columns.length >= MOST_COLUMNS;
  $("sure").hidden = !state.columns.some((column) => column.result.tokens.logprob);
  unsure();
  search($("search").value);
  tell();
  draw();
}
function draw() { for (const column of state.columns) column.draw(); }

function unsure() {
  const isOn = $("sure").getAttribute("aria-pressed") === "true", ranges = [[], []];
  if (isOn) for (const column of state.columns)
    column.result.tokens.logprob?.forEach((logprob, token) => {
      if (logprob === null || logprob >= Math.log(0.5)) return;
      const range = column.tokenRange(token);
      if (range) ranges[Number(logprob < Math.log(0.1))].push(range);
    });
  highlight("unsure", ranges[0], 0);
  highlight("unsure-more", ranges[1], 1);
}

function setAxis(axis) {
  state.axis = axis;
  $("axis").textContent = `Axis: ${axis}s`;
  for (const column of state.columns) column.view = null;
  draw();
}
function toggle(id, then) {
  const isOn = $(id).getAttribute("aria-pressed") !== "true";
  $(id).setAttribute("aria-pressed", isOn);
  then(isOn);
}
const actions = {
  axis: () => setAxis(state.axis === "step" ? "position" : "step"),
  tags: () => toggle("tags", (isOn) => $("results").classList.toggle("show-tags", isOn)),
  sure: () => { if (!$("sure").hidden) toggle("sure", unsure); },
  fold: () => {
    const lanes = [...document.querySelectorAll("details.lane")], opens = !lanes.some((lane) => lane.open);
    for (const lane of lanes) lane.open = opens;
    $("fold").textContent = opens ? "Fold" : "Unfold";
  },
  add: () => {
    if ($("add").hidden) return;
    const next = results.findIndex((_, at) => !state.shown.includes(at));
    show([...state.shown, next < 0 ? 0 : next]);
  },
  theme: () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"),
  keys: () => {
    const isHidden = $("help").hidden;
    $("help").hidden = !isHidden;
    $("keys").setAttribute("aria-expanded", isHidden);
  },
  next: () => step(1),
  previous: () => step(-1),
};
function setTheme(theme) { root.dataset.theme = theme; draw(); }

const dark = matchMedia("(prefers-color-scheme: dark)");
root.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", action);
$("search").addEventListener("input", (event) => search(event.target.value));
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); step(event.shiftKey ? -1 : 1); }
  else if (event.key === "Escape") { event.target.value = ""; search(""); event.target.blur(); }
});
const KEYS = { f: "fold", t: "tags", x: "axis", d: "theme", p: "sure", a: "add", "?": "keys" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  if (event.key === "/") { event.preventDefault(); $("search").focus(); $("search").select(); }
  else if (event.key === "Escape") { if (state.selected) select(null, null); }
  else if (KEYS[event.key]) actions[KEYS[event.key]]();
});
let printed = null;
addEventListener("beforeprint", () => {
  printed = root.dataset.theme;
  for (const lane of document.querySelectorAll("details.lane")) lane.open = true;
  setTheme("light");
});
addEventListener("afterprint", () => setTheme(printed));
let resizing = 0;
addEventListener("resize", () => { cancelAnimationFrame(resizing); resizing = requestAnimationFrame(draw); });
$("page-title").textContent = data.title;
setAxis("step");
// Answers to one problem stand beside each other from the start.
const beside = results.findIndex((result, at) => at > 0 && result.key !== null && result.key === results[0].key);
show(beside > 0 && innerWidth > 900 ? [0, beside] : [0]);
root.dataset.ready = "yes";
})();
