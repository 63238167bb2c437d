"""Rows as users have them: read, checked, dropped with a reason, encoded in the form an epoch asks for."""

import functools
import json

import pytest
from test_tags import plain_tokenizer_with_tags, tiny_tokenizer

from multiverse_hf.data.building import build_rows
from multiverse_hf.data.records import Form, Reason, Record, RowError, number_rows, read_record
from multiverse_hf.data.rows import IGNORE, RowEncoder, TokenKind, token_kinds
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX
from multiverse_hf.modeling.tags import TagSet

BLOCK = (
    "<Parallel>\n<Goal>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n</Goal>\n"
    "<Path>\n1: goes left\n</Path>\n<Path>\n2: goes right\n</Path>\n"
    "<Conclusion>\nboth ways\n</Conclusion>\n</Parallel>"
)
DOCUMENT = f"<Think>\nLook.\n{BLOCK}\nDone.\n</Think>\n\nAnswer: 2"
both = (Form.PARALLEL, Form.SEQUENTIAL)


@functools.cache
def tokenizer():
    return tiny_tokenizer()


def encoder(**options) -> RowEncoder:
    return RowEncoder(tokenizer(), TagSet.from_tokenizer(tokenizer()), **options)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Where?", "document": DOCUMENT},
        {"prompt": "Where?", "completion": DOCUMENT, "other": 3, "answer": None},
        {
            "prompt": [{"role": "user", "content": "Where?"}],
            "completion": [{"role": "assistant", "content": DOCUMENT}],
        },
        {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": DOCUMENT}]},
        {"prompt": "Where?", "document": DOCUMENT, "answer": "2"},
        {"prompt": "Where?", "document": DOCUMENT.removesuffix("\n\nAnswer: 2"), "answer": 2},
        {"prompt": "Where?", "document": f"Look.\n{BLOCK}\nDone.", "answer": "2"},
    ],
    ids=["prompt", "completion", "conversational", "messages", "answer said", "answer apart", "not wrapped"],
)
def test_rows_of_every_shape_give_the_same_record(row):
    record = read_record(row)
    assert record.messages == ({"role": "user", "content": "Where?"},)
    assert record.document.render() == DOCUMENT


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (7, Reason.UNREADABLE, ["7"]),
        ({}, Reason.COLUMNS, ["prompt and document", "none"]),
        ({"text": "x"}, Reason.COLUMNS, ["found text"]),
        ({"prompt": "", "document": DOCUMENT}, Reason.COLUMNS, ["empty"]),
        ({"prompt": "x", "document": " "}, Reason.COLUMNS, ["empty"]),
        ({"prompt": 3, "document": DOCUMENT}, Reason.COLUMNS, ["prompt", "3"]),
        ({"prompt": "x", "document": 3}, Reason.COLUMNS, ["text", "int"]),
        ({"prompt": "x", "document": DOCUMENT, "answer": [1]}, Reason.COLUMNS, ["answer", "[1]"]),
        ({"prompt": "x", "document": DOCUMENT, "answer": True}, Reason.COLUMNS, ["answer", "True"]),
        ({"prompt": "x", "document": DOCUMENT, "answer": float("nan")}, Reason.COLUMNS, ["answer", "nan"]),
        ({"prompt": "x", "document": "half \ud800"}, Reason.UNREADABLE, ["half a character"]),
        ({"half \ud800": "x"}, Reason.COLUMNS, ["prompt and document"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y"},
                    {"role": "assistant", "content": DOCUMENT},
                ]
            },
            Reason.COLUMNS,
            ["two answers in a row"],
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, Reason.COLUMNS, ["assistant"]),
        ({"messages": [{"role": "user"}]}, Reason.COLUMNS, ["content"]),
        ({"prompt": "x", "document": DOCUMENT.replace("</Goal>", "")}, Reason.MALFORMED, ["line", "</Goal>"]),
        ({"prompt": "x", "document": BLOCK.replace("1: goes left", "")}, Reason.MALFORMED, ["empty <Path>"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "<Parallel>"},
                    {"role": "user", "content": "y"},
                    {"role": "assistant", "content": DOCUMENT},
                ]
            },
            Reason.MALFORMED,
            ["<Goal>"],
        ),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(row, reason, words):
    with pytest.raises(RowError) as caught:
        read_record(row)
    assert caught.value.reason is reason
    assert all(word in caught.value.detail for word in words), caught.value.detail


@pytest.mark.parametrize(("given", "read"), [("007", "007"), (7, "7"), (7.0, "7"), (2.5, "2.5"), (-3, "-3")])
def test_an_answer_column_is_read_as_it_was_meant(given, read):
    record = read_record({"prompt": "x", "document": "y", "answer": given})
    assert record.document.render().endswith(f"</Think>\n\nAnswer: {read}")


def test_a_table_of_text_keeps_its_text(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,document,answer\nq,"a\nb",007\nq,c,\n')
    assert [row["answer"] for _, row in number_rows(str(tmp_path / "rows.csv"))] == ["007", None]
    (tmp_path / "rows.json").write_text('[{"prompt": "q", "document": "d", "answer": "2026-01-01"}]')
    assert [row["answer"] for _, row in number_rows(str(tmp_path / "rows.json"))] == ["2026-01-01"]


def test_an_end_token_ends_a_document_and_stands_nowhere_else():
    plain = encoder().encode(read_record({"prompt": "x", "document": "y"}), Form.PARALLEL)
    ended = encoder().encode(read_record({"prompt": "x", "document": "y<|im_end|><|im_end|>"}), Form.PARALLEL)
    assert ended == plain
    with pytest.raises(RowError, match="end token"):
        encoder().encode(read_record({"prompt": "x", "document": "y<|im_end|>z"}), Form.PARALLEL)


def test_lines_that_no_parser_can_follow_and_files_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "\n")
    ((_, row),) = number_rows(str(tmp_path / "deep.jsonl"))
    assert row.reason is Reason.UNREADABLE
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"none of these: a \.jsonl"):
        list(number_rows(str(tmp_path / "rows.txt")))


def test_rows_that_were_cut_are_counted():
    record = read_record({"prompt": "Where?", "document": DOCUMENT + "0" * 400})
    built = build_rows(enumerate([record, record], 1), encoder(max_length=300, cut=True), both)
    assert built.report.summary() == {"rows": 2, "kept": 2, "dropped": {}, "cut": 2}
    assert "2 of 2 rows have blocks (2 to 2 paths a block, 1 deep at most)" in built.describe()
    assert built.describe().endswith("300 at most")


def test_tags_in_a_prompt_are_text_and_a_system_prompt_comes_first():
    record = read_record({"prompt": "What does <Parallel> mean?", "document": "A tag."}, system_prompt="Be brief.")
    assert [message["role"] for message in record.messages] == ["system", "user"]
    row = encoder().encode(record, Form.PARALLEL)
    assert not set(row["input_ids"]) & set(encoder().tags.control_ids)
    assert "Be brief." in tokenizer().decode(row["input_ids"])


def test_each_form_has_its_suffix_and_its_text():
    record = read_record({"prompt": f"Where? {SEQUENTIAL_SUFFIX}", "document": DOCUMENT})
    texts = {form: tokenizer().decode(encoder().encode(record, form)["input_ids"]) for form in Form}
    for form, text in texts.items():
        is_sequential = form is Form.SEQUENTIAL
        assert (f"Where? {SEQUENTIAL_SUFFIX if is_sequential else PARALLEL_SUFFIX}<|im_end|>") in text
        assert ("<Parallel>" in text) == (not is_sequential)
        assert text.endswith("Answer: 2<|im_end|>")
    assert "goes left\ngoes right" in texts[Form.SEQUENTIAL]
    bare = encoder(suffix=False).encode(read_record({"prompt": "Where?", "document": DOCUMENT}), Form.PARALLEL)
    assert "Where?<|im_end|>" in tokenizer().decode(bare["input_ids"])


def test_tokens_are_counted_by_what_they_are_part_of():
    ids = tokenizer().encode(DOCUMENT, add_special_tokens=False)
    kinds, is_open = token_kinds(ids, encoder().tags)
    text: dict[TokenKind, str] = {}
    for token, kind in zip(ids, kinds, strict=True):
        text[kind] = text.get(kind, "") + tokenizer().decode([token])
    assert text[TokenKind.GOAL].split() == ["1:", "left", "2:", "right"]
    assert text[TokenKind.PATH].split() == ["1:", "goes", "left", "2:", "goes", "right"]
    assert text[TokenKind.CONCLUSION].strip() == "both ways"
    assert text[TokenKind.THINK].split() == ["Look.", "Done."]
    assert text[TokenKind.ANSWER].strip() == "Answer: 2"
    begin, end = ids.index(encoder().tags.open("parallel")), ids.index(encoder().tags.close("parallel"))
    assert [index for index, each in enumerate(is_open) if each] == list(range(begin, end))


def test_a_row_that_is_too_long_is_dropped_or_cut_where_no_block_is_open():
    record = read_record({"prompt": "Where?", "document": DOCUMENT + "0" * 40})
    whole = encoder().encode(record, Form.PARALLEL)
    prompt = whole["labels"].index(next(label for label in whole["labels"] if label != IGNORE))
    close = encoder().tags.close("parallel")
    end = whole["input_ids"].index(close) + 1
    for length in range(1, len(whole["input_ids"])):
        with pytest.raises(RowError, match="too long"):
            encoder(max_length=length).encode(record, Form.PARALLEL)
        if length <= prompt:
            with pytest.raises(RowError, match="too long"):
                encoder(max_length=length, cut=True).encode(record, Form.PARALLEL)
            continue
        row = encoder(max_length=length, cut=True).encode(record, Form.PARALLEL)
        size = len(row["input_ids"])
        assert size <= length
        assert {len(row[name]) for name in ("labels", "kinds")} == {size}
        assert row["input_ids"] == whole["input_ids"][:size]
        opened, closed = (row["input_ids"].count(i) for i in (encoder().tags.open("parallel"), close))
        assert opened == closed
        assert size == length or length < end
    assert encoder(max_length=len(whole["input_ids"])).encode(record, Form.PARALLEL) == whole


def test_one_bad_row_costs_that_row_and_is_reported(tmp_path):
    rows = [
        {"id": "a", "prompt": "Where?", "document": DOCUMENT},
        {"id": "b", "prompt": "Where?", "document": "<Think>"},
        {"id": "c", "prompt": "Where?", "document": DOCUMENT + "0" * 300},
        {"prompt": "Where to?", "document": "Left."},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:2], "{not json", "", *lines[2:]]) + "\n")
    built = build_rows(number_rows(str(tmp_path / "rows.jsonl")), encoder(max_length=200), both, unit="line")
    assert built.report.summary() == {
        "rows": 5,
        "kept": 2,
        "dropped": {"malformed document": 1, "unreadable": 1, "too long": 1},
    }
    dropped = [json.loads(line) for line in built.report.lines(built.report.dropped).splitlines()]
    # as an editor counts them: the fourth line is blank
    assert [(entry["line"], entry.get("id")) for entry in dropped] == [(2, "b"), (3, None), (5, "c")]
    said = built.report.describe().splitlines()
    assert said[0] == "5 rows read, 2 kept, 3 dropped"
    assert said[1].startswith("  line 2 (id b): malformed document: at its line 1, column 8: ")
    assert said[2].startswith("  line 3: unreadable: no JSON: ")
    assert said[3].startswith("  line 5 (id c): too long: ")
    assert [(choice.parallel, choice.sequential) for choice in built.choices] == [(0, 1), (2, 3)]
    for choice in built.choices:
        assert choice.parallel_length == len(built.rows[choice.parallel]["input_ids"])
        assert choice.sequential_length == len(built.rows[choice.sequential]["input_ids"])


ENDS = {
    "a line that says another": ("Answer: 3", "2", True),
    "a line that says it": ("Answer: 2", "2", False),
    "the same value": ("Answer: 1/2", "0.5", False),
    "another sign": ("Answer: -2", "2", True),
    "a number that begins alike": ("Answer: 2.5", "2", True),
    "a unit": ("Answer: $1,200 a week", 1200, False),
    "a name": ("Answer: x = 2.", "2", False),
    "words": ("Answer: Berlin", "berlin", False),
    "other words": ("Answer: Berlin", "Paris", True),
    "no line, another number": ("So the total is 26.", "27", True),
    "no line, the number": ("So the total is 26.", "26", False),
    "no line, no number": ("So the total is twenty-six.", "26", False),
    "no line, words": ("So it is in Berlin.", "Paris", False),
    "LaTeX": (r"Answer: \frac12", "0.5", False),
    "no answer": ("Answer: 2", None, False),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_answer_that_its_document_contradicts_is_doubtful(case):
    end, answer, is_doubtful = ENDS[case]
    record = read_record({"prompt": "Where?", "document": f"{BLOCK}\n{end}", "answer": answer})
    assert (record.doubt is not None) == is_doubtful, record.doubt
    if is_doubtful:
        assert repr(str(answer)) in record.doubt
        assert end.removeprefix("Answer: ") in record.doubt


def test_what_follows_the_reasoning_has_to_hold_the_answer():
    for end, is_doubtful in (("It is 2 of them.", False), ("It is 3 of them.", True)):
        record = read_record({"prompt": "Where?", "document": f"<Think>\n2\n</Think>\n\n{end}", "answer": 2})
        assert (record.doubt is not None) == is_doubtful


def test_rows_that_repeat_an_earlier_one_are_named_and_kept(tmp_path):
    rows = [
        {"id": "a", "prompt": "Where?", "document": DOCUMENT},
        {"id": "b", "prompt": f" Where?  {PARALLEL_SUFFIX}", "document": DOCUMENT},
        {"prompt": "Where?", "document": "Left."},
        {"prompt": "And then?", "document": DOCUMENT},
        {"prompt": "Why?", "document": "Because.", "answer": "No"},
        {"prompt": "Why?", "document": "Answer: Because", "answer": "No"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    built = build_rows(number_rows(str(tmp_path / "rows.jsonl")), encoder(), both, unit="line")
    assert built.report.summary() == {"rows": 6, "kept": 6, "dropped": {}, "doubtful": 4}
    assert [(entry["line"], entry.get("id"), entry["detail"]) for entry in built.report.doubtful] == [
        (2, "b", "repeats the prompt and the document of line 1"),
        (3, None, "repeats the prompt of line 1, with another document"),
        (4, None, "repeats the document of line 1, under another prompt"),
        (
            6,
            None,
            "answer is 'No', and the document ends in 'Because'; repeats the prompt of line 5, with another document",
        ),
    ]
    assert built.report.describe().splitlines()[:2] == [
        "6 rows read, 6 kept, 0 dropped, 4 doubtful",
        "  line 2 (id b): doubtful: repeats the prompt and the document of line 1",
    ]


def test_a_record_that_has_one_form_is_encoded_once():
    record = read_record({"prompt": "Where?", "document": DOCUMENT})
    fixed = Record(record.messages, record.document, Form.SEQUENTIAL)
    built = build_rows(enumerate([record, fixed], 1), encoder(), both)
    assert [choice.is_fixed for choice in built.choices] == [False, True]
    assert built.rows[2] == built.rows[1]


def test_a_template_that_cannot_take_a_prompt_costs_the_row():
    bare = plain_tokenizer_with_tags()
    bare.chat_template = "{{ raise_exception('no system messages here') }}"
    try:
        wrong = RowEncoder(bare, TagSet.from_tokenizer(bare))
        with pytest.raises(RowError, match="no system messages here"):
            wrong.encode(read_record({"prompt": "x", "document": "y"}), Form.PARALLEL)
    finally:
        bare.chat_template = None


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "folder"])
def test_rows_come_from_files_and_folders_of_every_kind(tmp_path, kind):
    import datasets

    rows = [{"prompt": "Where?", "document": DOCUMENT}, {"prompt": "Why?", "document": "Because."}]
    dataset = datasets.Dataset.from_list(rows)
    path = tmp_path / f"rows.{kind}"
    if kind == "folder":
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        {"jsonl": dataset.to_json, "parquet": dataset.to_parquet, "csv": dataset.to_csv}[kind](path)
    assert [row["prompt"] for _, row in number_rows(str(path))] == ["Where?", "Why?"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("no-such.jsonl", ["no file"]), ("no/such/dataset", ["no/such/dataset"]), ("damaged.parquet", ["damaged"])],
)
def test_a_dataset_that_is_not_there_is_named(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot read the dataset") as caught:
        list(number_rows(name))
    assert all(word in str(caught.value) for word in words)


def test_line_ends_of_another_system_are_read_as_the_model_writes_them():
    outlines = "<Outline>1: a</Outline>\n<Outline>2: b</Outline>"
    paths = "<Path>\n1: x\n</Path>\n<Path>\n2: y\n</Path>"
    document = f"<Parallel>\n<Goal>\n{outlines}\n</Goal>\n{paths}\n<Conclusion>\nz\n</Conclusion>\n</Parallel>"
    rows = [{"prompt": "x", "document": text} for text in (document, document.replace("\n", "\r\n"))]
    assert read_record(rows[1]).document.render() == read_record(rows[0]).document.render() == document


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    import datasets

    source = tmp_path / "rows [1]*.parquet"
    datasets.Dataset.from_list([{"prompt": "a"}]).to_parquet(source)
    assert [row for _, row in number_rows(str(source))] == [{"prompt": "a"}]
    folder = tmp_path / "rows[1]"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds \[, \* or \?"):
        list(number_rows(str(folder)))
