"""The rows of a run for training and evaluation: read, checked and encoded, with a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from multiverse_hf.data.building import TrainingRows, build_rows
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.data.records import Form, number_rows
from multiverse_hf.data.rows import RowEncoder
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.outputs import write_output
from multiverse_hf.training.arguments import OF_CHAINS, DataArguments


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows for training and for evaluation, and the form of the latter."""

    train: TrainingRows
    test: TrainingRows | None
    eval_form: Form

    def eval_columns(self) -> dict[str, list[Any]] | None:
        """Return the columns of the rows for evaluation, None without any."""
        if self.test is None:
            return None
        is_parallel = self.eval_form is Form.PARALLEL
        return self.test.columns([c.parallel if is_parallel else c.sequential for c in self.test.choices])


def read_splits(data: DataArguments, encoder: RowEncoder, training: Any, attention: str | None) -> Splits:
    """Read, check and encode the rows of a run. The main process prints the dropped ones.

    Args:
        data, training: the run's options.
        encoder: turns rows into ids and labels.
        attention: the attention implementation for training.

    Raises:
        CommandError: if there is no such dataset or no row to train on, or a row is bad and ``strict`` is set.
    """
    wanted = {Form.PARALLEL: max(data.parallel_share) > 0, Form.SEQUENTIAL: min(data.parallel_share) < 1}
    forms = [form for form, is_wanted in wanted.items() if is_wanted]
    eval_form = Form.SEQUENTIAL if data.parallel_share[-1] < 0.5 or data.sequential else Form.PARALLEL
    is_main = training.process_index == 0
    train, test = _read(data, encoder, forms, data.dataset_train_split, is_main), None
    read = [(train, data.dataset_train_split, "")]
    if data.dataset_test_split:
        test = _read(data, encoder, [eval_form], data.dataset_test_split, is_main)
        read.append((test, data.dataset_test_split, "test_"))
        if data.eval_rows and is_main:
            print(f"evaluated on the split {data.dataset_test_split}; no rows are held out (eval_rows)")
    elif data.eval_rows:
        try:
            train, test = train.hold_out(data.eval_rows)
        except ValueError as err:
            raise CommandError(str(err)) from err
    output = Path(training.output_dir)
    keep = data.check_rows and (output / "run.json").exists()  # keep a finished run's lists
    for built, split, part in read if is_main else []:
        print(f"{split}: {built.report.describe()}\n{built.describe()}")
        for entries, name in ((built.report.dropped, "dropped"), (built.report.doubtful, "doubtful")):
            file = output / f"{name}_{part}rows.jsonl"
            if not keep and (entries or name == "dropped"):
                write_output(file, built.report.lines(entries))
                print(f"all that are {name}: {file}" if entries else f"list of dropped rows, empty: {file}")
            elif not keep:
                file.unlink(missing_ok=True)
    bad = [(split, built.report, entry) for built, split, _ in read for entry in built.report.bad]
    if data.strict and bad:
        split, report, first = bad[0]
        raise CommandError(
            f"strict: {len(bad)} rows are dropped or doubtful, the first {report.name(first)} of {split} "
            f"({one_line(first['detail'], 120)}); correct or delete them, or leave strict out"
        )
    has_blocks = Form.PARALLEL in forms and any(record.document.num_paths for record in train.records)
    if "flash" in (attention or "") and has_blocks and not data.check_rows:
        raise CommandError(
            f"attn_implementation {attention} cannot mask sibling paths; use flex_attention, or parallel_share 0 for "
            "the autoregressive baseline"
        )
    return Splits(train, test, eval_form)


def _read(data: DataArguments, encoder: RowEncoder, forms: list[Form], split: str, is_main: bool) -> TrainingRows:
    """Read, check and encode the rows of a split."""
    unit = "line" if data.dataset_name.endswith(".jsonl") else "row"
    try:
        if data.dataset_name == "chains":
            mixture = ChainsMixture(**{name.removeprefix("rows_"): getattr(data, name) for name in OF_CHAINS})
            source = enumerate((row.record() for row in mixture), start=1)
        else:
            source = number_rows(data.dataset_name, data.dataset_config, split)
        bar = tqdm(source, desc=f"{split} rows", unit=" rows", disable=not is_main)
        built = build_rows(bar, encoder, forms, data.system_prompt, unit)
    except ValueError as err:
        raise CommandError(one_line(err)) from err
    if not built.records:
        first = "".join(
            f"; the first, {built.report.name(entry)}: {entry['reason']}: {entry['detail']}"
            for entry in built.report.dropped[:1]
        )
        raise CommandError(f"{data.dataset_name}: none of {built.report.num_rows} rows can be trained on{first}")
    return built
