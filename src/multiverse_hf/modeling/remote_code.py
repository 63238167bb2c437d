"""What a checkpoint carries besides weights, so that it branches on a machine without this package.

Loaders that trust it find this folder's modules beside the weights: ``AutoModel`` classes by ``auto_map`` in its
config, others, which take the class from ``architectures``, by ``custom_generate/generate.py``. All others find an
ordinary checkpoint of its base architecture.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .configuration_multiverse import MultiverseConfig
from .families import Family
from .state import StructureOptions

AUTO_MAP = {
    "AutoConfig": f"configuration_multiverse.{MultiverseConfig.__name__}",
    "AutoModel": "modeling_multiverse.MultiverseModel",
    "AutoModelForCausalLM": "modeling_multiverse.MultiverseForCausalLM",
}
STRUCTURE = ("structure", "max_depth", "max_paths")  # options of ``generate`` that a checkpoint states

GENERATE = '''"""``generate`` of this checkpoint for loaders that take the model's class from ``architectures``.

The model itself stays as it is. The code that branches is that beside the weights.
"""

from transformers.dynamic_module_utils import get_class_from_dynamic_module


def generate(*args, model, **kwargs):
    """Answer prompts; where the model writes a block, its paths are written at the same time.

    Takes what ``MultiverseForCausalLM.generate`` takes; see ``modeling_multiverse.py``.
    """
    if kwargs.get("custom_generate") not in (None, model.name_or_path):  # asks for another function than this one
        return type(model).generate(model, *args, **kwargs)
    kwargs.pop("custom_generate", None)
    if not hasattr(type(model), "_base_class"):
        revision = getattr(model.config, "_commit_hash", None)
        reference = "modeling_multiverse.MultiverseForCausalLM"
        model = get_class_from_dynamic_module(reference, model.name_or_path, revision=revision).over(model)
    return type(model).generate(model, *args, **kwargs)
'''

EMPTY_CARD = "# Model Card for Model ID"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- multiverse
---

# {name}

A {architecture} that writes in parallel ([Multiverse, arXiv 2506.09991](https://arxiv.org/abs/2506.09991)): it decides
itself when to split its answer into paths, which are written at the same time and merged with nothing lost.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({quoted}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({quoted})
messages = [{{"role": "user", "content": "... Think step by step and in parallel before answering."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=2048)[0]))
```

Without `trust_remote_code=True` it is an ordinary {architecture}, which writes the tags and the paths one after the
other. Nothing is known here of its training or accuracy.
"""


def write_code(folder: str | os.PathLike[str], architecture: str) -> None:
    """Write the modules of this folder, ``custom_generate/generate.py``, and a card if there is none."""
    target = Path(folder)
    (target / "custom_generate").mkdir(parents=True, exist_ok=True)
    for file in Path(__file__).parent.glob("*.py"):
        if file.name != "__init__.py":
            shutil.copyfile(file, target / file.name)
    (target / "custom_generate" / "generate.py").write_text(GENERATE, encoding="utf-8")
    card = target / "README.md"
    if not card.exists():
        write_card(card, target.resolve().name, architecture)


def write_card(path: Path, name: str, architecture: str) -> None:
    """Write the card of a model that nothing is known of."""
    text = CARD.format(name=name, quoted=json.dumps(name, ensure_ascii=False), architecture=architecture)
    path.write_text(text, encoding="utf-8")


def replace_empty_card(folder: str | os.PathLike[str], name: str, architecture: str) -> None:
    """Put a card in place of the one that ``push_to_hub`` of transformers makes where a repository has none."""
    path = Path(folder, "README.md")
    if path.is_file() and EMPTY_CARD in path.read_text(encoding="utf-8", errors="replace"):
        write_card(path, name, architecture)


def state_structure(generation_config: Any, family: Family) -> None:
    """State the structure options in a generation config that does not: what they are by default in the family.

    Raises:
        ValueError: if it states one that is none.
    """
    defaults = StructureOptions(**family.limits)
    for name in STRUCTURE:
        if getattr(generation_config, name, None) is None:
            setattr(generation_config, name, getattr(defaults, name))
    StructureOptions(**{name: getattr(generation_config, name) for name in STRUCTURE})
    generation_config._from_model_config = False  # or whoever loads it takes nothing from the file
