"""What LightEval 0.13.0 needs to run offline and beside the newest packages. Its repository's head lacks the same.

    python -m multiverse_hf.evaluation.lighteval.repair install      once in an environment; ``remove`` undoes it

Three of its task modules fail when they are imported, and it imports all of them whatever task is asked for:
``tiny_benchmarks`` downloads a file, ``mt_bench`` and ``mix_eval`` call ``list_models(model_name=...)``, which
huggingface-hub 2 no longer takes. And it hashes text, which xxhash 4 refuses. ``lighteval`` has no hook that runs
before that, so ``install`` writes a file that Python reads at its start, ``multiverse_hf_lighteval.pth``. The three
modules are then empty, their tasks are not there, and text is encoded before it is hashed. Nothing happens in a
program that does not use LightEval's tasks. Upstream, in huggingface/lighteval: issue 1330 (xxhash), issue 802 (what
is downloaded where there is no network); none was found for ``list_models``. All of this can go when they are mended.

It also pins latex2sympy2_extended, which holds math-verify at an older version than the one that judges here:
``install`` puts that into a folder of its own (:mod:`~multiverse_hf.judging.checker`).
"""

import importlib.abc
import importlib.machinery
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

BROKEN = tuple(f"lighteval.tasks.tasks.{name}" for name in ("tiny_benchmarks", "mt_bench.main", "mix_eval.main"))
HOOK = "multiverse_hf_lighteval.pth"
LINE = (
    "import sys; exec('try:\\n import multiverse_hf.evaluation.lighteval.repair as r\\n r.repair()\\n"
    "except ImportError: pass')\n"
)


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the broken task modules, and makes them empty."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Claim the broken modules and no others."""
        return importlib.machinery.ModuleSpec(name, self) if name in BROKEN else None

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module empty. LightEval is loading its tasks, and will log what comes of them: mend that too."""
        import lighteval.logging.info_loggers as loggers
        import xxhash

        loggers.xxhash = SimpleNamespace(xxh64=lambda text: xxhash.xxh64(text.encode()))


def repair() -> None:
    """Have LightEval work in this process. Does nothing the second time, and costs nothing without LightEval."""
    if not any(isinstance(finder, EmptyModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, EmptyModules())


def hook() -> Path:
    """Where this environment's Python looks for what to do at its start."""
    return Path(sysconfig.get_path("purelib"), HOOK)


def main() -> None:
    if sys.argv[1:] == ["install"]:
        from multiverse_hf.errors import CommandError
        from multiverse_hf.judging.checker import get_checker

        try:
            get_checker()  # LightEval's pin holds back the version of this environment
        except CommandError as err:
            sys.exit(f"error: {err}")
        hook().write_text(LINE)
        print(f"wrote {hook()}; lighteval now runs in this environment")
    elif sys.argv[1:] == ["remove"]:
        hook().unlink(missing_ok=True)
        print(f"removed {hook()}")
    else:
        sys.exit("usage: python -m multiverse_hf.evaluation.lighteval.repair install | remove")


if __name__ == "__main__":
    main()
