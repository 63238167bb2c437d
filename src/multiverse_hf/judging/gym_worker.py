"""Makes and scores the problems of reasoning-gym in a separate process, which may be killed at any time.

It is run as a script, as ``verifier_worker.py``. A request is a generator's name, its options as JSON, and:

- nothing: the reply is all options of the generator, with defaults
- a number: the reply is question and answer of this problem
- a number and a text: the reply is the score of the text as this problem's answer
"""

import dataclasses
import difflib
import functools
import json
import runpy
from pathlib import Path
from typing import Any

LISTS = (list, tuple)


class Unfit(Exception):
    """A generator or option that does not exist, or a value that does not fit."""


def fit_value(name: str, value: Any, default: Any) -> Any:
    """Return an option's value in the type of its default. A default of None takes any value."""
    if isinstance(default, LISTS) and isinstance(value, list):
        return type(default)(fit_value(name, each, default[0] if default else None) for each in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is not None and type(value) is not type(default):
        shown = json.dumps(default, default=str)
        raise Unfit(f"{name} takes {type(default).__name__} such as {shown:.60}, got {json.dumps(value):.60}")
    return value


@functools.lru_cache(maxsize=16)
def make_dataset(name: str, options: str) -> Any:
    """Return a generator's dataset.

    Raises:
        Unfit: if there is no such generator, or an option does not fit.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, 3, cutoff=0.4) or list(DATASETS)[:5]
        raise Unfit(f"reasoning-gym has no generator {name!r}; the closest are {', '.join(close)}")
    config = DATASETS[name][1]
    defaults = {field.name: getattr(config(), field.name) for field in dataclasses.fields(config)}
    asked = json.loads(options)
    for option in asked:
        if option not in defaults:
            close = difflib.get_close_matches(option, defaults, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise Unfit(f"{name} has no option {option!r}; {hint}it has {', '.join(defaults)}")
    fitted = {option: fit_value(option, value, defaults[option]) for option, value in asked.items()}
    try:
        return create_dataset(name, **fitted)
    except Exception as err:  # each generator checks its options in its own way
        given = ", ".join(f"{option}={value!r}" for option, value in fitted.items())
        raise Unfit(f"{name} does not take {given}: {err or type(err).__name__}") from err


@functools.lru_cache(maxsize=256)
def make_item(name: str, options: str, number: int) -> dict[str, Any]:
    """Return a problem."""
    return make_dataset(name, options)[number]


def reply(name: str, options: str, number: int | None = None, answer: str | None = None) -> tuple[Any, str | None]:
    """Return the reply to a request, and the reason if there is none."""
    try:
        dataset = make_dataset(name, options)
    except Unfit as err:
        return None, str(err)
    if number is None:
        return json.loads(json.dumps(dataclasses.asdict(dataset.config), default=str)), None
    item = make_item(name, options, number)
    if answer is None:
        return [item["question"], item["answer"]], None
    score = float(dataset.score_answer(answer, item))
    return (score, None) if 0 <= score <= 1 else (None, f"the score is {score}, not from 0 to 1")


def start() -> None:
    import reasoning_gym  # noqa: F401


if __name__ == "__main__":
    # with -P the modules beside a script cannot be imported
    runpy.run_path(str(Path(__file__).with_name("verifier_worker.py")))["serve"](reply, start)
