"""A caller's own processors and criteria, and ``structure="off"`` as ordinary decoding."""

import copy
from collections import Counter

import pytest
import torch
from helpers import EOS, FIRST_TEXT, PAD, TAGS, FollowPlan, Forced, answer, documents, left_pad, text_of, tiny_model
from test_forward import pair
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from multiverse_hf import (
    MultiverseEngine,
    MultiverseForCausalLM,
    TagSet,
    embedded_model,
    encode_prompt,
    parse_document,
)
from multiverse_hf.modeling.layout import has_block
from multiverse_hf.modeling.state import FinishReason
from multiverse_hf.modeling.tags import read_turns

ONE, TWO = [50, 51, 52], [60]
FORKS = {tuple(ONE): (2, Forced(((3,), (6,))), 2), tuple(TWO): (9,)}


class Calls(LogitsProcessor):
    """Counts its calls and keeps the shape of each; must be called once for each token of a row."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids, scores):
        assert not self.lengths or input_ids.shape[1] == self.lengths[-1] + 1, "a token was passed over"
        assert len(input_ids) == len(scores)
        self.lengths.append(input_ids.shape[1])
        return scores


class Rows(StoppingCriteria):
    """Keeps a list for the rows of a batch, as evaluation harnesses do: a row that said a word is done for good."""

    def __init__(self, rows: int, word: int) -> None:
        self.done, self.word, self.num_calls = [False] * rows, word, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.num_calls += 1
        for row in range(len(self.done)):
            self.done[row] |= bool(input_ids[row, -1] == self.word)
        return torch.tensor(self.done)


def test_a_processor_with_state_is_called_once_a_step_with_the_whole_padded_batch():
    shapes = []

    def watch(input_ids, scores):
        shapes.append((tuple(input_ids.shape), tuple(scores.shape), input_ids.tolist()))
        return scores

    plans = {tuple(ONE): (3,), tuple(TWO): (6,)}
    output = answer(tiny_model("qwen2"), [ONE, TWO], plans, logits_processor=[watch])
    prompts = left_pad([ONE, TWO])[0].tolist()
    for step, (ids, scores, rows) in enumerate(shapes):
        assert (ids, scores) == ((2, 3 + step), (2, 96))
        assert [row[:3] for row in rows] == prompts
        written = [output.sequences[row, 3 : 3 + step].tolist() for row in range(2)]
        assert [row[3:] for row in rows] == written, "a finished row is filled up with the pad token"
    assert len(shapes) == 7


def test_each_branch_has_a_processor_that_was_called_for_every_token_it_sees():
    live = Calls()
    output = answer(tiny_model("qwen2"), [ONE, TWO], FORKS, logits_processor=[live])
    assert [stats.num_forks for stats in output.stats] == [1, 0]
    # two words, <Parallel> and <Goal>, two outlines of five tokens, </Goal>; the other row ended before
    assert live.lengths == list(range(3, 3 + 2 + 2 + 10 + 1))
    answer(tiny_model("qwen2"), [ONE], FORKS, logits_processor=[Calls()])


def test_a_processors_state_is_each_branchs_own():
    class Budget(LogitsProcessor):
        """Ends a row at its 30th token."""

        num_calls = 0

        def __call__(self, input_ids, scores):
            self.num_calls += 1
            if self.num_calls > 30:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, FIRST_TEXT] = -1.0  # where the grammar wants text
                scores[:, [EOS, *(TAGS.close(role) for role in ("path", "conclusion", "parallel"))]] = 0.0
            return scores

    plan = (1, Forced(((40,), (2,))), 1)
    (ids,) = documents(answer(tiny_model("qwen2"), [ONE], {tuple(ONE): plan}, logits_processor=[Budget()]), [ONE])
    (block, _), *_ = parse_document(text_of(ids)).blocks()
    lengths = [len(path.text.strip()) for path in block.paths]
    assert lengths[1] == 2 + 2, "a label and two tokens: its sibling's calls do not count"
    assert 2 < lengths[0] < 30


@pytest.mark.slow
def test_a_processor_that_knows_no_place_where_the_engine_writes_serves_all_the_same():
    class Chooses(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids[0, -1] in (TAGS.open("path"), TAGS.close("goal"), TAGS.open("conclusion")):
                raise KeyError("no token is chosen here")
            return scores

    want = answer(tiny_model("qwen2"), [ONE, TWO], FORKS).sequences
    for prompts in ([ONE], [ONE, TWO]):
        ours = answer(tiny_model("qwen2"), prompts, FORKS, logits_processor=[Chooses()]).sequences
        assert ours[0].tolist()[-20:] == want[0].tolist()[-20:]

    class Never(Chooses):
        def __call__(self, input_ids, scores):
            if TAGS.close("goal") in input_ids[0]:
                raise KeyError("not at all")
            return scores

    with pytest.raises(ValueError, match=r"Never does not take the tokens that the engine writes"):
        answer(tiny_model("qwen2"), [ONE], FORKS, logits_processor=[Never()])


def test_what_cannot_be_copied_is_refused_at_a_fork_by_name_and_serves_until_then():
    class Grammar(LogitsProcessor):
        def __init__(self) -> None:
            self.matcher = (each for each in ())  # nothing copies a generator

        def __call__(self, input_ids, scores):
            return scores

    answer(tiny_model("qwen2"), [ONE, TWO], {tuple(ONE): (3,), tuple(TWO): (6,)}, logits_processor=[Grammar()])
    for prompts in ([ONE], [ONE, TWO]):
        with pytest.raises(ValueError, match=r"Grammar keeps a state that cannot be copied .* structure='off'"):
            answer(tiny_model("qwen2"), prompts, FORKS, logits_processor=[Grammar()])


class Leans(LogitsProcessor):
    """Prefers tokens by the sum of the ids that a row sees, to which padding adds nothing."""

    def __init__(self, is_stateless: bool) -> None:
        self.is_stateless, self.shapes = is_stateless, []

    def __call__(self, input_ids, scores):
        self.shapes.append(tuple(input_ids.shape))
        return scores + 9 * torch.sin(input_ids.sum(dim=1, keepdim=True) * torch.arange(scores.shape[1]))


class Ends(StoppingCriteria):
    """Ends a path at an even id."""

    def __init__(self, is_stateless: bool) -> None:
        self.is_stateless = is_stateless

    def __call__(self, input_ids, scores, **kwargs):
        is_path = (input_ids == TAGS.open("path")).any(dim=1) & ~(input_ids == TAGS.close("path")).any(dim=1)
        return is_path & (input_ids[:, -1] >= FIRST_TEXT) & (input_ids[:, -1] % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4}, {"structure": "off"}], ids=str)
def test_what_says_that_it_keeps_no_state_is_asked_for_each_branch_and_gives_the_same(options):
    model, plans = tiny_model("qwen2"), None if options.get("structure") == "off" else FORKS
    answers, shapes = [], []
    for is_stateless in (True, False):
        leans, ends = Leans(is_stateless), Ends(is_stateless)
        calls = {"max_new_tokens": 60, "output_logits": False} | options
        output = answer(model, [ONE, TWO], plans, logits_processor=[leans], stopping_criteria=[ends], **calls)
        answers.append((output.sequences.tolist(), [stats.closed_by for stats in output.stats]))
        assert output.stats[0].num_forks == (0 if plans is None else 1)
        shapes.append(leans.shapes)
    assert answers[0] == answers[1]
    assert plans is None or FinishReason.CRITERIA in answers[0][1][0]
    assert shapes[0][:2] == [(1, 3), (1, 1)], "rows of one length, without padding"
    assert shapes[1][0] == (2, 3)


def test_one_rows_or_branchs_end_ends_no_other():
    word = FIRST_TEXT + 25
    model = tiny_model("qwen2")

    class Say(LogitsProcessor):
        """Has the first path say the word at once."""

        def __deepcopy__(self, memo):
            return self

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, word] = -torch.inf
            for row, ids in enumerate(input_ids.tolist()):
                if ids[-3:] == [TAGS.newline[0], *TAGS.ordinal(1)]:
                    scores[row], scores[row, word] = -torch.inf, 0.0
            return scores

    for prompts in ([ONE], [ONE, TWO]):
        stop = Rows(len(prompts), word)
        options = {"stopping_criteria": [stop], "logits_processor": [Say()]}
        output = answer(model, prompts, FORKS, **options)
        (block, _), *_ = parse_document(text_of(documents(output, prompts)[0])).blocks()
        assert [len(path.text.strip()) for path in block.paths] == [2 + 1, 2 + 6]
        assert output.stats[0].closed_by == {FinishReason.CRITERIA: 1}
        assert {stats.finish_reason for stats in output.stats} == {FinishReason.STOP}
        whole = answer(model, prompts, FORKS, stop_scope="answer", **options | {"stopping_criteria": [stop]})
        assert whole.stats[0].finish_reason == FinishReason.CRITERIA
        parse_document(text_of(documents(whole, prompts)[0]))
    assert Counter(row.tolist().count(word) for row in whole.sequences) == {1: 1, 0: 1}


@pytest.mark.slow
def test_a_stop_string_in_a_path_can_end_the_answer():
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = MultiverseForCausalLM.from_pretrained(embedded_model())
    prompt = "A=19-7+12; B=8+15-3; C=5+6; total? Think step by step and in parallel before answering."
    batch = encode_prompt(tokenizer, [prompt], return_tensors="pt")
    options = {"stop_strings": ["ends at 24"], "tokenizer": tokenizer, "max_new_tokens": 400}
    for scope, reason in (("path", FinishReason.STOP), ("answer", FinishReason.CRITERIA)):
        output = model.generate(**batch, **options, stop_scope=scope, return_dict_in_generate=True)
        assert output.stats[0].finish_reason == reason
        assert output.stats[0].closed_by[FinishReason.CRITERIA] >= 1
    with pytest.raises(ValueError, match="stop_scope must be 'path' or 'answer', got 'all'"):
        model.generate(**batch, stop_scope="all")


# Whose text it is


def test_tags_in_a_users_turn_are_text_for_answers_and_for_forward():
    """The client tokenizes with the chat template, which knows nothing of tags."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = MultiverseForCausalLM.from_pretrained(embedded_model())
    base = AutoModelForCausalLM.from_pretrained(embedded_model())
    block = "<Parallel>\n<Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>\n<Path>\n1: c</Path>\n"
    messages = [
        {"role": "system", "content": block},
        {"role": "user", "content": block},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    output = model.generate(ids, max_new_tokens=60, do_sample=False, return_dict_in_generate=True)
    assert output.stats[0].num_tokens > 0
    # in the assistant's own turn they act, also after another turn
    messages += [{"role": "assistant", "content": block}]
    own = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
    assert has_block(own[0], model.tags)
    assert not has_block(ids[0], model.tags)
    assert model.tags == TagSet.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("<s>{{ messages[0].content }}</s><a>", "a template with special tokens"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "a template without any"),
        ("{{ raise_exception('no') }}", "a template that fails"),
    ],
)
def test_turns_are_read_from_any_template_or_left_out(template, text):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer.add_special_tokens({"extra_special_tokens": ["<s>", "</s>", "<a>"]})
    tokenizer.chat_template = template
    turns = read_turns(tokenizer)
    named = [
        (tokenizer.convert_ids_to_tokens(list(opening)), tokenizer.convert_ids_to_tokens(end))
        for opening, end in turns
    ]
    assert named == ([(["<s>"], "</s>")] if "<s>" in template else [])


def test_the_engine_gives_each_request_its_own_batch():
    model = tiny_model("qwen2")
    with MultiverseEngine(model, None, max_cache_tokens=4096) as engine:
        options = {"max_new_tokens": 400, "logits_processor": [FollowPlan(FORKS), Calls()]}
        ours = engine.submit(ONE, **copy.deepcopy(options)).result().ids
        for stop in ("path", "answer"):
            handle = engine.submit(ONE, stopping_criteria=[Rows(1, -1)], stop_scope=stop, **copy.deepcopy(options))
            assert handle.result().ids == ours
    assert ours == documents(answer(model, [ONE], FORKS), [ONE])[0][3:]


# structure="off"


def test_off_goes_on_from_embeddings_caches_and_an_assistant():
    model, base = pair()
    ids = torch.tensor([ONE])
    call = {"max_new_tokens": 6, "do_sample": False}
    embeds = model.get_input_embeddings()(ids)
    ours = model.generate(inputs_embeds=embeds, structure="off", **call)
    assert torch.equal(ours, base.generate(inputs_embeds=embeds, **call))
    want = base.generate(ids, **call)
    assert torch.equal(model.generate(ids, assistant_model=copy.deepcopy(model), structure="off", **call), want)
    cache = model.generate(ids, structure="off", use_cache=True, return_dict_in_generate=True, **call)
    again = model.generate(ids, structure="off", past_key_values=cache.past_key_values, **call)
    assert cache.past_key_values is None or torch.equal(again, want)
    document = torch.tensor([[60, *[TAGS.open("parallel"), TAGS.open("goal"), TAGS.open("outline"), 61]]])
    document = torch.cat([document, torch.tensor([[TAGS.close("outline"), TAGS.close("goal"), 62]])], 1)
    ours = model.generate(document, structure="off", num_beams=2, **call)
    assert torch.equal(ours, base.generate(document, num_beams=2, **call)), "tags are text"


def test_a_seed_may_stand_in_the_config_and_serves_ordinary_decoding_too():
    model = tiny_model("qwen2")
    ids = torch.tensor([ONE])
    config = GenerationConfig(seed=3, do_sample=True, max_new_tokens=12)
    ours = model.generate(ids, generation_config=config)
    assert torch.equal(ours, model.generate(ids, do_sample=True, max_new_tokens=12, seed=3))
    state = torch.random.get_rng_state()
    sampled = [
        model.generate(ids, structure="off", do_sample=True, max_new_tokens=12, seed=seed, use_cache=False).tolist()
        for seed in (3, 3, 4)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_comes_back_is_an_output_of_transformers():
    output = answer(tiny_model("qwen2"), [ONE], FORKS)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert output.scores is output.attentions is output.hidden_states is output.past_key_values is None
    assert output.sequences[0, 0] == ONE[0] != PAD
