from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChatFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHAT_FORMAT_UNSPECIFIED: _ClassVar[ChatFormat]
    CHAT_FORMAT_TEMPLATE: _ClassVar[ChatFormat]
    CHAT_FORMAT_HUMAN_ASSISTANT: _ClassVar[ChatFormat]

class HhhPrompt(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HHH_PROMPT_UNSPECIFIED: _ClassVar[HhhPrompt]
    HHH_PROMPT_NONE: _ClassVar[HhhPrompt]
    HHH_PROMPT_FULL: _ClassVar[HhhPrompt]
    HHH_PROMPT_SHORT: _ClassVar[HhhPrompt]

class Truncation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_UNSPECIFIED: _ClassVar[Truncation]
    TRUNCATION_REFUSE: _ClassVar[Truncation]
    TRUNCATION_LEFT: _ClassVar[Truncation]
    TRUNCATION_RIGHT: _ClassVar[Truncation]

class Objective(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OBJECTIVE_UNSPECIFIED: _ClassVar[Objective]
    OBJECTIVE_MEAN_LOG_PROB: _ClassVar[Objective]
    OBJECTIVE_SUM_LOG_PROB: _ClassVar[Objective]
    OBJECTIVE_MUTUAL_INFORMATION: _ClassVar[Objective]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
CHAT_FORMAT_UNSPECIFIED: ChatFormat
CHAT_FORMAT_TEMPLATE: ChatFormat
CHAT_FORMAT_HUMAN_ASSISTANT: ChatFormat
HHH_PROMPT_UNSPECIFIED: HhhPrompt
HHH_PROMPT_NONE: HhhPrompt
HHH_PROMPT_FULL: HhhPrompt
HHH_PROMPT_SHORT: HhhPrompt
TRUNCATION_UNSPECIFIED: Truncation
TRUNCATION_REFUSE: Truncation
TRUNCATION_LEFT: Truncation
TRUNCATION_RIGHT: Truncation
OBJECTIVE_UNSPECIFIED: Objective
OBJECTIVE_MEAN_LOG_PROB: Objective
OBJECTIVE_SUM_LOG_PROB: Objective
OBJECTIVE_MUTUAL_INFORMATION: Objective
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority

class ModelSpec(_message.Message):
    __slots__ = ("name", "version", "label")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    label: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., label: _Optional[str] = ...) -> None: ...

class ModelIdentity(_message.Message):
    __slots__ = ("name", "version", "weights_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    weights_digest: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., weights_digest: _Optional[str] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids", "response_start")
    IDS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_START_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    response_start: int
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., response_start: _Optional[int] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("conversation", "text", "token_ids")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    conversation: Conversation
    text: str
    token_ids: TokenIds
    def __init__(self, conversation: _Optional[_Union[Conversation, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class TextOptions(_message.Message):
    __slots__ = ("chat_format", "hhh_prompt", "truncation", "max_tokens")
    CHAT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    HHH_PROMPT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    chat_format: ChatFormat
    hhh_prompt: HhhPrompt
    truncation: Truncation
    max_tokens: int
    def __init__(self, chat_format: _Optional[_Union[ChatFormat, str]] = ..., hhh_prompt: _Optional[_Union[HhhPrompt, str]] = ..., truncation: _Optional[_Union[Truncation, str]] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("total_ns", "tokenize_ns", "queue_ns", "inference_ns")
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_NS_FIELD_NUMBER: _ClassVar[int]
    total_ns: int
    tokenize_ns: int
    queue_ns: int
    inference_ns: int
    def __init__(self, total_ns: _Optional[int] = ..., tokenize_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., inference_ns: _Optional[int] = ...) -> None: ...

class ItemError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...
