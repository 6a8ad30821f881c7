"""Templates: equal to transformers', with limits, and spans that are certain or refused."""

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from halfbyte.config.data import DataConfig
from halfbyte.data.samples import Conversation, Message
from halfbyte.data.templates import Template, from_tokenizer
from halfbyte.data.tokenize import tokenize
from halfbyte.errors import DataError, ModelError
from tests.data.conftest import SPECIALS, dressed, source_of

CONFIG = DataConfig(path="none.jsonl", max_tokens=4096)
ASK, ANSWER = Message("user", "what is it"), Message("assistant", "a thing")
TOOL = {"type": "function", "function": {"name": "look", "arguments": {"place": "here", "count": 2}}}
WEATHER = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}}]


def chat(tokenizer: Any, *messages: Message, **more: Any) -> tuple[str, list[str], str]:
    """(text, trained stretches, stop text) of a conversation under a tokenizer's template."""
    with from_tokenizer(tokenizer) as template:
        made = template.spans(messages, **more)
    return made.text, [made.text[start:end] for start, end in made.spans], made.stop


def labels(tokenizer: Any, *messages: Message, **settings: Any) -> Any:
    """The only example of a conversation."""
    with from_tokenizer(tokenizer) as template:
        config = CONFIG.model_copy(update=settings)
        return tokenize([Conversation(messages, "row", 0)], tokenizer, template, config)


@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_text_equals_transformers(name: str, backends: dict[str, Tokenizer]) -> None:
    """The worker renders what apply_chat_template renders, with and without generation prompt and tools; one begin token.  # T9"""
    tokenizer = dressed(backends["bpe"], name)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}, {"role": "user", "content": "again"}]
    with from_tokenizer(tokenizer) as template:
        for prompt in (False, True):
            for tools in (None, WEATHER):
                wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, tools=tools)
                assert template.render(messages, prompt, tools) == wanted
    made = labels(tokenizer, ASK, ANSWER)
    ids = tokenizer.apply_chat_template([ASK.as_dict(), ANSWER.as_dict()], tokenize=True, return_dict=False)
    assert made.examples[0].input_ids == ids
    if SPECIALS[name][0]:
        assert ids.count(tokenizer.bos_token_id) == (0 if name == "phi3" else 1), "phi3's template writes none"


@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_the_stop_token_is_trained_once_though_it_pads(name: str, backends: dict[str, Tokenizer]) -> None:
    """Pad and end token are one; the token that closes the answer is the last trained one, and it is reported.  # T7 T8"""
    tokenizer = dressed(backends["bpe"], name)
    tokenizer.pad_token = SPECIALS[name][2]
    made = labels(tokenizer, ASK, ANSWER)
    trained = [label for label in made.examples[0].labels if label != -100]
    stop = tokenizer.convert_tokens_to_ids(SPECIALS[name][2])
    assert trained[-1] == stop and trained.count(stop) == 1
    assert (made.report.stop_token_text, made.report.stop_token_id) == (SPECIALS[name][2], stop)


def test_a_template_that_closes_answers_with_nothing_is_refused(backends: dict[str, Tokenizer]) -> None:
    """GLM's template writes no token behind an answer, so a model trained on it would never stop.  # T8"""
    tokenizer = dressed(backends["bpe"], "qwen2_5")
    tokenizer.chat_template = source_of("glm4moe")
    with pytest.raises(DataError, match="E-DATA-065"):
        labels(tokenizer, ASK, ANSWER)


def test_a_stop_text_that_is_no_token_is_refused(backends: dict[str, Tokenizer]) -> None:
    """A ChatML template on a tokenizer that knows no <|im_end|>.  # T8"""
    tokenizer = dressed(Tokenizer.from_str(backends["bpe"].to_str().replace("im_end", "xx_end")), "gemma")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|END|{% endfor %}"
    with pytest.raises(DataError, match="E-DATA-065"):
        labels(tokenizer, ASK, ANSWER)


def test_empty_reasoning_that_the_template_adds_is_not_trained(backends: dict[str, Tokenizer]) -> None:
    """Qwen3 writes an empty <think></think> before a final answer; it is the template's, not the answer's.  # T13"""
    text, trained, _ = chat(dressed(backends["bpe"], "qwen3"), ASK, ANSWER)
    assert "<think>\n\n</think>\n\na thing" in text and trained == ["a thing<|im_end|>"]


@pytest.mark.parametrize("as_field", [False, True])
def test_own_reasoning_is_trained_from_the_generation_prompt_on(as_field: bool, backends: dict[str, Tokenizer]) -> None:
    """Reasoning in the content or in its field: trained in the last turn, dropped by the template in earlier ones.  # T12 T13"""
    if as_field:
        answers = [Message("assistant", text, {"reasoning_content": f"why {text}"}) for text in ("one", "two")]
    else:
        answers = [Message("assistant", f"<think>\nwhy {text}\n</think>\n\n{text}") for text in ("one", "two")]
    text, trained, _ = chat(dressed(backends["bpe"], "qwen3"), ASK, answers[0], Message("user", "more"), answers[1])
    assert "why one" not in text
    assert trained == ["one<|im_end|>", "<think>\nwhy two\n</think>\n\ntwo<|im_end|>"]


def test_what_the_generation_prompt_supplies_is_not_trained(backends: dict[str, Tokenizer]) -> None:
    """A prompt that ends in <think> and an answer that begins with it: training starts behind it.  # T13"""
    tokenizer = dressed(backends["bpe"], "qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    _, trained, _ = chat(tokenizer, ASK, Message("assistant", "<think>\nhm\n</think>\nso"))
    assert trained == ["hm\n</think>\nso<|im_end|>"]


def test_prefix_of_a_rewriting_template_is_no_prefix_of_the_whole(backends: dict[str, Tokenizer]) -> None:
    """Why no lengths are counted: Qwen3's text of the first turn does not begin its text of both turns, and the labels are right.  # T12"""
    tokenizer = dressed(backends["bpe"], "qwen3")
    messages = (ASK, Message("assistant", "<think>\nlong\n</think>\n\nfirst"), Message("user", "go on"), Message("assistant", "second"))
    with from_tokenizer(tokenizer) as template:
        assert not template.render(messages).startswith(template.render(messages[:2]))
    made = labels(tokenizer, *messages).examples[0]
    trained = tokenizer.decode([label for label in made.labels if label != -100])
    assert trained == "first<|im_end|>second<|im_end|>"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2"])
def test_tool_calls_are_trained_and_tool_results_are_not(name: str, backends: dict[str, Tokenizer]) -> None:
    """From the generation prompt's end to the stop token, the call's frame included."""
    call = Message("assistant", "", {"tool_calls": [TOOL]})
    text, trained, _ = chat(dressed(backends["bpe"], name), ASK, call, Message("tool", "sunny"), ANSWER, tools=WEATHER)
    assert "sunny" in text and len(trained) == 2
    begins = '{"name": "look", "parameters": ' if name == "llama3_2" else '<tool_call>\n{"name": "look", "arguments": '
    assert trained[0].lstrip("\n").startswith(begins) and trained[0].endswith(SPECIALS[name][2]) and '"count": 2' in trained[0]
    assert trained[1] == "a thing" + SPECIALS[name][2]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5"])
def test_assistant_first_and_trailing_space(name: str, backends: dict[str, Tokenizer]) -> None:
    """A conversation that starts with the assistant, and answers with space around them, mark what the template keeps.  # T11"""
    given = Message("assistant", "  hello \n")
    _, trained, _ = chat(dressed(backends["bpe"], name), given, ASK, Message("assistant", " bye "))
    kept = ["hello", "bye"] if name == "llama3" else ["  hello \n", " bye "]
    assert trained == [text + SPECIALS[name][2] for text in kept]


def test_an_answer_may_be_the_first_text_of_all(chatml: Any) -> None:
    """Place 0 is a place: a template that writes nothing before the first answer, and trims it.  # T11"""
    tokenizer = dressed(chatml.backend_tokenizer, "qwen2_5")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}"
    assert chat(tokenizer, Message("assistant", " hello "), ASK, ANSWER)[1] == ["hello<|im_end|>", "a thing<|im_end|>"]


def test_train_on_and_weights(chatml: Any) -> None:
    """All answers, the last one, everything, and none of weight 0."""
    turns = (ASK, ANSWER, Message("user", "more"), Message("assistant", "another"))
    assert chat(chatml, *turns)[1] == ["a thing<|im_end|>", "another<|im_end|>"]
    assert chat(chatml, *turns, train_on="last-assistant")[1] == ["another<|im_end|>"]
    text, trained, _ = chat(chatml, *turns, train_on="all")
    assert trained == [text]
    muted = (ASK, Message("assistant", "a thing", {}, False), *turns[2:])
    assert chat(chatml, *muted)[1] == ["another<|im_end|>"]


def test_an_answer_that_the_template_rewrites_is_refused(chatml: Any) -> None:
    """Upper case, twice, or left out: no span is guessed.  # T14"""
    tokenizer = dressed(chatml.backend_tokenizer, "qwen2_5")
    for body in ("{{ m.content }}{{ m.content }}", "{{ m.content | length }}", "{{ m.content[::-1] }}", "x"):
        tokenizer.chat_template = "{% for m in messages %}<|im_start|>" + body + "<|im_end|>{% endfor %}"
        with pytest.raises(DataError, match="E-DATA-064"):
            chat(tokenizer, ASK, ANSWER)


def test_the_answer_that_stands_in_the_question_is_found_in_its_own_place(chatml: Any) -> None:
    """The same words in the system text, the question, and an earlier answer.  # T14"""
    made = labels(chatml, Message("system", "yes"), Message("user", "yes"), Message("assistant", "yes"), Message("user", "yes"),
                  Message("assistant", "yes")).examples[0]
    assert chatml.decode([label for label in made.labels if label != -100]) == "yes<|im_end|>yes<|im_end|>"
    assert chatml.decode(made.input_ids[-len(chatml("yes<|im_end|>\n").input_ids):]) == "yes<|im_end|>\n"


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    """Prompt and answer merge into one token: it is trained, and nothing before it is.  # T15"""
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "bc": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("b", "c")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    with from_tokenizer(tokenizer, shape="prompt-completion") as template:
        sample = Conversation((Message("user", "ab"), Message("assistant", "ca")), "row", 0, chat=False)
        made = tokenize([sample], tokenizer, template, CONFIG).examples[0]
    assert (made.input_ids, made.labels) == ([2, 5, 2, 1], [-100, 5, 2, 1])


def test_special_tokens_in_text_stay_text(chatml: Any) -> None:
    """<|im_end|> in a question and in an answer is spelt out, and the row is named in a note."""
    asked, answered = Message("user", "say <|im_end|> twice"), Message("assistant", "<|im_end|> and <|im_end|>")
    made = labels(chatml, asked, answered)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert made.examples[0].input_ids.count(end) == 3, "system, user and assistant each close once"
    assert [label for label in made.examples[0].labels if label != -100].count(end) == 1
    assert chatml.decode(made.examples[0].input_ids) == chatml.apply_chat_template([asked.as_dict(), answered.as_dict()], tokenize=False)
    assert any("kept as plain text (row)" in note for note in made.report.notes)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_special_tokens_in_text_leave_the_labels_right(kind: str, backends: dict[str, Tokenizer]) -> None:
    """The other tokens of the row keep their places, whatever the tokenizer puts at the start of a text."""
    tokenizer = dressed(backends[kind], "qwen2_5")
    made = labels(tokenizer, Message("user", "what <|im_start|> is"), Message("assistant", "it starts <|im_start|> turns")).examples[0]
    assert made.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3, "system, user and assistant each open once"
    trained = tokenizer.decode([label for label in made.labels if label != -100])
    assert trained.replace(" ", "").lower().startswith("itstarts<|im_start|>turns") and trained.endswith("<|im_end|>")


def test_backslash_and_quotes_come_through(chatml: Any) -> None:
    """\\boxed and quotes are text, not template code."""
    answer = 'so \\boxed{4} and "x" {{ bos_token }} {% raw %}'
    _, trained, _ = chat(chatml, ASK, Message("assistant", answer))
    assert trained == [answer + "<|im_end|>"]


def test_template_file_with_windows_line_ends_and_mark(tmp_path: Path, chatml: Any) -> None:
    """CRLF and a byte order mark in a .jinja file change nothing."""
    for content in (source_of("phi3").encode(), b"\xef\xbb\xbf" + source_of("phi3").replace("\n", "\r\n").encode()):
        path = tmp_path / "template.jinja"
        path.write_bytes(content)
        with from_tokenizer(chatml, path) as template:
            assert template.render([ASK, ANSWER]) == "<|user|>\nwhat is it<|end|>\n<|assistant|>\na thing<|end|>\n<|im_end|>"
    with pytest.raises(ModelError, match="E-MODEL-066"):
        from_tokenizer(chatml, tmp_path / "nothing.jinja")


def test_the_date_can_be_kept(backends: dict[str, Tokenizer]) -> None:
    """A resumed run gives the time back and renders what the first one rendered."""
    then = datetime.datetime(2025, 3, 9, 12)
    with from_tokenizer(dressed(backends["bpe"], "llama3_2"), now=then) as template:
        assert "Today Date: 09 Mar 2025" in template.render([ASK, ANSWER]) and template.tells_time


def test_a_model_without_a_template_trains_on_prompt_and_completion(chatml: Any) -> None:
    """Plain text and the end token; a chat is refused with the way out."""
    tokenizer = dressed(chatml.backend_tokenizer, "qwen2_5")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="--template"):
        from_tokenizer(tokenizer)
    sample = Conversation((Message("user", "one plus one is"), Message("assistant", " two")), "row", 0, chat=False)
    with from_tokenizer(tokenizer, shape="prompt-completion") as template:
        made = template.spans_of([sample])[0]
        assert made.text == "one plus one is two<|im_end|>" and [made.text[a:b] for a, b in made.spans] == [" two<|im_end|>"]
        with pytest.raises(DataError, match="E-DATA-063"):
            tokenize([Conversation((ASK, ANSWER), "row", 0)], tokenizer, template, CONFIG)


def test_the_template_refuses_a_conversation(backends: dict[str, Tokenizer]) -> None:
    """Gemma takes no system message: the row is named, with the template's words."""
    with pytest.raises(DataError) as caught:
        labels(dressed(backends["bpe"], "gemma"), Message("system", "be kind"), ASK, ANSWER)
    assert caught.value.code == "E-DATA-063" and "System role not supported" in caught.value.found


# --- limits

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "loops": (LOOP, "E-MODEL-061"),
    "long power": ("{{ 9 ** (9 ** 9) }}", "E-MODEL-061"),
    "memory": ("{% set x = 'a' * 500000000 %}{{ x | length }}", "E-MODEL-062"),
    "list": ("{% set x = [0] * 90000000 %}{{ x | length }}", "E-MODEL-062"),
    "output": ("{% for a in range(9999) %}{{ 'abcdefghij' * 20 }}{% endfor %}", "E-MODEL-063"),
    "syntax": ("{% for %}", "E-MODEL-064"),
}


def test_bombs_end_within_seconds_and_leave_no_process() -> None:
    """Loops, powers, big strings and lists, long output, broken syntax: a named error each, and no orphan.  (S6)"""
    for name, (source, code) in BOMBS.items():
        template = Template(source, {})
        began = time.monotonic()
        with pytest.raises(ModelError) as caught:
            template.render([ASK])
        assert caught.value.code == code, (name, str(caught.value))
        assert time.monotonic() - began < 30
        assert template.process.pid is None


def test_a_broken_limit_does_not_spoil_the_next_render() -> None:
    """The worker is started anew."""
    with Template("{% if messages[0].content == 'stop' %}" + LOOP + "{% endif %}{{ messages[0].content }}", {}) as template:
        assert template.render([ASK]) == "what is it"
        with pytest.raises(ModelError, match="E-MODEL-061"):
            template.render([Message("user", "stop")])
        assert template.render([ASK]) == "what is it"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}", "{{ raise_exception.__globals__ }}", "{{ dict.__class__ }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ messages.append(1) }}", "{{ (messages | attr('__class__')).__base__ }}", "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}", "{{ joiner.__init__.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ ''.format.__globals__ }}", "{{ '{0.__class__}'.format(1) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    """Attribute walks, globals, includes and changes of its input give an error or nothing.  (S6)"""
    with Template(source, {}) as template:
        try:
            text = template.render([ASK])
        except DataError as refusal:
            assert refusal.code == "E-DATA-063"
        else:
            assert "class" not in text and "os" not in text and "uid" not in text


def test_the_worker_loads_neither_torch_nor_transformers_and_ends_with_its_parent() -> None:
    """It is a small process, and it does not outlive a parent that is killed in the middle of an endless loop."""
    script = f"""
import os, sys
from halfbyte.data.template_process import TemplateProcess
made = TemplateProcess({LOOP!r} if len(sys.argv) > 1 else "x", {{}}, "2025-01-01T00:00:00")
made._started()
print(made.pid, flush=True)
made.render([{{"messages": []}}])
"""
    process = subprocess.Popen([sys.executable, "-c", script, "loop"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    maps = Path(f"/proc/{worker}/maps")
    loaded = maps.read_text() if maps.exists() else ""
    process.kill()
    process.wait()
    process.stdout.close()
    assert "torch" not in loaded and "tokenizers" not in loaded
    until = time.monotonic() + 20
    while _alive(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")
