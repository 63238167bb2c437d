"""``MultiverseEngine``: many requests at once, from many threads, each answered as if it were alone."""

import collections
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from .cache import LogCache
from .cpu import release_workers
from .distributed import Broadcast
from .engine import Engine
from .engine_config import EngineConfig
from .generation import read_requests
from .handles import MultiverseResult, RequestHandle
from .sampling import sequence_key
from .state import BranchEvent, Sequence, document_entries
from .tags import encode_prompt

logger = logging.get_logger(__name__)

PATIENCE = 60  # seconds that a process waits for a request that another one has


class MultiverseEngine:
    """Answers requests with continuous batching: sequences enter and leave at any step.

    Requests are admitted first come, first served. A long prompt is read in chunks, so that running answers go on.
    When the cache is full the last come is preempted and later read again; no answer changes by it, nor by what it
    was batched with. The weights must not change while the engine lives.

    With a tensor-parallel model every process makes the same calls, in the same order and from one thread, and closes
    its engine.

    Args:
        model: a Multiverse model.
        tokenizer: for prompts that are text, and for answers as text.
        config: options of the engine.
        **options: of :class:`~.engine_config.EngineConfig`, in place of those of ``config``.

    Raises:
        ValueError: if an option is out of range, or the cache does not fit the free memory.
        TypeError: if the model is no Multiverse model, or an option is unknown.
    """

    def __init__(self, model: Any, tokenizer: Any = None, config: EngineConfig | None = None, **options: Any) -> None:
        if not hasattr(model, "tags"):
            raise TypeError(
                f"MultiverseEngine takes a Multiverse model, got {type(model).__name__}; "
                "load it with MultiverseForCausalLM.from_pretrained"
            )
        self.config = config = dataclasses.replace(config or EngineConfig(), **options)
        self.model, self.tokenizer = model, tokenizer
        self.pack_weights = config.packs(model)
        self.max_cache_tokens, self.capacity_bytes, self.bytes_per_token = config.plan_cache(model)
        cache = LogCache(model.config.num_hidden_layers, self.max_cache_tokens)
        self._engine = Engine(
            model, model.tags, cache, config.max_num_seqs, config.prefill_chunk, config.decoding_for(model),
            pack_weights=self.pack_weights,
        )  # fmt: skip
        self._handles: dict[Sequence, RequestHandle] = {}
        self._inbox: collections.deque[Sequence] = collections.deque()
        self._lock = threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._after_step: list[Callable[[], None]] = []
        logger.warning_once(self.describe())

    def describe(self) -> str:
        """Return in a line how this engine decodes."""
        runner = self._engine.runner
        attention = "eager" if runner.is_eager else "flex" if runner.name == "static" else "sdpa"
        size = self.capacity_bytes / 2**30
        weights = ", packed weights" if self.pack_weights else ""
        return (
            f"MultiverseEngine: {runner.name} decoding with {attention} attention on {self.model.device}{weights}; "
            f"cache of {self.max_cache_tokens} tokens ({size:.2f} GiB)"
        )

    # What users call

    def submit(
        self,
        prompt: str | Ids[int] | Ids[dict[str, str]] | torch.Tensor,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        occurrence: int = 0,
        logprobs: int | None = None,
        on_event: Callable[[BranchEvent], None] | None = None,
        **kwargs: Any,
    ) -> RequestHandle:
        """Put a request in the queue. Any thread may.

        Args:
            prompt: text or chat messages, in which tags are text, or token ids.
            generation_config: as for the model's ``generate``.
            seed: of the sampling noise; with one, the same request gives the same answer. By default drawn from
                torch's generator.
            occurrence: which answer to this prompt it is. Others draw other noise with the same seed, as the rows of
                ``num_return_sequences`` do.
            logprobs: keep the log-probability of each sampled token and the entropy, and so many likeliest tokens.
            on_event: called with every event, in the engine's thread; keep it short.
            **kwargs: as for the model's ``generate``; ``max_time`` counts from now.

        Raises:
            ValueError: if the request can never be answered, with the numbers, or an option is wrong.
            RuntimeError: if the engine is closed.
        """
        handle = self._prepare(prompt, generation_config, seed, logprobs, on_event, kwargs)
        if occurrence:
            handle._sequence.request.key = sequence_key(handle._sequence.request.prompt, occurrence)
        self._enqueue([handle])
        return handle

    def _prepare(
        self,
        prompt: Any,
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        on_event: Callable[[BranchEvent], None] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> RequestHandle:
        """Read and check a request, and interpret its prompt."""
        kwargs = dict(kwargs or {})
        if "streamer" in kwargs:
            raise ValueError("submit takes no streamer; iterate over the handle, or pass on_event")
        if logprobs is not None and (not isinstance(logprobs, int) or isinstance(logprobs, bool) or logprobs < 0):
            raise ValueError(f"logprobs must be an integer of at least 0, got {logprobs!r}")
        handle = RequestHandle(self._cancel)
        kwargs.setdefault("return_dict_in_generate", True)
        input_ids = self._encode(prompt)
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))  # nothing of it is padding
        asked = read_requests(
            self.model,
            input_ids,
            generation_config,
            kwargs.pop("logits_processor", None),
            kwargs.pop("stopping_criteria", None),
            seed,
            {"tokenizer": self.tokenizer} | kwargs,
        )
        if len(asked.requests) > 1:
            raise ValueError(
                f"submit takes one prompt and one answer, got {len(asked.requests)}; submit each, with a seed of its "
                "own, or use generate"
            )
        (request,) = asked.requests
        request.num_logprobs = logprobs

        def listen(event: BranchEvent) -> None:
            handle._notify(event)
            if on_event is not None:
                on_event(event)

        request.on_event = listen
        handle._sequence = self._engine.begin(request)
        return handle

    def _enqueue(self, handles: list[RequestHandle]) -> None:
        """Hand requests to the engine's thread, all at one step."""
        if self.model.device.type == "cpu":
            release_workers()
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed; make another")
            if self._thread is not None and not self._thread.is_alive():
                raise RuntimeError("the engine's thread is gone, as in a forked process; make an engine there")
            for handle in handles:
                self._handles[handle._sequence] = handle
            self._inbox.extend(handle._sequence for handle in handles)
            if self._thread is None:
                arguments = weakref.ref(self), self._engine.broadcast, self.model.device, self._wake, self._stop
                self._thread = threading.Thread(target=_run, args=arguments, daemon=True)
                self._thread.start()
                # also at the interpreter's exit, which must not find the thread inside torch
                weakref.finalize(self, _end, self._thread, self._wake, self._stop)
        self._wake.set()

    def generate(
        self, prompts: str | Iterable[Any], generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> list[MultiverseResult]:
        """Answer prompts, and wait for all of them.

        Args:
            prompts: each as for :meth:`submit`; one string is one prompt.
            generation_config: as for :meth:`submit`, for all of them.
            **kwargs: as for :meth:`submit`, for all of them, and ``num_return_sequences``. Equal prompts get
                different noise, as in the model's ``generate``.

        Returns:
            The results, in order; with ``num_return_sequences`` those of one prompt next to each other.

        Raises:
            Exception: of the first request that failed; the others are cancelled.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        named = {name: kwargs.pop(name, None) for name in ("seed", "logprobs", "on_event")}
        copies = kwargs.pop("num_return_sequences", None)
        if copies is not None and (not isinstance(copies, int) or isinstance(copies, bool) or copies < 1):
            raise ValueError(f"num_return_sequences must be an integer of at least 1, got {copies!r}")
        prompts = [prompt for prompt in prompts for _ in range(copies or 1)]
        seen: collections.Counter[tuple[int, ...]] = collections.Counter()
        handles: list[RequestHandle] = []
        try:
            for some in batched(prompts, self.config.max_num_seqs):  # these may begin while the next are read
                new = [self._prepare(prompt, generation_config, **named, kwargs=kwargs) for prompt in some]
                for handle in new:
                    request = handle._sequence.request
                    request.key = sequence_key(request.prompt, seen[tuple(request.prompt)])
                    seen[tuple(request.prompt)] += 1
                self._enqueue(new)
                handles += new
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def add_step_callback(self, function: Callable[[], None]) -> None:
        """Have a function called after each step, in the engine's thread, once its events are told. Keep it short."""
        self._after_step.append(function)

    def memory(self) -> dict[str, Any]:
        """Report the cache: tokens it holds and has room for, bytes, and what is running and waiting.

        ``used_by`` gives the tokens that each running answer holds, in order of arrival. ``num_branches`` counts the
        branches that are being written, and ``num_steps`` all steps so far.
        """
        scheduler, cache = self._engine.scheduler, self._engine.cache
        extents = dict(cache.extents)  # a copy: the engine's thread goes on
        return {
            "capacity_tokens": self.max_cache_tokens,
            "used_tokens": cache.num_used,
            "capacity_bytes": self.capacity_bytes,
            "used_bytes": cache.num_used * self.bytes_per_token,
            "used_by": [extent.used for _, extent in sorted(extents.items())],
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting) + len(self._inbox),
            "num_preemptions": scheduler.num_preemptions,
            "num_branches": sum(len(sequence.live) for sequence in list(scheduler.running)),
            "num_steps": self._engine.num_steps,
        }

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def cancel_all(self) -> None:
        """Cancel what is running and waiting; the engine goes on."""
        for handle in list(self._handles.values()):
            handle.cancel()

    def close(self) -> None:
        """Cancel what is running, stop, and give the cache back; waits for the step in progress."""
        with self._lock:
            self._closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._engine.runner.free()

    def __enter__(self) -> "MultiverseEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The engine's thread

    def _encode(self, prompt: Any) -> torch.Tensor:
        if isinstance(prompt, torch.Tensor):
            return prompt[None] if prompt.ndim == 1 else prompt
        if not isinstance(prompt, str | list | tuple):
            raise TypeError(f"a prompt is text, chat messages or token ids, got {type(prompt).__name__}")
        if len(prompt) and isinstance(prompt[0], str | list | tuple) and not isinstance(prompt, str):
            raise ValueError(f"submit takes one prompt, got {len(prompt)}; use generate for a list")
        is_text = isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], dict))
        if not is_text:
            return torch.tensor([list(prompt)], dtype=torch.long if not len(prompt) else None)
        if self.tokenizer is None:
            raise ValueError("the engine was made without a tokenizer: give token ids, or make it with one")
        return encode_prompt(self.tokenizer, prompt, self.model.tags.names, return_tensors="pt")

    def _cancel(self, sequence: Sequence) -> None:
        self._engine.cancel(sequence)
        self._wake.set()

    def _work(self, num_new: int, closed: bool) -> None:
        """Take in requests and make one step. In the engine's thread.

        Args:
            num_new: how many to take in.
            closed: cancel what there is.
        """
        engine = self._engine
        until = time.monotonic() + PATIENCE
        for _ in range(num_new):
            while not self._inbox:  # of a tensor-parallel model's other processes: about to come
                if time.monotonic() > until:
                    raise RuntimeError("the processes of a tensor-parallel model have to submit the same requests")
                time.sleep(0.001)
            engine.enqueue(self._inbox.popleft())
        if closed:
            for sequence in engine.scheduler.sequences:
                engine.cancel(sequence)
        try:
            done = engine.step()
        except BaseException as err:  # of the model: what runs cannot go on, what waits may
            done = engine.fail_running(err)
        for sequence in done:
            self._complete(sequence)
        for function in self._after_step:
            function()

    def _give_up(self, error: BaseException) -> None:
        """Fail every request there is."""
        with self._lock:
            self._closed = True
            sequences = list(self._handles)
        for sequence in sequences:
            sequence.error = sequence.error or error
            self._complete(sequence)

    def _complete(self, sequence: Sequence) -> None:
        handle = self._handles.pop(sequence, None)
        if handle is None:
            return
        try:
            if sequence.error is None:
                handle._result = self._result(sequence)
            else:
                handle._error = sequence.error
        except Exception as err:
            handle._error = err
        handle._sequence = None
        handle._notify()

    def _result(self, sequence: Sequence) -> MultiverseResult:
        request = sequence.request
        order = document_entries(sequence.root)[len(request.prompt) :]
        ids = [sequence.ids[entry] for entry in order]
        return MultiverseResult(
            list(request.prompt),
            ids,
            None if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True),
            [sequence.sampled[entry] for entry in order],
            [sequence.labels[entry] for entry in order],
            None if request.num_logprobs is None else [sequence.scores.get(entry) for entry in order],
            [sequence.logits.get(entry) for entry in order] if request.keep_logits else None,
            sequence.stats,
        )


def _run(
    reference: "weakref.ref[MultiverseEngine]",
    broadcast: Broadcast,
    device: torch.device,
    wake: threading.Event,
    stop: threading.Event,
) -> None:
    """Step an engine as long as it is there and has work; the thread does not keep it alive."""
    while True:
        wake.clear()
        front = reference()
        if front is not None:
            front._closed = front._closed or stop.is_set()
        # what is submitted before it is closed is still worked on
        plan = broadcast(None if front is None else (front._closed, len(front._inbox)))
        if front is None or plan is None:
            return
        closed, num_new = plan
        try:
            front._work(num_new, closed)
        except BaseException as err:  # nobody may wait for a thread that is gone
            front._give_up(err)
            raise
        has_work = front._engine.has_work
        if closed and not num_new and not has_work:
            return
        is_idle = not has_work and not front._inbox
        del front
        if is_idle and device.type == "cpu":
            release_workers()  # so that other threads compute at full speed
        if is_idle and broadcast.leads:
            wake.wait(timeout=1.0)


def _end(thread: threading.Thread, wake: threading.Event, stop: threading.Event) -> None:
    stop.set()
    wake.set()
    if thread is not threading.current_thread():
        thread.join()


def batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Cut a list in pieces (itertools has it from Python 3.12 on)."""
    return (items[begin : begin + size] for begin in range(0, len(items), size))
