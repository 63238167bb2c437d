"""Settings of the curator, from a YAML file and from options, which override it."""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from multiverse_hf.curator.traces import TRACE_COLUMNS
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.jobs.options import Job

OURS = {  # fields of a request that have their own setting, or whose answer could not be read
    "model": "it is a setting of its own",
    "messages": "they are the stages' prompts",
    "response_format": "json_schema: false turns schemas off",
    "n": "one reply is read",
    "stream": "replies are read whole",
}
ROUTER = "https://router.huggingface.co/v1"
ANSWERS_AGAIN = "the endpoint answers again"  # reported after failed calls


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a run. An option overrides the setting of the same name in the config file.

    Attributes:
        model: the endpoint's name of the model.
        base_url: address of any OpenAI-compatible endpoint.
        api_key_env: environment variable with the key. The default is HF_TOKEN (or the login of the Hub's client) for
            Hugging Face, and OPENAI_API_KEY, if set, for others.
        columns: names of the columns for id, prompt, reasoning and answer, if they are not the usual ones.
        subset, split: subset and split of a dataset.
        seed: seed of the run; each call's seed follows from it.
        max_attempts: number of attempts at a stage before its row is rejected.
        max_distance: edit distance to the original over its length, for a document and each path (the paper: 0.2).
        request: further fields of each request; None omits a field.
        json_schema: send a JSON schema if the endpoint takes one; otherwise ask for fenced JSON.
        judge, judge_model: whether a model also judges independence, and which model; by default ``model``.
        concurrency: concurrent calls of a task.
        timeout_s: time limit of a call.
        max_retries: number of retries of a failed call, while other calls are answered.
        max_outage_s: longest time without an answered call before the run stops.
        prices: by model, dollars per million tokens of prompts and completions.
    """

    model: str
    base_url: str = ROUTER
    api_key_env: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    seed: int = 0
    max_attempts: int = 4
    max_distance: float = 0.2
    request: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.6, "max_tokens": 16384})
    json_schema: bool = True
    judge: bool = False
    judge_model: str | None = None
    concurrency: int = 64
    timeout_s: float = 600.0
    max_retries: int = 6
    max_outage_s: float = 120.0
    prices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            CommandError: with the first invalid value.
        """
        for each in dataclasses.fields(self):
            _check_type(each, getattr(self, each.name))
        if not self.model.strip():
            raise CommandError("the model's name is empty; give it as the endpoint calls it")
        for name, least in (("max_attempts", 1), ("concurrency", 1), ("max_retries", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise CommandError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("timeout_s", "max_outage_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise CommandError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in self.request:
            if name in OURS:
                raise CommandError(f"request cannot have {name}: {OURS[name]}")
            if name == "seed" and self.request[name] is not None:
                raise CommandError(
                    f"request cannot have seed {self.request[name]!r}: each call's follows from the setting seed; "
                    "null leaves it out"
                )
            if any(word in str(name).lower() for word in ("api", "authorization", "secret", "password")):
                raise CommandError(f"request holds {name}, and is stored; put keys into an environment variable")
        if not 0 <= self.max_distance < 1:
            raise CommandError(f"max_distance must be from 0 to below 1, got {self.max_distance}")
        for name in self.columns:
            _check_name(name, TRACE_COLUMNS, "columns")
        for model, price in self.prices.items():
            if not isinstance(price, Mapping) or not all(isinstance(each, int | float) for each in price.values()):
                raise CommandError(f"the price of {model} must be {{prompt: X, completion: Y}}, got {price!r:.60}")
            for name, dollars in price.items():
                _check_name(name, ("prompt", "completion"), f"the price of {model}")
                if not 0 <= dollars < math.inf:
                    raise CommandError(f"the price of {model} must be at least 0, got {dollars}")
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise CommandError(f"base_url must be an address such as {ROUTER}, got {self.base_url!r}")
        try:
            address.port  # noqa: B018 - reading it checks it
        except ValueError as err:
            raise CommandError(f"base_url has a port out of range (1-65535): {self.base_url!r}") from err
        if address.username or address.password or address.query or address.fragment:  # it is stored; keys are not
            raise CommandError(
                "base_url holds a key or a query; put the key into an environment variable, api_key_env"
            )

    @property
    def judge_name(self) -> str | None:
        """Name of the model that judges; None if there is no judge."""
        return (self.judge_model or self.model) if self.judge else None

    def api_key(self) -> str:
        """Return the key, which is never stored.

        Raises:
            CommandError: if the endpoint needs a key and there is none.
        """
        if self.api_key_env is not None:
            if not (key := os.environ.get(self.api_key_env, "").strip()):
                raise CommandError(f"the environment variable {self.api_key_env} is empty; put the API key into it")
            return key
        host = urlsplit(self.base_url).hostname or ""
        if host.endswith((".huggingface.co", ".hf.co", ".huggingface.cloud")):
            from huggingface_hub import get_token

            if not (key := get_token()):
                raise CommandError(f"{host} needs a token: set HF_TOKEN, or log in with `hf auth login`")
            return key
        return os.environ.get("OPENAI_API_KEY", "").strip() or "none"

    def cost(self, model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return the cost of a model's tokens in US dollars; None if it has no price."""
        if model not in self.prices:
            return None
        price = self.prices[model]
        return (prompt_tokens * price.get("prompt", 0) + completion_tokens * price.get("completion", 0)) / 1e6


def _check_type(each: dataclasses.Field, value: Any) -> None:
    kinds = {"str": str, "int": int, "float": (int, float), "bool": bool, "Mapping": Mapping}
    name = str(each.type).removesuffix(" | None").partition("[")[0]
    if name not in kinds:
        name = getattr(each.type, "__name__", name)
    kind = kinds.get(name, object)
    is_none = value is None and (each.default is None)
    if not is_none and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise CommandError(f"{each.name} must be {name.lower()}, got {value!r:.60}")


def _check_name(name: str, known: Any, where: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), list(known), 1)
        way_out = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise CommandError(f"unknown name {name!r} in {where}; {way_out}")


def load_settings(path: Path | None, **options: Any) -> Settings:
    """Return the settings of a config file, if there is one, with given options over them.

    Raises:
        CommandError: if the file cannot be read, or a setting is unknown, wrong or missing.
    """
    values: Any = {}
    if path is not None:
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as err:
            raise CommandError(f"cannot read {path}: {one_line(getattr(err, 'strerror', None) or err)}") from err
        if not isinstance(values, dict):
            raise CommandError(f"{path} must hold settings such as `model: NAME`, got {values!r:.40}")
    known = [each.name for each in dataclasses.fields(Settings)]
    for name in values:
        _check_name(name, known, str(path))
    values |= {name: value for name, value in options.items() if value is not None}
    if values.get("model") is None:
        raise CommandError("no model; give one with --model, or in the config file")
    return Settings(**values)


@dataclass(frozen=True, slots=True)
class Curation(Job):
    """A run of the curator.

    Attributes:
        source: file or dataset.
        output: folder.
    """

    source: str
    output: Path
    settings: Settings
