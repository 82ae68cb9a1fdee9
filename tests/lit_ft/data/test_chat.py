"""What of a conversation is trained on, token by token, and that prompts are what a server would build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_ft.batches import Example
from lit_ft.data.chat import ChatEncoder, set_chat_template, show
from lit_ft.data.formats import Record, RowError, to_record
from lit_ft.errors import UserError
from tests import tiny

EOS = "<|im_end|>"
BOS_CHATML = "{{ '<|endoftext|>' }}" + tiny.CHATML
# As SmolLM2's: a system turn of its own where there is none.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + tiny.CHATML
)
# As Qwen3's: what the assistant thought is left out of earlier turns.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral's: strict about the order of turns, and nothing that opens the answer.
STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + '<|im_end|>' }}{% endfor %}"
)


def chat(*texts: str) -> list[dict[str, str]]:
    """Turns of a user and an assistant, alternating."""
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def with_template(template: str) -> Any:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def text_of(tokenizer: Any, example: Example) -> str:
    """Everything, the trained part between ⟦ and ⟧, written here without the function under test."""
    out = tokenizer.decode(example.prompt)
    for completion in example.completions:
        trained = False
        for token, mask in zip(completion.ids, completion.mask, strict=True):
            if mask != trained:
                out += "⟦" if mask else "⟧"
                trained = mask
            out += tokenizer.decode([token])
        out += "⟧" if trained else ""
    return out


def encode(tokenizer: Any, row: dict[str, Any], **options: Any) -> str:
    record = to_record(row, "preference" if "chosen" in row else "sft")
    assert record is not None
    return text_of(tokenizer, ChatEncoder(tokenizer, **options).encode(record))


ONE = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("Hi", "Hello.")},
        {"messages": chat("Hi", "Hello.", "and then?")},  # a question without an answer teaches nothing
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": chat("Hi"), "completion": chat("", "Hello.")[1:]},
        {"prompt": chat("Hi"), "completion": chat("", "Hello.", "and then?")[1:]},
        {"instruction": "Hi", "output": "Hello."},
    ],
)
def test_every_format_trains_on_the_answer_and_its_end(tokenizer: Any, row: dict[str, Any]) -> None:
    assert encode(tokenizer, row) == ONE


def test_all_assistant_turns_are_trained_on_and_nothing_else(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "S"}, *chat("Hi", "Hello.", "So?", "So.")]
    assert encode(tokenizer, {"messages": messages}) == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧"
    )


def test_a_prompt_of_several_turns_is_not_trained_on(tokenizer: Any) -> None:
    assert encode(tokenizer, {"prompt": chat("Hi", "Hello.", "So?"), "completion": "So."}) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧"
    )


def test_a_completion_of_several_turns(tokenizer: Any) -> None:
    row = {"prompt": chat("Hi"), "completion": chat("", "Hello.", "So?", "So.")[1:]}
    assert encode(tokenizer, row) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧"
    )


def test_two_answers_in_a_row(tokenizer: Any) -> None:
    messages = [*chat("Hi", "Hello."), {"role": "assistant", "content": "Anyone?"}]
    assert encode(tokenizer, {"messages": messages}) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>assistant\n⟦Anyone?<|im_end|>⟧"
    )


def test_train_on_all(tokenizer: Any) -> None:
    # The first token is the prompt: nothing stands before it that could predict it.
    assert encode(tokenizer, {"messages": chat("Hi", "Hello.")}, train_on="all") == (
        "<|im_start|>⟦user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>⟧"
    )
    assert encode(tokenizer, {"prompt": "Hi", "completion": "Hello."}, train_on="all") == (
        "<|im_start|>⟦user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>⟧"
    )
    assert encode(tokenizer, {"prompt": "Hi", "completion": "!"}, train_on="all", as_chat=False) == "H⟦i!<|im_end|>⟧"


def test_preferences_share_their_prompt(tokenizer: Any) -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧⟦No.<|im_end|>⟧"
    assert encode(tokenizer, {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}) == expected
    # Both completions have the same prompt, so "all" cannot mean it.
    assert encode(tokenizer, {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, train_on="all") == expected
    pair = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    assert encode(tokenizer, pair) == expected


def test_plain_strings_without_a_template() -> None:
    bare = tiny.tokenizer(chat=False)
    assert encode(bare, {"prompt": "Q: Hi A:", "completion": " Hello."}) == "Q: Hi A:⟦ Hello.<|im_end|>⟧"
    assert encode(bare, {"prompt": "Hi", "chosen": " a", "rejected": " b"}) == "Hi⟦ a<|im_end|>⟧⟦ b<|im_end|>⟧"
    assert encode(bare, {"text": "Once upon"}) == "O⟦nce upon<|im_end|>⟧"
    assert encode(bare, {"text": "Once upon" + EOS}) == "O⟦nce upon<|im_end|>⟧"  # not twice
    assert encode(bare, {"text": "x"}) == "x⟦<|im_end|>⟧"


def test_text_stays_text_with_a_template(tokenizer: Any) -> None:
    assert encode(tokenizer, {"text": "Once"}) == "O⟦nce<|im_end|>⟧"
    assert encode(tokenizer, {"prompt": "Hi", "completion": "!"}, as_chat=False) == "Hi⟦!<|im_end|>⟧"


def with_first_token(eos_too: bool = False) -> Any:
    """A tokenizer that begins every text with a token, as Llama's, and may end it with one."""
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer(chat=False)
    end = f" {EOS}" if eos_too else ""
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<|endoftext|> $A{end}", special_tokens=[("<|endoftext|>", 0), (EOS, made.eos_token_id)]
    )
    return made


@pytest.mark.parametrize("eos_too", [False, True])
def test_a_tokenizers_first_token_stands_once(eos_too: bool) -> None:
    made = with_first_token(eos_too)
    assert encode(made, {"prompt": "Hi", "completion": " you"}) == "<|endoftext|>Hi⟦ you<|im_end|>⟧"
    assert encode(made, {"text": "Once"}) == "<|endoftext|>⟦Once<|im_end|>⟧"
    made.chat_template = BOS_CHATML
    assert encode(made, {"prompt": "Hi", "completion": "Hello."}) == "<|endoftext|>" + ONE
    assert encode(made, {"messages": chat("Hi", "Hello.")}) == "<|endoftext|>" + ONE


PLAIN = (Path(__file__).parents[3] / "lit_ft" / "data" / "templates" / "plain.jinja").read_text()


@pytest.mark.parametrize("template", [tiny.CHATML, BOS_CHATML, DEFAULT_SYSTEM, FORGETFUL, STRICT, PLAIN])
def test_the_prompt_is_what_a_server_builds(template: str) -> None:
    made = with_template(template)
    encoder = ChatEncoder(made)
    for before in (chat("Hi"), chat("Hi", "Hello.", "So?")):
        server = made.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        example = encoder.encode(Record(before, ("So.",)))
        assert list(example.prompt) == server
        completion = example.completions[0]
        assert all(completion.mask)
        assert completion.ids[-1] == made.eos_token_id
        assert made.decode(completion.ids).endswith("So." + EOS)
    server = made.apply_chat_template(chat("Hi"), add_generation_prompt=True, return_dict=False)
    assert list(encoder.encode(Record([], (chat("Hi", "Hello."),))).prompt) == server


def test_qwen3_conversations_are_trained_with_trls_version_of_its_template() -> None:
    import trl

    made = tiny.tokenizer()
    made.chat_template = Path(trl.__file__).with_name("chat_templates").joinpath("qwen3.jinja").read_text("utf-8")
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
    example = ChatEncoder(made).encode(Record([], (turns,)))
    (completion,) = example.completions
    trained = made.decode([i for i, kept in zip(completion.ids, completion.mask, strict=True) if kept])
    think = "<think>\n\n</think>\n\n"
    assert trained == f"{think}1<|im_end|>{think}2<|im_end|>"
    assert "two?" in made.decode(completion.ids), "the second question is there, untrained"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    made = with_template(FORGETFUL)
    with pytest.raises(UserError, match=r"writes an earlier turn differently.*data\.chat_template=FILE, or chatml"):
        encode(made, {"messages": chat("Hi", "Hello.", "So?", "So.")})
    # One turn is not rewritten, and what the template adds to it is part of the answer.
    assert encode(made, {"messages": chat("Hi", "Hello.")}) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧"
    )


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, BOS_CHATML, tiny.CHATML])
def test_a_conversation_that_the_assistant_begins(template: str) -> None:
    first = {DEFAULT_SYSTEM: "<|im_start|>system\nBe good.<|im_end|>\n", BOS_CHATML: "<|endoftext|>"}.get(template, "")
    messages = [{"role": "assistant", "content": "Hello."}, *chat("Hi", "So.")]
    assert encode(with_template(template), {"messages": messages}) == (
        first + "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧"
    )


def test_turns_that_the_template_refuses_are_a_rows_mistake() -> None:
    made = with_template(STRICT)
    assert (
        encode(made, {"messages": chat("Hi", "a", "b", "c")})
        == "[INST] Hi [/INST]⟦a<|im_end|>⟧[INST] b [/INST]⟦c<|im_end|>⟧"
    )
    for messages in ([{"role": "system", "content": "S"}, *chat("Hi", "a")], [*chat("Hi"), *chat("So?", "a")]):
        with pytest.raises(RowError, match=r"refused by the chat template \(roles must alternate\)"):
            encode(made, {"messages": messages})
    quiet = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(RowError, match="begun by the assistant"):
        encode(with_template(quiet), {"messages": [*chat("", "a")[1:], *chat("b", "c")]})


def test_a_template_with_a_mistake_names_the_line() -> None:
    with pytest.raises(UserError, match="The chat template has a mistake in line 2"):
        encode(with_template("{{ 'a' }}\n{% for m in %}"), {"prompt": "Hi", "completion": "a"})


def test_an_answer_without_an_end_in_the_template_gets_one() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    made = with_template(template)
    assert encode(made, {"messages": chat("Hi", "a", "b", "c")}) == (
        "user: Hi\nassistant: ⟦a\n⟧user: b\nassistant: ⟦c\n<|im_end|>⟧"
    )


def test_without_a_template_conversations_are_refused() -> None:
    bare = tiny.tokenizer(chat=False)
    rows: list[dict[str, Any]] = [
        {"messages": chat("Hi", "Hello.")},
        {"prompt": chat("Hi"), "completion": "Hello."},
        {"instruction": "Hi", "output": "Hello."},
        {"prompt": "Hi", "chosen": chat("", "a")[1:], "rejected": chat("", "b")[1:]},
    ]
    for row in rows:
        with pytest.raises(UserError, match=r"no chat template\. Choose one with data\.chat_template=chatml"):
            encode(bare, row)
    with pytest.raises(UserError, match="no chat template"):
        encode(bare, {"prompt": "Hi", "completion": "a"}, as_chat=True)


def test_without_an_end_token_nothing_can_be_taught() -> None:
    made = tiny.tokenizer()
    made.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        ChatEncoder(made)


def test_nothing_to_train_on(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    with pytest.raises(RowError, match="no assistant turn"):
        encoder.encode(Record([], (chat("Hi"),)))
    with pytest.raises(RowError, match="does not end with a user's turn"):
        encoder.encode(Record(chat("Hi", "Hello."), ("So.",)))
    with pytest.raises(RowError, match="nothing to train on"):
        encoder.encode(Record(chat("Hi"), (chat("", "a")[1:], chat("b"))))  # one of the two would be empty


def test_set_chat_template(tmp_path: Path) -> None:
    made = tiny.tokenizer(chat=False)
    set_chat_template(made, None)
    assert not made.chat_template
    set_chat_template(made, "chatml")
    assert encode(made, {"messages": chat("Hi", "Hello.")}) == ONE
    set_chat_template(made, "plain")
    system = [{"role": "system", "content": "S"}]
    assert encode(made, {"messages": [*system, *chat("Hi", "a", "b", "c")]}) == (
        "S\nUser: Hi\nAssistant: ⟦a<|im_end|>⟧\nUser: b\nAssistant: ⟦c<|im_end|>⟧"
    )
    (tmp_path / "mine.jinja").write_text(STRICT, encoding="utf-8")
    set_chat_template(made, str(tmp_path / "mine.jinja"))
    assert encode(made, {"messages": chat("Hi", "a")}) == "[INST] Hi [/INST]⟦a<|im_end|>⟧"
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        set_chat_template(made, str(tmp_path / "latin.jinja"))
    for bad in ("chatlm", str(tmp_path), str(tmp_path / "missing.jinja")):
        with pytest.raises(UserError, match=r"no such file, and not one of the built-in ones \(chatml, plain\)"):
            set_chat_template(made, bad)


def test_special_tokens_in_a_message_stay_in_their_turn(tokenizer: Any) -> None:
    """A message that spells a special token is trained on no differently from others."""
    assert encode(tokenizer, {"messages": chat("<|im_end|>", "a<|im_end|>b")}) == (
        "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>b<|im_end|>⟧"
    )


def test_show_marks_the_trained_parts(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    for record in (
        Record([], (chat("Hi", "Hello.", "So?", "So."),)),
        Record("Hi", ("Hello.", "No.")),
        Record("", ("Once upon a time",)),
    ):
        example = encoder.encode(record)
        assert show(tokenizer, example) == text_of(tokenizer, example)


def test_counts_and_the_index(tokenizer: Any) -> None:
    example = ChatEncoder(tokenizer).encode(Record("Hi", ("Hello.", "No.")), index=7)
    # <|im_start|> "user\n" "Hi" <|im_end|> "\n" <|im_start|> "assistant\n": one token per byte or special token.
    prompt = 1 + 5 + 2 + 1 + 1 + 1 + 10
    assert (example.index, len(example.prompt)) == (7, prompt)
    assert example.tokens == prompt + 7 + 4
    assert example.longest == prompt + 7
    assert example.targets == 7 + 4
