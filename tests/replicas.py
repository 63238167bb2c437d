"""Load on two replicas of the endpoint behind a proxy, one of which is killed."""

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2  # comes with openai
import openai

NAME = "multiverse-tiny"
BEGUN, LATER = 4, 6  # answers that run when a replica is killed, two on each replica, and requests that wait


@dataclass
class Asked:
    """A request through the proxy, and what its client saw."""

    number: int
    streams: bool
    has_begun: bool = False
    text: str = ""
    is_complete: bool = False
    error: Exception | None = None

    def body(self) -> dict[str, Any]:
        """Return the request. An answer has no end of its own, so that it lasts."""
        messages = [{"role": "user", "content": f"A={self.number}+6; total?"}]
        tokens = 600 if self.number < BEGUN else 30
        return {"model": NAME, "messages": messages, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}

    def ask(self, url: str) -> None:
        """Ask, and note what comes. Only the proxy may try again."""
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            try:
                if not self.streams:
                    self.text = text_of(client.chat.completions.create(**self.body()).choices[0].message)
                    self.is_complete = True
                    return
                for chunk in client.chat.completions.create(**self.body(), stream=True):
                    self.has_begun = True
                    self.text += text_of(chunk.choices[0].delta)
                    self.is_complete = chunk.choices[0].finish_reason is not None
            except Exception as err:
                self.error = err


def text_of(part: Any) -> str:
    """Return reasoning and content of a message or of a piece of one."""
    return (getattr(part, "reasoning_content", None) or "") + (part.content or "")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def read_metric(url: str, name: str) -> float:
    """Return a metric of a server."""
    lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
    (value,) = (line.split()[1] for line in lines if line.split()[0] == f"multiverse:{name}")
    return float(value)


def kill_one_under_load(url: str, victim: int, has_waiting: Callable[[], bool]) -> None:
    """Kill a replica with -9 while it writes two answers and others wait. Only the two may break.

    Args:
        url: of the proxy, before two replicas that write two answers at once.
        victim: process to kill.
        has_waiting: whether requests wait in the victim.
    """
    asked = [Asked(number, streams=number < BEGUN or number % 2 == 0) for number in range(BEGUN + LATER)]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        calls = []
        for each in asked[:BEGUN]:  # one after the other, so that each replica gets two
            calls.append(pool.submit(each.ask, url))
            wait_for(lambda each=each: each.has_begun, f"it does not begin: {each}")
        calls += [pool.submit(each.ask, url) for each in asked[BEGUN:]]
        wait_for(has_waiting, "no request waits in the replica")
        assert not any(each.is_complete or each.error for each in asked), asked
        os.kill(victim, signal.SIGKILL)
        for call in calls:
            call.result()
    broken = [each for each in asked if not each.is_complete]
    assert len(broken) == 2, broken
    for each in broken:  # the client is told: it is no silent end
        assert each.number < BEGUN
        assert isinstance(each.error, openai.APIError), repr(each.error)
    for each in asked[BEGUN:]:
        again = Asked(each.number, streams=False)
        again.ask(url)
        assert (again.error, again.text) == (None, each.text)
