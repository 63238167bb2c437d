"""Kinds of answers: each says by itself what is right, and what is wrong though it looks alike."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation_answers import BENCHMARKS, NEEDS_EVAL

from multiverse_hf.evaluation.answers import AnswerKind, Rule, judge
from multiverse_hf.judging import checker
from multiverse_hf.judging.exact import exact_value
from multiverse_hf.judging.units import parse_unit, split_unit
from multiverse_hf.judging.verifier import Verifier

pytestmark = NEEDS_EVAL


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=5) as verifier:
        yield verifier


# gold, what is right, what is wrong
KINDS = [
    # lists: any order, the same length, with or without a name
    (
        "4, 6, 9",
        ["9, 6, 4", "k=4, 6, 9", r"4, 6 \text{ and } 9", r"\{4, 6, 9\}", "4, 6 or 9"],
        ["4, 6", "4, 6, 8", "4, 6, 9, 9"],
    ),
    ("k = 4, 6, 9", ["4,6,9", "k=9, 4, 6"], ["k=4,6", "k=4,6,8", "9"]),
    (r"31, 58, \text{ and } 77", ["31, 58, 77", "31, 58 and 77"], ["30, 57, and 77", "77"]),
    ("u = 3, v = 8", ["v=8, u=3", "3, 8"], ["u=8, v=3", "8, 3", "u=3"]),
    # tuples, vectors and intervals: in order, with their ends
    (
        "(2, 7.5)",
        [r"\left(2, \frac{15}{2}\right)", "P = (2, 7.5)", "2, 7.5"],
        ["(2, 7)", "(7.5, 2)", "[2, 7.5)", "(2, 7.50001)"],
    ),
    ("E = (2, 7)", ["(2,7)"], ["E = (2, 7.5)", "E = (2, 7]"]),
    ("(100,250)", ["(100, 250)", "(100.0, 250)"], ["100250", "(250,100)"]),
    (r"(-\infty, 2) \cup [6, 9)", [r"[6,9) \cup (-\infty,2)"], [r"(-\infty,2) \cup [6,9]", r"(-\infty, 2)"]),
    (r"[2, 6]", [r"2 \le x \le 6", r"x \in [2,6]"], ["2 < x < 6", "[2, 6)"]),
    (
        r"\begin{pmatrix} 2 \\ -1/2 \end{pmatrix}",
        [r"\begin{bmatrix} 2 \\ -0.5 \end{bmatrix}", r"(2, -\tfrac12)",
        r"\frac12\begin{pmatrix} 4 \\ -1 \end{pmatrix}"],
        [r"\begin{pmatrix} 2 & -1/2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1/2 \end{pmatrix}"],
    ),
    # signs of two meanings
    (r"\pm 45", ["45, -45", r"-45 \text{ and } 45"], ["45", "-45"]),
    (r"\{3 \pm \sqrt{2}, 6\}", [r"\{6, 3+\sqrt2, 3-\sqrt2\}", r"6, 3 \pm \sqrt2"], [r"3 \pm \sqrt{2}"]),
    (r"2 \pm \sqrt{7}", [r"2-\sqrt7, 2+\sqrt7"], [r"2+\sqrt{7}", r"\pm\sqrt7"]),
    # times and ratios
    ("10:30", [r"10:30 \text{ a.m.}", "10:30 AM"], ["1:30", "10:03", "10", "10.5"]),
    (r"4:15 \text{ p.m.}", ["4:15"], [r"4:15 \text{ a.m.}", "4:51"]),
    (r"9 \text{ a.m.}", ["9:00 AM", "9 am"], ["9 p.m.", "9:30 a.m."]),
    ("4:6", ["2:3", r"\frac23", r"4 \text{ to } 6"], ["3:2", "4:6:1", "1.5"]),
    # exact numbers
    ("0.2", [r"\frac15", "0.20", r"20\%"], ["0.20000001", "0.19999999", r"0.2\%"]),
    (r"\frac{1}{7^{90}}", [r"7^{-90}"], [r"\frac{1}{7^{91}}", "0"]),
    (r"3^{200}", [r"9^{100}"], [r"3^{200}+1", r"3^{201}"]),
    (r"e^{-80}", [r"\frac{1}{e^{80}}"], [r"e^{-81}", "0"]),
    (r"\frac{2}{9}", [r"\frac29 \approx 0.222"], [r"\approx 0.222", r"\frac{2}{7} \approx 0.222", r"x \approx 0.22"]),
    (r"\frac{2}{3}", ["0.666667", r"0.\overline{6}"], ["0.667", "0.666666", r"2\frac{2}{3}"]),
    (r"2\frac{3}{4}", [r"\frac{11}{4}", "2 3/4", "2.75"], [r"\frac{6}{4}", r"\frac{3}{4}"]),
    (r"\sqrt{3}", ["1.732051", r"\frac{3}{\sqrt3}", "√3"], ["1.732", "1.732052", r"\sqrt{3.0000001}"]),
    ("2.5 \\times 10^{4}", ["25000", "2.5e4", "25{,}000"], ["2.5", "2500"]),
    (r"17,\! 500", ["17500", "17,500", r"17\,500"], ["17, 500", "17"]),
    ("7", ["+7", "7.0", "07"], ["-7", r"7\text{ million}", r"7 \text{ or more}", r"\approx 7"]),
    ("25\\%", ["25", "0.25", r"\frac14"], ["2.5", r"0.25\%"]),
    # symbols count, and so do words
    (r"2 + \frac{3}{\mathrm{e}}", [r"2+\frac{3}{e}"], [r"2 - \frac{3}{\mathrm{e}}", "2", r"2+\frac{3}{\pi}"]),
    ("5R^2", ["5 R \\cdot R"], ["5r^2", "5"]),
    (r"e^{i\pi/2}", ["i", r"\mathrm{i}", r"\sqrt{-1}"], ["-i", "1"]),
    (r"\text{parabola}", [r"\text{a parabola}", "Parabola."], ["hyperbola", "parabolic"]),
    ("4c", ["c \\cdot 4"], ["4", "4d", "4h"]),
    (r"\frac{1}{4}z + 2", ["1/4 z + 2", r"\frac{z}{4} + 2"], ["4z+2", "1/4 + 2"]),
    ("0.3x", [r"\frac{3x}{10}"], ["0.30000001x", "0.3y", "0.3"]),
    ("t=6", ["6"], ["s=6"]),
    ("y = 3x - 1", ["3x-1", "3x - y = 1", "f(x)=3x-1"], ["y=3x+1", "-3x-1"]),
    (r"\text{north}", ["North"], ["thorn", r"\text{south}"]),
    (r"\text{Anna and Omar}", ["Anna and Omar", "Omar, Anna"], ["Anna", "Anna and Olga"]),
    (r"\text{(D)}", ["D", r"\text{D}", r"\text{(D) } 8"], ["(A)", r"\text{(A) D}"]),
    ("43_7", [r"43_{\text{seven}}", "43_{7}", r"43 \text{ (base 7)}", "(43)_7"], ["43_8", "43", "34_7"]),
    # units
    (
        r"12 \mbox{ inches}^2",
        [r"12 \text{ in}^2", "12 sq in", r"12 \text{ square inches}", "12"],
        [r"12\text{ in}", r"12\text{ ft}^2", "13"],
    ),
    (
        r"40\text{ cm}^3",
        [r"40 \text{ cubic centimeters}", r"40 \text{ cc}", r"40\,\mathrm{cm}^{3}", "40 cm3", r"40{\rm ~cm}^3"],
        [r"40 \text{ cm}^2"],
    ),
    (r"9 \text{ yards}", [r"9 \text{ yd}", "9 yds"], [r"9 \text{ ft}", r"9\text{ m}"]),
    (r"6 \text{ min}", ["6 minutes", r"6\mathrm{min}", r"6 \text{ mins}"], [r"6 \text{ h}", r"6\text{ m}"]),
    (
        r"7 \text{ m/s}",
        [r"7 \text{ meters per second}", r"7\ \frac{\text{m}}{\text{s}}", r"7\text{ m}\,\text{s}^{-1}"],
        [r"7 \text{ m/s}^2", r"7\text{ km/h}"],
    ),
    (r"55 \text{ mph}", ["55 miles per hour", r"55 \text{ mi/h}"], ["55 kph"]),
    (r"\$12", ["12 dollars", r"\$12.00", "12"], ["12 cents", "€12"]),
    (r"75^\circ", ["75", "75°", r"75 \text{ degrees}"], [r"75 \text{ rad}", r"75^\circ\text{C}"]),
    (r"8\pi \text{ m}^2", [r"8\pi", r"8\pi \text{ square meters}"], [r"8\pi \text{ m}", "8"]),
    (r"2 \text{ hours and } 45 \text{ minutes}", ["2 hours 45 minutes", "2 h 45 min"], ["2 hours", "2 h 54 min"]),
    (r"6 \text{ dollars per pound}", [r"\$6/\text{lb}", "6"], [r"\$6/\text{kg}", r"6 \text{ dollars}"]),
    (r"\text{18 inches}", [r"18\text{ in}", "18", r"18 \text{ inches long}"], ["18 ft"]),
    (r"30 \text{ students}", ["30"], [r"30 \text{ kg}", "31"]),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "right", "wrong"), KINDS, ids=[each[0] for each in KINDS])
def test_answers_of_each_kind(gold: str, right: list[str], wrong: list[str], verifier: Verifier) -> None:
    for said, correct in [*((each, True) for each in [gold, *right]), *((each, False) for each in wrong)]:
        verdict = judge(AnswerKind.MATH, gold, f"\\boxed{{{said}}}", verifier)
        assert verdict.correct is correct, (said, verdict)


LETTERS = {
    "right": [
        "Answer: (C), A catalyst", "Answer: C, I integrated", r"\boxed{c}", r"\boxed{C - the third}",
        r"\boxed{\text{Option C}}",
        "**Answer: C**", "Answer: **C**.", r"\boxed{\text{C. } x}", "Answer: choice (C)",
        "Answer: The correct option is C",
        "Answer: C – x", "Answer: C, not D", "Answer: C. A, B and D are wrong", "Answer: C (the third)",
        r"\boxed{\mathrm{C}}",
        "Answer: [C]", "### Answer: C: x", "Answer: C, A and B react", "Correct answer: C",
        "Answer: C, D-glucose is formed", "Answer: C, D. melanogaster", "Answer：C", r"\boxed{C)}", "Answer: \"C\"",
    ],
    "several": [
        r"\boxed{C, D}", "Answer: C or D", "Answer: (C) or (D)", r"\boxed{C \text{ and } D}", "Answer: C/D",
        "Answer: c, d",
        "Answer: C, D, and A", "Answer: either C or D", "Answer: both C and D", "Answer: C and D are right",
        "Answer: (C) x or (D) y", r"\boxed{C \& D}",
    ],
    "wrong": ["Answer: A catalyst", "Answer: a catalyst", "Answer: none", r"\boxed{CD}", "Answer: D"],
}  # fmt: skip


def test_a_letter_is_told_from_a_word_of_one_letter(verifier: Verifier) -> None:
    for kind, documents in LETTERS.items():
        for document in documents:
            verdict = judge(AnswerKind.LETTER, "C", document, verifier)
            assert verdict.correct is (kind == "right"), (document, verdict)
            assert (verdict.rule is Rule.SEVERAL) is (kind == "several"), (document, verdict)


@pytest.mark.parametrize("name", ["think", "Think", "THINK", "thinking", "reasoning"])
def test_thinking_holds_no_answer_whatever_its_tag_is_called(name: str, verifier: Verifier) -> None:
    for document, correct in (
        (f"<{name}>\nmaybe \\boxed{{8}}", False),
        (f"<{name}>\n\\boxed{{8}}</{name}>\n\nEight.", False),
        (f"<{name}>\n\\boxed{{3}}</{name}>\n\n\\boxed{{8}}", True),
        (f"maybe 3</{name}>\n\nAnswer: 8", True),
        (f"<{name}>a</{name}> \\boxed{{8}} <{name}> wait", False),
        (f"<{name}>a</{name}><{name}>\\boxed{{3}}</{name}> \\boxed{{8}}", True),
    ):
        assert judge(AnswerKind.MATH, "8", document, verifier).correct is correct, document
    assert not judge(AnswerKind.CHAINS, "8", f"<{name}>\nAnswer: 8", verifier).correct


@given(st.fractions(), st.integers(-5, 5))
@settings(max_examples=50, deadline=None)
def test_a_rational_number_is_read_as_it_is_written(value: Fraction, step: int) -> None:
    sign, size = "-" * (value < 0), abs(value)
    texts = (
        f"{value.numerator}/{value.denominator}",
        f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}",
        f"({value.numerator * 10**6}) / ({value.denominator} \\times 10^{{6}})",
        f"{value.numerator}/{value.denominator} + {step} - ({step})",
    )
    assert {exact_value(text) for text in texts} == {value}


@pytest.mark.parametrize("text", ["", "x", "1/0", "3 4", "1,2", "(((", "9^{9^{9^{9}}}", "10^{-10^{9}}", "99999999!"])
def test_what_is_no_rational_number_or_too_large_is_left_alone(text: str) -> None:
    assert exact_value(text) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    [
        "(a," * 450 + ")" * 450,
        "1," * 900 + "2",
        r"\pm " * 400 + "1",
        "5" + " cm/" * 400,
        "1/3^{9}" + "+1/7^{99}" * 200,
        "and " * 490,
        r"\text{ and }" * 150,
        r"\frac{" * 300 + "}" * 300,
        "x=" * 900 + "7",
        "(2x+1," + "x+x," * 40 + "3)",
        ", ".join(f"x+{k}+x" for k in range(30)),
    ],
    ids=lambda said: said[:12],
)
def test_long_answers_are_wrong_and_take_no_long_time(said: str, verifier: Verifier) -> None:
    for gold in ("5", "1, 2", "(5, 6)", r"5\text{ cm}", ", ".join(f"3x+{k}" for k in range(30))):
        assert not judge(AnswerKind.MATH, gold, f"\\boxed{{{said}}}", verifier).correct


def test_long_lists_of_letters_are_read_at_once(verifier: Verifier) -> None:
    for tail, rule in (("z", Rule.LETTER), ("B", Rule.SEVERAL)):  # each way to part the spaces would take hours
        text = "Answer: A" + ",  or  " * 200 + tail
        assert judge(AnswerKind.LETTER, "A", text, verifier).rule is rule


def test_a_unit_has_one_name_in_all_its_spellings() -> None:
    for spellings, unit in {
        ("inches", "in.", r"\text{ inch}"): (("in", 1),),
        ("cm^2", "square centimetres", "sq. cm", r"\text{cm}^{2}", "cm²"): (("cm", 2),),
        ("kg m / s^2", r"\frac{\text{kg m}}{\text{s}^2}", "kilogram meters per second squared"): (
            ("kg", 1), ("m", 1), ("s", -2),
        ),
        ("dollars per hour", r"\$/hr"): (("dollar", 1), ("h", -1)),
        ("MW",): (("MW", 1),),
        ("mW",): (("mW", 1),),
        ("blue", "x + m", "per", "m per", "5 m"): None,
    }.items():  # fmt: skip
        assert {parse_unit(spelling) for spelling in spellings} == {unit}, spellings
    assert split_unit("5m", letters=False).unit is None  # a variable, for all one knows
    assert split_unit(r"5\text{ m}", letters=False).unit == (("m", 1),)


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="../shared/data/benchmarks is not here")
def test_no_gold_answer_is_another_one(verifier: Verifier) -> None:
    rows = [json.loads(line) for line in (BENCHMARKS / "math500_first100.jsonl").read_text().splitlines()]
    golds = sorted({row["answer"].removeprefix("x=") for row in rows})
    for place, gold in enumerate(golds):
        for other in golds[place + 1 : place + 8]:
            assert not judge(AnswerKind.MATH, gold, f"\\boxed{{{other}}}", verifier).correct, (gold, other)


@pytest.mark.slow
def test_math_verify_is_installed_once_where_this_environment_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip is asked for a package from an empty folder, as on a machine without a network."""
    monkeypatch.setattr(checker, "JUDGES", {"math-verify": "0.0.0"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    with pytest.raises(checker.CommandError, match=r"cannot install math-verify: .*; with a network, run python -m"):
        checker.get_checker()
    assert "installing math-verify 0.0.0" in capsys.readouterr().err
    assert checker.find_folder() is None  # nothing half made is left
    (tmp_path / "multiverse_hf" / "checker-0.0.0-4.13.2-1.14.0-1.3.0").mkdir(parents=True)
    assert checker.get_checker() == checker.find_folder() is not None
