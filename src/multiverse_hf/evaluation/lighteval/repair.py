"""Repairs of LightEval 0.13.0, so that it runs offline and with the newest packages. Its main branch needs them too.

    python -m multiverse_hf.evaluation.lighteval.repair install      once per environment; ``remove`` undoes it

LightEval imports all of its task modules for any task, and three of them fail. ``tiny_benchmarks`` downloads a file.
``mt_bench`` and ``mix_eval`` call ``list_models(model_name=...)``, which huggingface-hub 2 no longer takes. LightEval
also hashes text, which xxhash 4 refuses. It has no earlier hook, so ``install`` writes a file that Python reads at its
start, ``multiverse_hf_lighteval.pth``. The three modules are then empty, their tasks are missing, and text is encoded
before it is hashed. Programs that do not use LightEval's tasks are not affected. Upstream issues in
huggingface/lighteval are 1330 (xxhash) and 802 (downloads without a network); none was found for ``list_models``. This
module can go once they are fixed.

LightEval also pins latex2sympy2_extended, and so an older math-verify than the one that judges here. ``install`` puts
the right one into a separate folder (:mod:`~multiverse_hf.judging.checker`).
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
    """Import hook that makes the broken task modules empty."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the broken modules only."""
        return importlib.machinery.ModuleSpec(name, self) if name in BROKEN else None

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module empty. LightEval is loading its tasks and will log results: repair its hash too."""
        import lighteval.logging.info_loggers as loggers
        import xxhash

        loggers.xxhash = SimpleNamespace(xxh64=lambda text: xxhash.xxh64(text.encode()))


def repair() -> None:
    """Install the import hook in this process, once. It costs nothing without LightEval."""
    if not any(isinstance(finder, EmptyModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, EmptyModules())


def hook() -> Path:
    """Return the file that this environment's Python reads at its start."""
    return Path(sysconfig.get_path("purelib"), HOOK)


def main() -> None:
    if sys.argv[1:] == ["install"]:
        from multiverse_hf.errors import CommandError
        from multiverse_hf.judging.checker import get_checker

        try:
            get_checker()  # LightEval's pin holds back this environment's version
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
