"""Settings of every test run: offline, one thread a worker, repeatable."""

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or transformers; subprocesses that tests start inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; tiny models gain nothing from threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# transformers copies remote code here and imports the copy. A folder for each worker: they must not race on one file,
# and a stale copy from an earlier run must not be what is tested.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="multiverse-hf-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# A run in the background of a shell ignores Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402 - after the environment is set
from hub import serve  # noqa: E402
from hypothesis import settings  # noqa: E402

# deadline=None: the first example of a test pays for imports and compilation. HYPOTHESIS_PROFILE=dev searches anew
# each run; the default repeats the same examples, so a red run is red for everyone.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("dev", deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put replay equality first; skip, with the reason, tests marked for hardware or access that is not here."""
    items.sort(key=lambda item: item.path.name != "test_replay.py")
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")
    if os.environ["HF_HUB_OFFLINE"] not in ("0", ""):
        _skip(items, "network", "needs the Hub: set HF_HUB_OFFLINE=0")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A stand-in for the Hub, as the environment in which the Hub's client uses it."""
    with serve(tmp_path / "hf") as environment:
        yield environment


@pytest.fixture
def unquiet() -> Iterator[None]:
    """Undo what the command line does to a process of its own: silence libraries, and let --traceback be known."""
    from transformers.utils import logging as transformers_logging

    yield
    logging.disable(logging.NOTSET)
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    for name in ("MULTIVERSE_TRACEBACK", "TQDM_DISABLE"):
        os.environ.pop(name, None)
