"""A server that does what a test says, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2

from plumb_client._proto import generation_pb2, models_pb2, preference_pb2, tokens_pb2, wire_pb2

REQUESTS = {
    "/plumb.v1.Preference/Score": preference_pb2.ScoreRequest,
    "/plumb.v1.Preference/Rank": preference_pb2.RankRequest,
    "/plumb.v1.Generation/Generate": generation_pb2.GenerateRequest,
    "/plumb.v1.Models/ListModels": models_pb2.ListModelsRequest,
    "/plumb.v1.Models/GetModel": models_pb2.GetModelRequest,
    "/plumb.v1.Tokens/Tokenize": tokens_pb2.TokenizeRequest,
    "/grpc.health.v1.Health/Check": wire_pb2.HealthCheckRequest,
}


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, behave: Callable[[Any, grpc.ServicerContext], Any]) -> None:
        self._behave = behave

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        streams = details.method.endswith("/Generate")
        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(self._behave, REQUESTS[details.method].FromString, lambda answer: answer.SerializeToString())


@contextmanager
def fake(behave: Callable[[Any, grpc.ServicerContext], Any], credentials: Any = None) -> Iterator[str]:
    """Address of a server that answers every call as `behave` does."""
    server = grpc.server(ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((_Handlers(behave),))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def scores(request: preference_pb2.ScoreRequest, context: Any = None) -> preference_pb2.ScoreResponse:
    """Rewards that are the texts' own numbers; what is no number has none."""
    answer = preference_pb2.ScoreResponse()
    for item in request.items:
        if item.text.isdigit():
            answer.results.add(score={"reward": float(item.text)})
        else:
            answer.results.add(error={"code": 3, "message": f"items[9]: {item.text}"})
    return answer


def versions(*numbers: int) -> Callable[[Any, Any], preference_pb2.ScoreResponse]:
    """Answers calls by one version after the other."""
    turns = iter(numbers)

    def behave(request: preference_pb2.ScoreRequest, context: Any) -> preference_pb2.ScoreResponse:
        answer = preference_pb2.ScoreResponse(model={"name": "pm", "version": next(turns)})
        for item in request.items:
            answer.results.add(score={"reward": len(item.text)})
        return answer

    return behave


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, *details: Any, pushback: str | None = None) -> None:
    """Ends a call with a status and messages of google.rpc."""
    metadata: list[tuple[str, str | bytes]] = []
    if details:
        status = wire_pb2.Status(code=code.value[0], message="no")
        for detail in details:
            name = f"type.googleapis.com/google.rpc.{detail.DESCRIPTOR.name}"
            status.details.append(any_pb2.Any(type_url=name, value=detail.SerializeToString()))
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    if pushback is not None:
        metadata.append(("grpc-retry-pushback-ms", pushback))
    context.set_trailing_metadata(metadata)
    context.abort(code, "no")


def retry_info(millis: int) -> wire_pb2.RetryInfo:
    return wire_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=millis * 1_000_000))


def violation(field: str) -> wire_pb2.BadRequest:
    return wire_pb2.BadRequest(field_violations=[wire_pb2.BadRequest.FieldViolation(field=field, description="why")])
