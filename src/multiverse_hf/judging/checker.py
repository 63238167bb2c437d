"""The math-verify version that judges: in this environment, or in a separate folder.

    python -m multiverse_hf.judging.checker       install it if it is missing, and print where it is

Verdicts depend on the version. ``multiverse_hf[eval]`` installs it. But LightEval 0.13 pins an older
latex2sympy2_extended, so an environment with LightEval lacks it. There pip installs it with its dependencies into a
separate folder, which only the process that compares answers imports. The folder is in the environment, or in the
Hugging Face cache if the environment is read-only.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.outputs import new_folder

JUDGES = {"math-verify": "0.9.0", "latex2sympy2_extended": "1.11.0"}
IMPORTS = {"antlr4-python3-runtime": "4.13.2", "sympy": "1.14.0", "mpmath": "1.3.0"}
COMMAND = "python -m multiverse_hf.judging.checker"
INSTALL_S = 600


def is_here() -> bool:
    """Return whether this environment has the math-verify version that judges."""
    try:
        return all(version(name) == wanted for name, wanted in JUDGES.items())
    except PackageNotFoundError:
        return False


def find_folder() -> Path | None:
    """Return the folder with math-verify, None if there is none yet."""
    return next((folder for folder in _places() if folder.is_dir()), None)


def _places() -> list[Path]:
    """Return the possible folders, the best one last."""
    from huggingface_hub.constants import HF_HOME

    name = "-".join(("checker", *JUDGES.values(), *IMPORTS.values()))
    places = [Path(HF_HOME, "multiverse_hf", name)]
    if os.access(sys.prefix, os.W_OK):
        places.append(Path(sys.prefix, "share", "multiverse_hf", name))
    return places


def get_checker() -> Path | None:
    """Return the folder with math-verify, None if this environment has it. Install it if it is missing.

    Raises:
        CommandError: if pip cannot install it.
    """
    if is_here():
        return None
    if (folder := find_folder()) is None:
        folder = _places()[-1]
        install(folder)
    return folder


def install(folder: Path) -> None:
    """Install math-verify and its dependencies into a folder. The folder appears once it is complete.

    Raises:
        CommandError: if pip fails.
    """
    print(f"installing math-verify {JUDGES['math-verify']}, which judges answers, into {folder}", file=sys.stderr)
    packages = [f"{name}=={wanted}" for name, wanted in (JUDGES | IMPORTS).items()]
    options = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new_folder(folder) as part:
            done = subprocess.run(
                [sys.executable, *options, str(part), *packages], capture_output=True, text=True, timeout=INSTALL_S
            )
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
                raise CommandError(
                    f"cannot install math-verify: {one_line(lines[-1], 200)}; with a network, run {COMMAND} once, "
                    f"or {install_line('eval')} in an environment without LightEval",
                    FAILURE,
                )
    except subprocess.TimeoutExpired as err:
        raise CommandError(f"pip took more than {INSTALL_S} s; run {COMMAND} again", FAILURE) from err
    except CommandError:
        if not folder.is_dir():  # else another process was faster, and its folder is used
            raise


def main() -> None:
    """Install math-verify if it is missing, and print where it is."""
    try:
        folder = get_checker()
    except CommandError as err:
        sys.exit(f"error: {err}")
    print(f"math-verify {JUDGES['math-verify']} is in {folder or 'this environment'}")


if __name__ == "__main__":
    main()
