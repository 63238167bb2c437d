"""A checkpoint as others get it: the embedded model, in a folder with the code that makes it branch."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, embedded_model


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave other people's tools to ``make test-ecosystem``, and so out of the default tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded model is, saved with its code and its tokenizer."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    MultiverseForCausalLM.from_pretrained(embedded_model()).save_pretrained(path)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="session", params=["class", "remote code"])
def model(request: pytest.FixtureRequest, folder: Path):
    """The embedded model by the class of this package, and by the code in its folder. Tests change nothing of it."""
    if request.param == "class":
        return MultiverseForCausalLM.from_pretrained(embedded_model())
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="session")
def plain():
    """The embedded model as its base class: what transformers does."""
    return AutoModelForCausalLM.from_pretrained(embedded_model())
