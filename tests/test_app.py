"""``multiverse app``: text stays text, and faults are told in a line."""

import re

import pytest

from multiverse_hf.cli import run
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.serving.events import StreamEvent
from multiverse_hf.viewing.live import Writing, draw
from multiverse_hf.viewing.sources import Question

HOSTILE = "<script>document.title='hacked'</script></style><img src=x onerror=\"document.title='hacked'\">"
HOSTILE += "${document.title='hacked'}{{value}}\u202e\x1b[31m\x00"


def written(*events: StreamEvent) -> Writing:
    writing = Writing(Question("x", Suffix.NONE, "guided", 10))
    for event in events:
        writing.feed(event)
    return writing


def tokens(branch: str, *texts: str) -> list[StreamEvent]:
    return [StreamEvent(kind="token", branch=branch, text=text, sampled=True) for text in texts]


def forked(*texts: str) -> list[StreamEvent]:
    """Return the events of a block whose paths have these texts and titles."""
    goal = [each for text in texts for each in ("<Outline>", text, "</Outline>")]
    events = [*tokens("", "<Parallel>", "<Goal>", *goal, "</Goal>")]
    events.append(StreamEvent(kind="fork", branch="", num_paths=len(texts)))
    for number, text in enumerate(texts, start=1):
        events += tokens(str(number), "<Path>", text)
    return events


def test_text_of_a_model_is_no_markup_and_a_frame_stays_small() -> None:
    drawn = draw(written(*forked(HOSTILE, "x" * 1_000_000, "\ud800")), HOSTILE, HOSTILE)
    assert not re.search(r"<(script|img|/style)", drawn)
    assert re.findall(r"<(\w+)[ >]", drawn).count("section") == 4  # the answer, and three lanes
    assert len(drawn) < 20_000
    drawn.encode()


def test_an_event_that_fits_nothing_is_an_error_of_the_answer() -> None:
    writing = written(StreamEvent(kind="token", branch="7", text="x"))
    assert writing.is_done
    assert 'role="alert"' in draw(writing)


@pytest.mark.slow  # imports Gradio
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "nothing"], ["'nothing'", "http://"]),
        (["--model-name", "x"], ["--model-name", "--url"]),
        (["--url", "http://a", "--device", "cpu"], ["--device", "--url"]),
    ],
)
def test_bad_usage_is_told_in_a_line(
    arguments: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="the extra app is missing")
    assert run(["app", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
