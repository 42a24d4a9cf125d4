"""Examples for training, and prompts for chatting, of the same conversations."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tokenizers_made import INST, STRICT, with_bos

from corolla.data.conversation import Conversation, Turn
from corolla.data.render import NO_LOSS, Example, Renderer, RenderSettings
from corolla.data.replies import ReplyReader
from corolla.errors import BundleError, UsageError

DELIMITER = "\n-----\n"
# In the byte tokenizer a letter is a token and the delimiter is 7 of them.
WORDS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=30)


def said(*texts: str) -> tuple[Turn, ...]:
    """A user and an assistant by turns, the user first; `!` at the end keeps a reply from being learnt."""
    return tuple(
        Turn("assistant" if index % 2 else "user", text.rstrip("!"), learn=not text.endswith("!"))
        for index, text in enumerate(texts)
    )


def learnt(example: Example, tokenizer: Any) -> str:
    """What carries loss; tokens without stand as one dot together."""
    text, previous = "", None
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, NO_LOSS)
        if label == token:
            text += tokenizer.decode([token])
        elif previous != NO_LOSS:
            text += "·"
        previous = label
    return text


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = [Turn("system", draw(WORDS))] if draw(st.booleans()) else []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=2, max_size=14))
    turns += [Turn(role, draw(WORDS), learn=draw(st.integers(0, 4)) > 0) for role in roles]
    return Conversation(tuple(turns), "c")


# --- what carries loss ------------------------------------------------------------------------------------


def test_replies_and_their_delimiters_carry_loss(bos: Any) -> None:
    turns = said("Hi", "Ho", "What?", "Nothing", "Bye")
    (example,) = Renderer(bos, RenderSettings()).examples(Conversation(turns, "c"))
    assert learnt(example, bos) == f"·Ho{DELIMITER}·Nothing{DELIMITER}"
    assert bos.decode(example.input_ids) == f"<s>Hi{DELIMITER}Ho{DELIMITER}What?{DELIMITER}Nothing{DELIMITER}"
    kinds = {"context": "", "reply": "", "marker": ""}
    for token, kind in zip(example.input_ids, example.kinds, strict=True):
        kinds[kind] += bos.decode([token])
    assert kinds["reply"] == "HoNothing"
    assert kinds["marker"] == DELIMITER * 2
    assert example.conversation == "c"


def test_in_a_template_replies_and_their_end_carry_loss(smol: Any) -> None:
    turns = (Turn("system", "Be brief."), *said("Hi", "Ho", "What?", "Nothing"))
    (example,) = Renderer(smol, RenderSettings(style="template")).examples(Conversation(turns, "c"))
    assert learnt(example, smol) == "·Ho<|im_end|>\n·Nothing<|im_end|>\n"
    markers = [
        token for token, kind in zip(example.input_ids, example.kinds, strict=True) if kind == "marker"
    ]
    assert smol.decode(markers) == "<|im_end|>\n" * 2


def test_all_tokens_can_carry_loss(bos: Any) -> None:
    turns = (Turn("system", "Be brief."), *said("Hi", "Ho"))
    (example,) = Renderer(bos, RenderSettings(loss_on="all")).examples(Conversation(turns, "c"))
    assert learnt(example, bos) == f"·Be brief.{DELIMITER}Hi{DELIMITER}Ho{DELIMITER}"
    # What is evaluated as a reply is still only the reply.
    assert [kind for kind in example.kinds if kind == "reply"] == ["reply"] * 2


def test_context_replies_and_what_opens_a_conversation_are_not_learnt(bos: Any) -> None:
    renderer = Renderer(bos, RenderSettings())
    (example,) = renderer.examples(Conversation(said("Hi", "Ho!", "What?", "Nothing"), "c"))
    assert learnt(example, bos) == f"·Nothing{DELIMITER}"
    opened = (Turn("assistant", "Hello"), *said("Hi", "Ho"))
    (example,) = renderer.examples(Conversation(opened, "c"))
    assert learnt(example, bos) == f"·Ho{DELIMITER}"
    assert renderer.examples(Conversation(said("Hi", "Ho!"), "c")) == []
    assert renderer.examples(Conversation((Turn("assistant", "Hello"), Turn("user", "Hi")), "c")) == []


# --- long conversations -----------------------------------------------------------------------------------


@given(conversation=conversations(), max_length=st.integers(8, 150), everything=st.booleans())
def test_every_reply_is_learnt_once_in_windows_that_fit(
    bos: Any, conversation: Conversation, max_length: int, everything: bool
) -> None:
    settings = RenderSettings(max_length=max_length, loss_on="all" if everything else "replies")
    examples = Renderer(bos, settings).examples(conversation)
    first = 1 if conversation.turns[0].role == "system" else 0
    replies = [
        turn.text + DELIMITER
        for turn in conversation.turns[first + 1 :]
        if turn.role == "assistant" and turn.learn
    ]
    heard = []
    for example in examples:
        assert len(example.input_ids) == len(example.labels) == len(example.kinds) <= max_length
        assert example.input_ids[0] == bos.bos_token_id
        assert example.labels[0] == NO_LOSS
        assert any(kind != "context" for kind in example.kinds)
        run = ""
        for token, kind, label in zip(example.input_ids, example.kinds, example.labels, strict=True):
            assert kind == "context" or label == token
            if kind != "context":
                run += bos.decode([token])
                if run.endswith(DELIMITER):
                    heard.append(run)
                    run = ""
        if run:  # the reply was longer than the window
            heard.append(run)
    assert len(heard) == len(replies)
    for got, reply in zip(heard, replies, strict=True):
        assert got == reply if len(reply) <= max_length - 1 else reply.startswith(got)
    if everything:
        labels = sum(label != NO_LOSS for example in examples for label in example.labels)
        assert labels <= sum(len(turn.text) + len(DELIMITER) for turn in conversation.turns)


def test_a_long_conversation_becomes_windows_with_what_came_before(bos: Any) -> None:
    turns = (Turn("system", "S"), *said("1", "aaaa", "2", "bbbb", "3", "cccc", "4", "dddd"))
    settings = RenderSettings(delimiter="/", max_length=22)
    windows = Renderer(bos, settings).examples(Conversation(turns, "c"))
    assert [bos.decode(window.input_ids) for window in windows] == [
        "<s>S/1/aaaa/2/bbbb/",
        "<s>S/bbbb/3/cccc/4/dddd/",
    ]
    assert [learnt(window, bos) for window in windows] == ["·aaaa/·bbbb/", "·cccc/·dddd/"]


def test_with_loss_on_all_no_token_is_learnt_twice(bos: Any) -> None:
    turns = (Turn("system", "S"), *said("1", "aaaa", "2", "bbbb", "3", "cccc", "4", "dddd"))
    settings = RenderSettings(delimiter="/", max_length=22, loss_on="all")
    windows = Renderer(bos, settings).examples(Conversation(turns, "c"))
    assert [learnt(window, bos) for window in windows] == ["·S/1/aaaa/2/bbbb/", "·3/cccc/4/dddd/"]


def test_older_turns_fill_the_room_before_a_windows_replies(bos: Any) -> None:
    turns = said("1", "aa", "2", "b" * 12, "3", "c")
    windows = Renderer(bos, RenderSettings(delimiter="/", max_length=22)).examples(Conversation(turns, "c"))
    assert [bos.decode(window.input_ids) for window in windows] == [
        f"<s>1/aa/2/{'b' * 12}/",
        f"<s>2/{'b' * 12}/3/c/",
    ]


def test_what_does_not_fit_keeps_the_newest_and_the_whole_reply(bos: Any) -> None:
    renderer = Renderer(bos, RenderSettings(delimiter="/", max_length=12))

    def only(turns: tuple[Turn, ...]) -> str:
        (example,) = renderer.examples(Conversation(turns, "c"))
        return str(bos.decode(example.input_ids))

    assert only(said("abcdefghijklmn", "reply")) == "<s>klmn/reply/"
    assert only(said("abcdefghijklmn", "0123456789")) == "<s>0123456789/"
    # A reply that is too long keeps its beginning, and some of what it answers.
    assert only(said("abc", "0123456789xyz")) == "<s>c/012345678"
    system = Turn("system", "S!")
    assert only((system, *said("abcdefghijklmn", "reply"))) == "<s>S!/n/reply/"
    assert only((system, *said("abc", "reply6789"))) == "<s>/reply6789/"


# --- chatting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["delimiter", "template"])
@pytest.mark.parametrize("template", [None, INST, STRICT], ids=["smol", "inst", "strict"])
@given(data=st.data())
def test_a_chat_feeds_the_tokens_that_training_saw(
    smol: Any, template: str | None, style: str, data: st.DataObject
) -> None:
    tokenizer = with_bos(template) if template else smol
    turns = [Turn("system", data.draw(WORDS))] if data.draw(st.booleans()) else []
    renderer = Renderer(tokenizer, RenderSettings(style=style, max_length=4000))
    own: list[list[int]] = []
    for user, reply in data.draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5)):
        turns.append(Turn("user", user))
        fed = renderer.prompt_ids(turns, own)
        turns.append(Turn("assistant", reply))
        (trained,) = renderer.examples(Conversation(tuple(turns), "c"))
        assert trained.input_ids[: len(fed)] == fed
        # Now the model speaks; what it should say is what carries loss in training.
        spoken = [
            token
            for token, kind in zip(trained.input_ids[len(fed) :], trained.kinds[len(fed) :], strict=True)
            if kind == "reply"
        ]
        assert spoken
        assert read(renderer, [*spoken, *renderer.stop_ids]).strip() == reply
        own.append(spoken)
        assert trained.input_ids == renderer.ids(turns, own) == [*fed, *spoken, *renderer.closing_ids]
        assert renderer.closing_ids[: len(renderer.stop_ids)] == renderer.stop_ids


def read(renderer: Renderer, ids: list[int]) -> str:
    reader = ReplyReader.of(renderer, renderer.end_ids)
    for token in ids:
        if not reader.ended:
            reader.push(token)
    if not reader.ended:
        reader.finish()
    return reader.text


def test_a_reply_ends_at_its_delimiter_in_whatever_tokens(smol: Any) -> None:
    renderer = Renderer(smol, RenderSettings())
    ids = smol("All well.", add_special_tokens=False).input_ids
    assert read(renderer, ids) == "All well."
    assert read(renderer, [*ids, *renderer.stop_ids, *ids]) == "All well."
    apart = [token for piece in ("\n", "--", "---", "\n") for token in smol(piece).input_ids]
    assert apart != renderer.stop_ids
    assert read(renderer, [*ids, *apart]) == "All well."
    assert (renderer.stop_text, smol.decode(renderer.stop_ids)) == (DELIMITER, DELIMITER)
    assert read(renderer, []) == ""


def test_a_delimiter_of_only_a_template_is_plain_text_there(smol: Any) -> None:
    renderer = Renderer(smol, RenderSettings(style="template"))
    ids = smol(f"one{DELIMITER}two", add_special_tokens=False).input_ids
    assert read(renderer, [*ids, *renderer.stop_ids]) == f"one{DELIMITER}two"


# --- settings ---------------------------------------------------------------------------------------------


def test_settings_survive_being_saved() -> None:
    settings = RenderSettings(style="template", delimiter="|", loss_on="all", max_length=99, spaced=True)
    assert RenderSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"style": "free"}, "--style is 'free'; it must be delimiter or template"),
        ({"loss_on": "none"}, "--loss-on is 'none'; it must be replies or all"),
        ({"max_length": 7}, "--max-length is 7; examples need at least 8 tokens"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RenderSettings(**changed)
    with pytest.raises(BundleError, match="not valid"):
        RenderSettings.from_dict({**RenderSettings().to_dict(), **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_length": "256"}, "max_length is '256'; it must be a whole number"),
        ({"style": None}, "style is None; it must be a text"),
        ({"new": 1}, "not of a form"),
    ],
)
def test_saved_settings_of_another_form_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        RenderSettings.from_dict({**RenderSettings().to_dict(), **changed})
