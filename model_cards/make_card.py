"""Write a model's card from the files beside it: what was trained, on what, and what was measured.

    python model_cards/make_card.py runs/my-model --facts model_cards/multiverse-7b.yaml --dry-run
    python model_cards/make_card.py runs/my-model --facts model_cards/multiverse-7b.yaml --results runs/eval-aime
    python model_cards/make_card.py runs/my-model                 # again, once something beside it has changed

Reads ``config.json``, ``run.json`` (of recipes/sft.py), ``results*.json`` (of ``multiverse eval``), ``budget.json``
(of ``multiverse experiment budget``) and ``evaluation*.json`` (of recipes/multiverse-tiny/evaluate.py); what is not
there is "not measured". What no run can know (a summary, licences, limits) stands in a YAML file, which is kept beside
the card as ``card.yaml``: everything the card says is found in the files beside it. Writes ``README.md`` with a
model-index, and ``.eval_results/*.yaml`` for benchmarks that the Hub has registered.
"""

import difflib
import json
import math
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX
from multiverse_hf.errors import FAILURE, CommandError, ScriptParser, one_line
from multiverse_hf.outputs import check_output, output_folder, write_output

TEMPLATE = Path(__file__).parent / "card.md.jinja"
CARD, FACTS = "README.md", "card.yaml"
MARKER = (
    "Made by model_cards/make_card.py from the files beside it; what is changed here is lost when it is made again."
)
TRAINER = "- generated_from_trainer"  # a tag in the card that a trainer writes
UNKNOWING = "Nothing is known here of its training or accuracy."  # in the card that save_pretrained writes
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PLACES = ("OWNER/", "SAY HERE")  # what a template leaves open
KINDS = {str: "text", str | None: "text", list[str]: "a list of texts", bool: "true or false", int: "a whole number"}
SUFFIXES = {"parallel": PARALLEL_SUFFIX, "autoregressive": SEQUENTIAL_SUFFIX}
# Tasks of multiverse eval by the names that people know.
TITLES = {
    "mv:aime24": "AIME 2024", "mv:aime25": "AIME 2025", "mv:math_500": "MATH-500", "mv:gpqa_diamond": "GPQA Diamond",
    "mv:chains": "chains",
}  # fmt: skip
# Benchmarks with a leaderboard on the Hub, by their names in results: (dataset, its task). Others are refused there.
REGISTERED = {"GPQA Diamond": ("Idavidrein/gpqa", "gpqa_diamond")}

REMOTE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)
"""
PACKAGE = """from transformers import AutoTokenizer
from multiverse_hf import MultiverseForCausalLM, embedded_model

model = MultiverseForCausalLM.from_pretrained({name})
"""
ASK = """tokenizer = AutoTokenizer.from_pretrained({name})
messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={most})[0]))"""


@dataclass(frozen=True)
class Facts:
    """What no run's files say.

    Attributes:
        name: of the model.
        mode: "parallel" or "autoregressive".
        license: of the weights, the Hub's name of it.
        summary: a sentence or two.
        example: a prompt, without its suffix.
        training_data: what the rows are and where they come from.
        limits: what it cannot do, and what was not tried.
        repository: on the Hub, OWNER/NAME; by default the name.
        base_model: on the Hub, unless the run's record names it; None if it was trained from nothing.
        base_folder: the name of the folder that holds ``base_model``, if the run began with one of another name.
        training_data_license: None if not known.
        max_new_tokens: that an answer may need.
        benchmarks: that a reader will look for; those without a result are said to be not measured.
        is_embedded: it lies in the package, without code of its own.
    """

    name: str
    mode: str
    license: str
    summary: str
    example: str
    training_data: str
    limits: list[str]
    language: str = "en"
    repository: str | None = None
    base_model: str | None = None
    base_folder: str | None = None
    training_data_license: str | None = None
    benchmarks: list[str] = field(default_factory=list)
    max_new_tokens: int = 8192
    is_embedded: bool = False


@dataclass(frozen=True)
class Result:
    """What was measured on one task; shares from 0 to 1, None where a file does not say.

    Attributes:
        interval: of the accuracy, low and high.
        is_whole: all problems were asked, and they are the benchmark's own.
    """

    task: str
    problems: int
    accuracy: float
    interval: tuple[float, float] | None
    parallelism: float | None
    length: float | None
    tokens: float | None
    well_formed: float | None
    forks: float | None
    is_whole: bool = False

    def __post_init__(self) -> None:
        """Check the values, which come from a file.

        Raises:
            ValueError: if one is no number, or out of range.
        """
        shares = {"accuracy": self.accuracy, "well_formed": self.well_formed, "forks": self.forks}
        sizes = {"parallelism": self.parallelism, "length": self.length, "tokens": self.tokens}
        for name, value in {**shares, **sizes, "problems": self.problems}.items():
            if value is None and name not in ("accuracy", "problems"):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (name in shares and value > 1):
                raise ValueError(f"{name} of {self.task} is {value!r}")

    def cells(self) -> list[str]:
        """Return the row of the card's table."""
        right = percent(self.accuracy)
        if self.interval is not None:
            right += " ({:.1f} to {:.1f})".format(*(100 * end for end in self.interval))
        return [
            self.task, str(self.problems), right, number(self.parallelism, 2), number(self.length),
            number(self.tokens), percent(self.well_formed), percent(self.forks),
        ]  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """A file of results: on what, and how they were measured."""

    file: str
    heading: str
    mode: str
    results: list[Result]

    @property
    def cells(self) -> list[list[str]]:
        return [result.cells() for result in self.results]


def percent(share: float | None) -> str:
    """Return a share as text."""
    return "not measured" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 0) -> str:
    """Return a number as text."""
    return "not measured" if value is None else f"{value:,.{digits}f}"


def read_facts(path: Path) -> Facts:
    """Read a file of facts.

    Raises:
        CommandError: if it cannot be read, lacks one, or names one that is not known.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as err:
        raise CommandError(f"cannot read {path}: {one_line(err, 200)}") from err
    if not isinstance(values, dict):
        raise CommandError(f"{path} holds no facts; see model_cards/multiverse-tiny.yaml")
    known = {each.name: each for each in fields(Facts)}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            raise CommandError(f"{path}: no fact {name!r}" + (f"; did you mean {close[0]}?" if close else ""))
    needed = [name for name, each in known.items() if each.default is each.default_factory is MISSING]
    if missing := [name for name in needed if not values.get(name)]:
        raise CommandError(f"{path} lacks {', '.join(missing)}")
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        kind = known[name].type
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        fits = is_list if kind == list[str] else isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not fits:
            raise CommandError(f"{path}: {name} is {KINDS[kind]}, got {value!r:.40}")
    facts = Facts(**given)
    if facts.mode not in SUFFIXES:
        raise CommandError(f"{path}: mode is parallel or autoregressive, got {facts.mode!r}")
    if facts.max_new_tokens < 1:
        raise CommandError(f"{path}: max_new_tokens must be at least 1, got {facts.max_new_tokens}")
    return facts


def check_finished(path: Path, facts: Facts) -> None:
    """Check that a template's open places are filled in.

    Raises:
        CommandError: naming the first that is not.
    """
    said = [facts.repository or "", facts.summary, facts.training_data, *facts.limits]
    for text in said:
        if place := next((mark for mark in PLACES if mark in text), None):
            raise CommandError(f"{path} still has {place!r} from the template; fill it in (--dry-run shows the card)")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file.

    Raises:
        CommandError: if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        raise CommandError(f"cannot read {path}: {one_line(err, 200)}; copy it again") from err
    if not isinstance(value, dict):
        raise CommandError(f"cannot read {path}: it holds no object; copy it again")
    return value


def read_evaluation(path: Path) -> Evaluation:
    """Read what recipes/multiverse-tiny/evaluate.py wrote.

    Raises:
        CommandError: if it holds something else.
    """
    report = read_json(path)
    try:
        settings, versions = report["settings"], report["versions"]
        results = [
            Result(
                f"chains, {kind}", each["problems"], each["accuracy"], None, each["parallelism"], each["length"],
                each["tokens"], each["well_formed"], each["share_that_forks"],
            )
            for kind, each in report["results"].items()
        ]  # fmt: skip
        heading = (
            f"Unseen problems under the {settings['suffix']} suffix, {report['decoding']}, structure "
            f"{settings['structure']}, at most {settings['max_new_tokens']:,} positions, {settings['dtype']}, seed "
            f"{settings['seed']}, torch {versions['torch']}, transformers {versions['transformers']}, commit "
            f"{str(report['commit'])[:7]}"
        )
        return Evaluation(path.name, heading, settings["suffix"], results)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CommandError(f"{path} is no evaluation that is known here ({err!r}); move it away") from err


def read_results(path: Path, name: str) -> Evaluation:
    """Read what ``multiverse eval`` wrote, and call it by its name beside the card.

    Raises:
        CommandError: if it holds something else.
    """
    report = read_json(path)
    try:
        sampling, versions, mode = report["sampling"], report["versions"], report["mode"]
        results, names = [], ("parallelism", "length", "tokens", "well_formed", "parallel_rate")
        for task_name, task in report["tasks"].items():
            title = TITLES.get(task_name, task_name)
            parts = {title: task} | {f"{title}, {group}": part for group, part in task["groups"].items()}
            for part, said in parts.items():
                values = {metric: each["value"] for metric, each in said["metrics"].items()}
                right = said["metrics"]["pass@1"]
                interval = (right["low"], right["high"])
                results.append(
                    Result(
                        part,
                        said["problems"],
                        right["value"],
                        interval,
                        *(values[each] for each in names),
                        is_whole=task["limit"] is None and task["source"] == task["dataset"],
                    )
                )
        how = "greedy"
        if sampling["do_sample"]:
            how = f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}"
        heading = (
            f'{mode.capitalize()}, prompts that end with "{report["prompts"]["suffix"]}": {how}, structure '
            f"{sampling['structure']}, at most {sampling['max_new_tokens']:,} positions, answers to a problem: "
            f"{report['n']}, seed {report['seed']}, {100 * report['confidence']:g} % intervals over problems, torch "
            f"{versions['torch']}, transformers {versions['transformers']}, commit {str(report['commit'])[:7]}"
        )
        return Evaluation(name, heading, mode, results)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CommandError(f"{path} is no evaluation that is known here ({err!r}); move it away") from err


def read_budget(path: Path) -> str:
    """Return the table of ``multiverse experiment budget``.

    Raises:
        CommandError: if the file holds something else.
    """
    report = read_json(path)

    def share(value: dict[str, float]) -> str:
        return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * value[name] for name in ("value", "low", "high")))

    try:
        twin = report["models"]["autoregressive"]["name"]
        task = TITLES.get(report["task"], report["task"])
        rows = [
            f"| {row['budget']:,} | {share(row['parallel']['pass@1'])} | {share(row['autoregressive']['pass@1'])} | "
            f"{row['parallel']['parallelism']['value']:.2f} |"
            for row in report["rows"]
        ]
        drawn = report["sampling"]["do_sample"]
        how = f"temperature {report['sampling']['temperature']:g}" if drawn else "greedy"
        heading = f"Right at the same length budget, {report['problems']} problems of {task}, {how} (`{path.name}`):"
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CommandError(f"{path} is no budget experiment that is known here ({err!r}); move it away") from err
    head = [f"| positions at most | this model | {Path(twin).name} | # parallel |", "|---|---|---|---|"]
    return "\n".join([heading, "", *head, *rows])


def find_base(run: dict[str, Any] | None, facts: Facts) -> str | None:
    """Return the base's name on the Hub, None if there is none: what the run's record says, and else the facts.

    Raises:
        CommandError: if the two contradict each other.
    """
    if run is None:
        return facts.base_model
    began, is_folder = run["model"]["model_name_or_path"], run["model"].get("base_is_folder")
    if cached := re.search(r"models--([^/]+)--([^/]+)/snapshots/", began):  # in the Hub's own cache
        began, is_folder = f"{cached[1]}/{cached[2]}", False
    if is_folder is None:  # an older record does not say it
        is_folder = not facts.base_model or not HUB_NAME.fullmatch(began) or Path(began).exists()
    if not is_folder:
        if facts.base_model not in (None, began):
            raise CommandError(f"the run began with {began}, and the facts name {facts.base_model}; mend base_model")
        return began
    folder = Path(began).name
    if facts.base_model and folder not in (facts.base_folder, facts.base_model.rpartition("/")[2]):
        raise CommandError(
            f"the run began with the folder {folder}, and the facts name {facts.base_model}; mend base_model, or say "
            f"that the folder holds it with base_folder: {folder}"
        )
    return facts.base_model


def describe_training(run: dict[str, Any] | None, base: str | None) -> str:
    """Return how a model was trained, from the run's own record; settings as a table.

    Args:
        run: the record; None if there is none.
        base: the base model's name; by default the one in the record, of a folder its last part alone.
    """
    if run is None:
        return "Not recorded: there is no `run.json` beside this card."
    data, training, model = run["data"], run["training"], run["model"]
    rows = {
        "base": base or f"the folder `{Path(model['model_name_or_path']).name}`",
        "adaptation": f"LoRA of rank {model['lora_r']}" if model["use_peft"] else "all weights",
        "rows": data.get("trained_on", data.get("num_rows")),
        "tokens of the rows": f"{data['num_tokens']:,}",
        "fingerprint of the rows": data["fingerprint"],
        "share of parallel rows, by epoch": data.get("parallel_share"),
        "epochs": f"{run['metrics']['epoch']:g}",
        "rows a step": training["per_device_train_batch_size"]
        * training["gradient_accumulation_steps"]
        * run.get("processes", 1),
        "longest row, tokens": training.get("max_length"),
        "learning rate": f"{training['learning_rate']:g}, {training['lr_scheduler_type']}",
        "warm-up": f"{training['warmup_steps']:g} " + ("of all steps" if training["warmup_steps"] < 1 else "steps"),
        "optimizer": f"{training['optim']}, betas {training['adam_beta1']:g} and {training['adam_beta2']:g}, "
        f"weight decay {training['weight_decay']:g}",
        "precision": "bfloat16" if training["bf16"] else "float16" if training["fp16"] else "float32",
        "seed": training["seed"],
        "seconds": f"{run['metrics']['train_runtime']:,.0f}",
        "mean loss": f"{run['metrics']['train_loss']:.4f}",
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["As `run.json` records, which has all settings:", "", "| | |", "|---|---|", *table])


def describe_elsewhere(folder: Path, facts: Facts, architecture: str) -> str:
    """Return what the files are for other loaders."""
    plain = f"an ordinary {architecture}"
    if facts.mode == "autoregressive":
        return f"It is {plain} to every loader, and never forks."
    if facts.is_embedded:
        return (
            f"To `AutoModelForCausalLM` the folder is {plain}, which writes the tags and the paths one after the "
            f"other. `multiverse export --model {facts.name} --output DIR` writes a copy with the code that makes it "
            "branch where multiverse_hf is not installed."
        )
    name = facts.repository or facts.name
    return (
        f"It needs torch and `transformers>=5.17,<6`; `transformers serve {name} --trust-remote-code` serves it. "
        f"Without `trust_remote_code=True`, and in servers that do not know Multiverse, the same files are {plain}, "
        "which writes the tags and the paths one after the other."
    )


def model_index(facts: Facts, evaluations: list[Evaluation]) -> list[Any]:
    """Return every result in the form of a model-index: share right and # parallel."""
    from huggingface_hub import EvalResult

    entries = []
    for evaluation in evaluations:
        for result in evaluation.results:
            metrics = {"accuracy": round(100 * result.accuracy, 2), "parallelism": result.parallelism}
            for name, value in metrics.items():
                if value is not None:
                    entries.append(
                        EvalResult(
                            task_type="text-generation",
                            dataset_type=result.task.partition(",")[0].lower().replace(" ", "-"),
                            dataset_name=result.task,
                            dataset_config=f"{result.task}, {evaluation.mode}",  # one entry for each
                            dataset_args={"problems": result.problems},
                            metric_type=name,
                            metric_name={"accuracy": "right, %", "parallelism": "# parallel"}[name],
                            metric_value=value,
                        )
                    )
    return entries


def registered_results(evaluations: list[Evaluation]) -> dict[str, str]:
    """Return the files for the leaderboards of registered benchmarks, by name: one for each suffix."""
    from huggingface_hub import EvalResultEntry
    from huggingface_hub._eval_results import eval_result_entries_to_yaml

    files = {}
    for evaluation in evaluations:
        for result in evaluation.results:
            if result.task in REGISTERED and result.is_whole:
                dataset, task = REGISTERED[result.task]
                notes = f"{result.problems} problems; # parallel {number(result.parallelism, 2)}; {evaluation.heading}"
                entry = EvalResultEntry(dataset, task, round(100 * result.accuracy, 2), notes=notes)
                text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
                files[f".eval_results/{task}-{evaluation.mode}.yaml"] = text
    return files


def make_card(folder: Path, facts: Facts, more: dict[str, Path]) -> tuple[str, dict[str, str]]:
    """Write a card, and the files for leaderboards.

    Args:
        folder: the model's.
        facts: what no file says.
        more: files of results that are not in the folder yet, by the names they will have there.

    Raises:
        CommandError: if a file in the folder cannot be read.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    files = {path.name: path for path in folder.glob("*.json")} | more
    evaluations = [read_results(files[name], name) for name in sorted(files) if name.startswith("results")]
    evaluations += map(read_evaluation, sorted(folder.glob("evaluation*.json"), key=lambda path: path.stem))
    config = read_json(folder / "config.json") or {}
    run = read_json(folder / "run.json")
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "model of its base's architecture"
    quoted = json.dumps(facts.repository or facts.name)
    name = f"embedded_model({json.dumps(facts.name)})" if facts.is_embedded else quoted
    prompt = json.dumps(f"{facts.example} {SUFFIXES[facts.mode]}", ensure_ascii=False)
    snippet = (PACKAGE if facts.is_embedded else REMOTE) + ASK
    tags = ["multiverse", *(["custom_generate"] if (folder / "custom_generate").is_dir() else [])]
    index = model_index(facts, evaluations)
    budget = read_budget(files["budget.json"]) if "budget.json" in files else None
    found = {result.task for evaluation in evaluations for result in evaluation.results}
    lacking = [name for name in facts.benchmarks if name not in found]
    try:
        base = find_base(run, facts)
        training = describe_training(run, base)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CommandError(f"{folder / 'run.json'} is no record of recipes/sft.py ({err!r}); move it away") from err
    metadata = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=base,
        base_model_relation="finetune" if base else None,
        model_name=facts.name if index else None,
        eval_results=index or None,
    )
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=False, trim_blocks=False)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=metadata.to_yaml(),
        marker=MARKER,
        facts=facts,
        is_parallel=facts.mode == "parallel",
        snippet=snippet.format(name=name, prompt=prompt, most=facts.max_new_tokens),
        elsewhere=describe_elsewhere(folder, facts, architecture),
        sentences={"paths": PARALLEL_SUFFIX, "one line": SEQUENTIAL_SUFFIX}
        if facts.mode == "parallel"
        else {"every prompt": SEQUENTIAL_SUFFIX},
        tables=evaluations,
        budget=budget,
        not_measured=lacking if budget else [*lacking, "accuracy against the length budget"],
        training=training,
    )
    return re.sub(r"\n{3,}", "\n\n", text) + "\n", registered_results(evaluations)


def find_results(folder: Path) -> tuple[str, Path]:
    """Find the results in a folder, and give the name they will have beside the card.

    Raises:
        CommandError: if there are none.
    """
    names = {"results.json": f"results-{folder.name}.json", "budget.json": "budget.json"}
    for name, kept_as in names.items():
        if (folder / name).is_file():
            return kept_as, folder / name
    raise CommandError(
        f"{folder} holds neither {' nor '.join(names)}; let multiverse eval --output {folder} end first"
    )


def check_card(path: Path) -> None:
    """Check that a card that is there may be replaced.

    Raises:
        CommandError: if somebody wrote it by hand.
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if not any(mark in text for mark in (MARKER, UNKNOWING, TRAINER)):
        raise CommandError(f"{path} was not made here; move it away, or take what it says into a file of facts")


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the model's, with run.json and evaluation*.json in it")
    parser.add_argument("--facts", type=Path, help=f"what no run knows; by default the folder's {FACTS}")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="folders of multiverse eval or experiment budget; kept beside the card",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the card and write nothing")
    args = parser.parse_args()
    try:
        if not args.folder.is_dir():
            raise CommandError(f"no folder {args.folder}; give a model's")
        if (args.folder / "adapter_config.json").is_file():
            merge = f"multiverse merge --adapter {args.folder} --output {args.folder}-merged"
            raise CommandError(
                f"{args.folder} is a LoRA adapter; put it into its base, and make that one's card: {merge}"
            )
        source = args.facts or args.folder / FACTS
        if not source.is_file():
            examples = ", ".join(sorted(path.name for path in TEMPLATE.parent.glob("*.yaml")))
            raise CommandError(f"no file {source}; give --facts, one like those in model_cards: {examples}")
        facts = read_facts(source)
        results = dict(map(find_results, args.results))
        text, leaderboards = make_card(args.folder, facts, results)
        if args.dry_run:
            print(text, end="")
            return
        check_finished(source, facts)
        if not (args.folder / "config.json").is_file():
            raise CommandError(f"{args.folder} holds no config.json; give the folder of a model, or --dry-run")
        check_card(args.folder / CARD)
        check_output(args.folder, is_folder=True)
        said = source.read_text(encoding="utf-8")
        with output_folder(args.folder) as part:
            copies = {name: file.read_text(encoding="utf-8") for name, file in results.items()}
            for name, content in {FACTS: said, **copies, **leaderboards}.items():
                (part / name).parent.mkdir(exist_ok=True)
                (part / name).write_text(content, encoding="utf-8")
        write_output(args.folder / CARD, text)  # last: what it says is found beside it, whenever this is stopped
    except CommandError as err:
        parser.exit(err.code, f"error: {err}\n")
    except OSError as err:
        parser.exit(FAILURE, f"error: cannot write the card: {err.strerror or err}\n")
    print(f"{args.folder / CARD}" + "".join(f", {name}" for name in leaderboards))


if __name__ == "__main__":
    main()
