"""A stand-in for a language model that curates: an OpenAI-compatible endpoint that answers by rule, over real HTTP.

    python tests/rule_server.py --targets documents.jsonl --delay 0.1

prints its address on its first line and serves until it is killed. It knows the document that a problem should come
to: a chains problem's own, or that of a row of --targets (``prompt``, ``document``). Each stage of a trace gets the
answer that leads there, worked out from the prompt's own numbered sentences.

It can be bad, from the start (--behave) or from a POST to ``/behave`` on. A share of answers are lies (LIES), chosen
by the request, so that the same one is always lied to in the same way; a share of requests fail (FAILURES), each twice
and then no more. GET ``/log`` tells what was asked, ``/times`` when it answered.
"""

import argparse
import asyncio
import functools
import hashlib
import itertools
import json
import random
import re
import time
from collections import Counter
from typing import Any

from multiverse_hf.curator.stages import JUDGE, STAGES, read_template
from multiverse_hf.data.chains import document as chains_document
from multiverse_hf.data.chains import parse_problem
from multiverse_hf.documents import Document, Parallel, Think, parse_document
from multiverse_hf.modeling.tags import LABEL

TASKS = {read_template(stage.name, stage.version).partition("\n")[0]: stage.name for stage in (*STAGES, JUDGE)}
LIES = ("malformed", "truncated", "prose", "other form")  # of any stage
STAGE_LIES = {
    "groups": ("unknown step",),
    "structure": ("lost step",),
    "refill": ("wrong span", "lost sentences", "other ending"),
    "mapreduce": ("mention", "rewritten", "tags", "empty outline"),
}
FAILURES = ("429", "500", "503", "drop", "half", "hang")


def leaves(document: Document) -> list[tuple[str, str]]:
    """Give the steps with text of their own, in order, and their text."""
    found = []
    for name, children in steps(document):
        if len(children) == 1:
            found.append((name, text_of(children[0])))
        else:
            for inner, child in substeps(name, children):
                found.append((inner, text_of(child)))
    return found


def text_of(node: Any) -> str:
    """Give a leaf's text without its label."""
    text = node.text
    match = LABEL.match(text)
    return text[match.end() :] if match else text


def top(document: Document) -> list[Any]:
    """Give what stands in ``<Think>``, without blank text."""
    inside = next((child for child in document.children if isinstance(child, Think)), document)
    return [child for child in inside.children if isinstance(child, Parallel) or child.text.strip()]


def contents(path: Any) -> list[Any]:
    return [child for child in path.children if isinstance(child, Parallel) or text_of(child).strip()]


def steps(document: Document) -> list[tuple[str, list[Any]]]:
    """Give every step by name with what it consists of: texts and blocks."""
    found = []
    for child in top(document):
        found += [contents(path) for path in child.paths] if isinstance(child, Parallel) else [[child]]
    return [(str(number), children) for number, children in enumerate(found, start=1)]


def substeps(name: str, children: list[Any]) -> list[tuple[str, Any]]:
    """Give the substeps of a step that has a block in it."""
    found = itertools.chain(*(child.paths if isinstance(child, Parallel) else (child,) for child in children))
    return [(f"{name}.{place}", child) for place, child in enumerate(found, start=1)]


def answer(stage: str, document: Document, sentences: list[str]) -> dict[str, Any]:
    """Give a stage's answer."""
    return {
        "summary": summary,
        "groups": groups,
        "structure": structure,
        "refill": lambda target: refill(target, sentences),
        "mapreduce": mapreduce,
        "judge": lambda _: {"dependent": []},
    }[stage](document)


def summary(document: Document) -> dict[str, Any]:
    return {
        "steps": [
            {
                "summary": f"Step {name}.",
                "substeps": [f"Part {inner}." for inner, _ in substeps(name, children)] if len(children) > 1 else [],
            }
            for name, children in steps(document)
        ]
    }


def structure(document: Document) -> dict[str, Any]:
    names = iter(steps(document))

    def placed(name: str, children: list[Any]) -> dict[str, Any]:
        if len(children) == 1:
            return {"step": name, "parts": []}
        inner = (each for each, _ in substeps(name, children))
        sizes = [len(child.paths) if isinstance(child, Parallel) else 1 for child in children]
        return {"step": name, "parts": [{"steps": list(itertools.islice(inner, size))} for size in sizes]}

    sizes = [len(child.paths) if isinstance(child, Parallel) else 1 for child in top(document)]
    return {"parts": [{"steps": [placed(*each) for each in itertools.islice(names, size)]} for size in sizes]}


def groups(document: Document) -> dict[str, Any]:
    parts = structure(document)["parts"]
    found = [[step["step"] for step in part["steps"]] for part in parts]
    found += [inner["steps"] for part in parts for step in part["steps"] for inner in step["parts"]]
    argument = "Each starts from the problem alone."
    return {"groups": [{"steps": names, "argument": argument} for names in found if len(names) > 1]}


def refill(document: Document, sentences: list[str]) -> dict[str, Any]:
    """Consume numbered sentences leaf by leaf, by the characters that are not blank."""
    quotes, number = [], 0
    for name, text in leaves(document):
        due, first = len("".join(text.split())), number + 1
        while due > 0 and number < len(sentences):
            due -= len("".join(sentences[number].split()))
            number += 1
        assert due == 0, f"step {name} and the sentences part in other places"
        quotes.append({"step": name, "first": first, "last": number})
    return {"quotes": quotes}


def mapreduce(document: Document) -> dict[str, Any]:
    blocks = [
        {
            "block": f"B{number}",
            "outlines": [text_of(outline).strip() for outline in block.outlines],
            "conclusion": block.conclusion.text.strip(),
        }
        for number, (block, _) in enumerate(document.blocks(), start=1)
    ]
    return {"blocks": blocks, "rewrites": []}


def reworded(sentences: list[str], refused: str) -> list[dict[str, Any]]:
    """Take words that a path must not say, as a refusal quotes them, out of the sentences that have them."""
    rewrites = {}
    for words in re.findall(r"refers to another path: (?:'(.*?)'|\"(.*?)\"); rewrite", refused):
        pattern = re.compile(r"\s+".join(map(re.escape, "".join(words).split())))
        found = (number for number, text in enumerate(sentences, start=1) if pattern.search(text))
        rewrites |= {number: pattern.sub("this", sentences[number - 1]).strip() for number in found}
    return [{"sentence": number, "text": text} for number, text in rewrites.items()]


# Badness


def lie(kind: str, truth: dict[str, Any], target: Document, sentences: list[str]) -> tuple[str, str]:
    """Give the text of a bad answer, and how it finished."""
    made = json.loads(json.dumps(truth))
    if kind == "truncated":
        text = json.dumps(truth)
        return text[: len(text) // 2], "length"
    if kind == "prose":
        return "I am sorry, I would rather not say.", "stop"
    if kind == "other form":
        return json.dumps({"result": truth}), "stop"
    if kind == "unknown step":
        made["groups"][0]["steps"].append("99")
    elif kind == "lost step":
        made["parts"].pop()
    elif kind == "wrong span":
        made["quotes"][0]["last"] += len(sentences)
    elif kind == "lost sentences":
        for quote in made["quotes"]:
            quote["last"] = quote["first"]
    elif kind == "other ending" and made["quotes"][-2]["first"] < made["quotes"][-2]["last"]:
        *_, before, last = made["quotes"]
        made["quotes"].append({"step": before["step"], "first": last["first"], "last": last["last"]})
        last["first"] = last["last"] = before["last"]
        before["last"] -= 1
    elif kind in ("mention", "rewritten"):
        spans = {each["step"]: each for each in refill(target, sentences)["quotes"]}
        group = groups(target)["groups"][-1]["steps"]
        span = next(spans[name] for name in reversed(group) if name in spans)
        text = "As path 1 found, this is so." if kind == "mention" else "Something else entirely. " * 40
        made["rewrites"] = [{"sentence": span["first"], "text": text}]
    elif kind == "tags":
        made["blocks"][0]["conclusion"] += "</Conclusion></Parallel>"
    elif kind == "empty outline":
        made["blocks"][0]["outlines"][0] = " "
    else:
        return json.dumps(truth)[:-2] + ",}", "stop"
    return json.dumps(made), "stop"


class Server:
    """Answers requests.

    Attributes:
        behaviour: "lies" and "failures" (shares), "failing" (in which ways), "down", "schema" (False: refused),
            "status" and "message" (for all requests), "dependent" (what the judge finds).
        counts: what was received and how it was answered.
    """

    def __init__(self, targets: dict[str, str], delay: float, behaviour: dict[str, Any]) -> None:
        self.targets, self.delay, self.behaviour = targets, delay, behaviour
        self.counts: Counter[str] = Counter()
        self.failed: Counter[bytes] = Counter()
        self.in_flight = 0
        self.answered_at: list[float] = []

    @functools.lru_cache(maxsize=512)  # noqa: B019 - one server a process
    def target(self, problem: str) -> Document:
        return parse_document(
            self.targets[problem] if problem in self.targets else chains_document(parse_problem(problem))
        )

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def truth(self, stage: str, asked: str) -> tuple[dict[str, Any], Document, list[str], str]:
        """Give a stage's answer to a prompt's first two parts, and what it is worked out from."""
        problem, _, reasoning = asked.removeprefix("# Problem\n\n").partition("\n\n# Reasoning\n\n")
        sentences = re.split(r"^\[\d+\] ", reasoning, flags=re.MULTILINE)[1:]
        target = self.target(problem)
        found = answer(stage, target, sentences)
        return found, target, sentences, json.dumps(found)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                await self.respond(head.split(b" ", 2)[1].decode(), body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def respond(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/log":
            return send(writer, 200, dict(self.counts))
        if path == "/times":  # of the answers since it was last asked
            times, self.answered_at = self.answered_at, []
            return send(writer, 200, times)
        if path == "/behave":
            self.behaviour |= json.loads(body)
            return send(writer, 200, self.behaviour)
        self.counts["received"] += 1
        self.in_flight += 1
        self.counts["most in flight"] = max(self.counts["most in flight"], self.in_flight)
        try:
            await asyncio.sleep(self.delay)
            return await self.complete(json.loads(body), body, writer)
        finally:
            self.in_flight -= 1

    async def complete(self, request: dict[str, Any], body: bytes, writer: asyncio.StreamWriter) -> None:
        """Answer a completion, or fail to."""
        behaviour = self.behaviour
        if behaviour.get("down"):
            raise ConnectionError
        if status := behaviour.get("status"):
            return send(writer, status, {"error": {"message": behaviour.get("message", "as you asked")}})
        if "response_format" in request:
            self.counts["with schema"] += 1
            if behaviour.get("schema") is False:
                message = "response_format of type json_schema is not supported by this model"
                return send(writer, 400, {"error": {"message": message}})
        asked = json.dumps(request, sort_keys=True)  # which no client's way of writing JSON changes
        dice = random.Random(hashlib.sha256(asked.encode()).digest())
        if dice.random() < behaviour.get("failures", 0) and self.failed[hash(asked)] < 2:
            self.failed[hash(asked)] += 1
            return await self.fail(dice.choice(behaviour.get("failing", FAILURES)), writer)
        user = request["messages"][-1]["content"]
        at = user.index("\n\n# Task: ")
        stage = TASKS[user[at + 2 : user.index("\n", at + 2)]]
        truth, target, sentences, text = self.truth(stage, user[:at])
        if stage == "mapreduce" and (rewrites := reworded(sentences, user[at:])):
            text = json.dumps(truth | {"rewrites": rewrites})
        if stage == "judge" and behaviour.get("dependent"):
            text = json.dumps({"dependent": [{"path": "2", "quote": "so", "reason": "path 1 has it"}]})
        finish_reason = "stop"
        if dice.random() < behaviour.get("lies", 0):
            kind = dice.choice((*LIES, *STAGE_LIES.get(stage, ())))
            self.counts["lies"] += 1
            text, finish_reason = lie(kind, truth, target, sentences)
        elif "response_format" not in request:
            text = f"Here it is:\n```json\n{text}\n```"
        self.counts["answered"] += 1
        self.answered_at.append(time.monotonic())
        self.counts[stage] += 1
        send(writer, 200, completion(request, user, text, finish_reason))

    async def fail(self, kind: str, writer: asyncio.StreamWriter) -> None:
        self.counts[kind] += 1
        if kind == "429":
            send(writer, 429, {"error": {"message": "slow down"}}, "Retry-After: 0.2\r\n")
        elif kind in ("500", "503"):
            send(writer, int(kind), {"error": {"message": "out of order"}})
        elif kind == "half":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            raise ConnectionError
        elif kind == "hang":
            await asyncio.sleep(3600)
        else:
            raise ConnectionError


def completion(request: dict[str, Any], user: str, text: str, finish_reason: str) -> dict[str, Any]:
    """Give a completion as OpenAI's endpoint does; a token is four characters."""
    usage = {"prompt_tokens": len(user) // 4, "completion_tokens": len(text) // 4}
    usage["total_tokens"] = sum(usage.values())
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return {
        **{"id": "rule", "object": "chat.completion", "created": 0, "model": request["model"]},
        **{"choices": [choice], "usage": usage},
    }


def send(writer: asyncio.StreamWriter, status: int, value: Any, headers: str = "") -> None:
    data = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", help="JSONL with prompt and document")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds an answer takes")
    parser.add_argument("--behave", type=json.loads, default={}, help="JSON, as for /behave")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    targets = {}
    if args.targets:
        with open(args.targets, encoding="utf-8") as file:
            targets = {row["prompt"]: row["document"] for row in map(json.loads, file)}
    server = Server(targets, args.delay, args.behave)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", args.port, limit=1 << 24, backlog=1024)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
