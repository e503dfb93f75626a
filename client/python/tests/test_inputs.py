"""The forms in which items come, and what is no item."""

import pickle

import grpc
import pytest

import plumb_client
from plumb_client import PATIENT, Client, InvalidArgumentError, Text, Tls, TokenIds, UnavailableError, aio, inputs
from plumb_client._proto import common_pb2
from plumb_client.errors import FieldViolation
from plumb_client.transcript import turns


def conversation(*turns):
    messages = [common_pb2.Message(role=role, content=content) for role, content in turns]
    return common_pb2.Input(conversation=common_pb2.Conversation(messages=messages))


def ids(*values, response_start=None):
    return common_pb2.Input(token_ids=common_pb2.TokenIds(ids=values, response_start=response_start))


class Frame:
    """As a data frame, which iterates over the names of its columns."""

    columns = ("prompt", "response")

    def __iter__(self):
        return iter(self.columns)


class Index:
    """As an integer of numpy."""

    def __index__(self):
        return 7

    __int__ = __index__


class Half:
    """As an element of torch, which has `__index__` whatever it holds."""

    def __index__(self):
        raise TypeError("only integer tensors can be converted to an index")

    def __int__(self):
        return 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("a", common_pb2.Input(text="a")),
        (Text("a"), common_pb2.Input(text="a")),
        (("q", "a"), conversation(("user", "q"), ("assistant", "a"))),
        (([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "a"),
         conversation(("system", "s"), ("user", "q"), ("assistant", "a"))),
        ([{"role": "user", "content": "q", "tree": 1, "tool_calls": []}], conversation(("user", "q"))),
        ([1, 2], ids(1, 2)),
        ((1, 2), ids(1, 2)),
        ([Index()], ids(7)),
        (TokenIds([1, 2], response_start=0), ids(1, 2, response_start=0)),
    ],
)  # fmt: skip
def test_items(item, message):
    assert inputs.item(item) == message


def test_a_prompt_that_is_a_string_is_the_users_turn():
    assert inputs.item("q", is_prompt=True) == conversation(("user", "q"))
    assert inputs.item(Text("q"), is_prompt=True) == common_pb2.Input(text="q")


@pytest.mark.parametrize(
    "item",
    [
        *(None, 1, b"a", [], {}, {"text": "a"}, ["q", "a"], ("q", None), ("q", "a", "b"), [{"role": "user"}], [1, "a"]),
        [Half()],
        TokenIds([0.5]),
        (["q"], "a"),
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}],
    ],
)
def test_what_is_no_item_is_refused_before_anything_is_sent(item):
    with pytest.raises(TypeError):
        inputs.item(item)


@pytest.mark.parametrize("kind", [Client, aio.Client])
def test_options_are_checked(kind):
    client = kind("127.0.0.1:1")
    bad = [
        (TypeError, lambda: client.score_stream(["a"], colour="red")),
        (ValueError, lambda: client.score_stream(["a"], objective="loudness")),
        (ValueError, lambda: client.score_stream(["a"], version=1, label="canary")),
        (ValueError, lambda: client.score_stream(["a"], on_error="ignore")),
        (ValueError, lambda: client.score_stream(["a"], batch_size=0)),
        (TypeError, lambda: client.score_stream("a text")),
        (TypeError, lambda: client.score_stream(("q", "a"))),
        (TypeError, lambda: client.score_stream({"text": ["a"]})),
        (TypeError, lambda: client.score_stream(Frame())),
        (TypeError, lambda: client.generate_stream("a", colour="red")),
        (ValueError, lambda: kind([])),
        (ValueError, lambda: kind("127.0.0.1:1,")),
        (ValueError, lambda: kind(concurrency=0)),
    ]
    for error, call in bad:
        with pytest.raises(error):
            call()


def test_the_environment_is_that_of_the_command(monkeypatch):
    assert Client()._options.targets == ("http://127.0.0.1:50051",)
    variables = {
        "PLUMB_SERVER": "http://a:1,https://b:2",
        "PLUMB_API_KEY": "secret",
        "PLUMB_CLIENT_ID": "me",
        "PLUMB_MODEL": "pm",
        "PLUMB_MAX_RETRIES": "0",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = Client()._options
    assert options.targets == ("http://a:1", "https://b:2")
    assert options.metadata() == (("authorization", "Bearer secret"), ("x-client-id", "me"))
    assert (options.model, options.retry.max_attempts) == ("pm", 1)
    assert "secret" not in repr(options)
    given = Client("c:3", api_key="other", client_id="you", model="lm", retries=1)._options
    assert given.targets == ("c:3",)
    assert given.metadata() == (("authorization", "Bearer other"), ("x-client-id", "you"))
    assert (given.model, given.retry.max_attempts) == ("lm", 2)


@pytest.mark.parametrize(
    "given", ["http://a:1,http://b:2", "http://a:1, http://b:2 ", "http://a:1;http://b:2", "http://a:1 http://b:2"]
)
def test_several_targets_in_one_string(given):
    assert Client(given)._options.targets == ("http://a:1", "http://b:2")
    assert Client([" http://a:1", "http://b:2"])._options.targets == ("http://a:1", "http://b:2")


def test_certificates_of_the_environment_are_for_https_alone(monkeypatch, tmp_path):
    (tmp_path / "ca.pem").write_text("authorities")
    monkeypatch.setenv("PLUMB_CA_CERT", str(tmp_path / "ca.pem"))
    asked = []
    monkeypatch.setattr(Tls, "channel_credentials", lambda tls: asked.append(tls.ca) or "secured")
    options = Client("http://a:1,https://b:2,c:3")._options
    assert [(address, tls) for address, tls, _ in options.channels()] == [
        ("a:1", None),
        ("b:2", "secured"),
        ("c:3", None),
    ]
    assert asked == [b"authorities"]


@pytest.mark.parametrize("kind", [Client, aio.Client])
def test_a_patient_client(kind, monkeypatch):
    patient = kind.patient("a:1", client_id="me")._options
    assert (patient.timeout, patient.retry, patient.client_id) == (600.0, PATIENT, "me")
    given = kind.patient("a:1", timeout=None, retries=1)._options
    assert (given.timeout, given.retry.max_attempts) == (None, 2)
    monkeypatch.setenv("PLUMB_MAX_RETRIES", "7")
    assert kind.patient("a:1")._options.retry.max_attempts == 8


def test_clients_and_errors_go_to_other_processes():
    client = Client(["a:1", "b:2"], api_key="secret", timeout=None, credentials=Tls(ca=b"x"))
    assert pickle.loads(pickle.dumps(client))._options == client._options
    with pytest.raises(TypeError, match="Tls"):
        pickle.dumps(Client("a:1", credentials=grpc.ssl_channel_credentials()))
    error = InvalidArgumentError("why", details=(FieldViolation("f", "d"),), retry_after=1.0, attempts=2, index=3)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InvalidArgumentError
    assert str(again) == str(error) == "item 3: INVALID_ARGUMENT: why (after 2 tries)"
    assert vars(again) == vars(error)
    other = error.of_item(7)
    assert (other.index, error.index, other.attempts, type(other)) == (7, 3, 2, InvalidArgumentError)
    assert not error.retryable
    assert UnavailableError("why").retryable


def test_methods_say_what_they_take():
    for kind in (Client, aio.Client):
        assert "Orders candidate responses" in kind.rank.__doc__
        assert kind.rank.__name__ == "rank"
    public = [name for name in plumb_client.__all__ if not hasattr(plumb_client, name)]
    assert not public


@pytest.mark.parametrize(
    ("transcript", "said"),
    [
        ("hello", [("user", "hello")]),
        ("Human: hi\n\nAssistant: ho", [("user", "hi"), ("assistant", "ho")]),
        ("\n\nHuman: hi\n\nAssistant: ho\n\nHuman: ha", [("user", "hi"), ("assistant", "ho"), ("user", "ha")]),
        ("hi\n\nASSISTANT:  ho \n\nHUMAN:  ha", [("user", "hi"), ("assistant", "ho"), ("user", "ha")]),
        ("hi\n\n\nAssistant: ho", [("user", "hi"), ("assistant", "ho")]),
        # Paragraphs of a turn stay together, and a marker in running text is text.
        (
            "a\n\nb\n\nAssistant: c\nHuman: d\n\nsays Human: e",
            [("user", "a\n\nb"), ("assistant", "c\nHuman: d\n\nsays Human: e")],
        ),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", [("user", "a"), ("user", "b"), ("assistant", "")]),
    ],
)
def test_transcripts(transcript, said):
    assert [(turn["role"], turn["content"]) for turn in turns(transcript)] == said
