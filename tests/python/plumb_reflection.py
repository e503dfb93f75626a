"""A Plumb client that knows nothing but an address: it learns the API from the server by gRPC reflection.

Needs the packages grpcio, grpcio-reflection and protobuf.
"""

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Server:
    """Calls any unary or server-streaming rpc of a server with dicts: `Server(address)("plumb.v1.Preference/Score", {...})`."""

    def __init__(self, address, api_key=None):
        self.channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", 64 << 20)])
        self.metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.database)

    def services(self):
        return sorted(self.database.get_services())

    def __call__(self, rpc, request, timeout=600):
        service, method = rpc.split("/")
        descriptor = self.pool.FindServiceByName(service).FindMethodByName(method)
        make_request = message_factory.GetMessageClass(descriptor.input_type)
        make_response = message_factory.GetMessageClass(descriptor.output_type)
        connect = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        call = connect(
            f"/{rpc}", request_serializer=make_request.SerializeToString, response_deserializer=make_response.FromString
        )
        answer = call(json_format.ParseDict(request, make_request()), timeout=timeout, metadata=self.metadata)
        if descriptor.server_streaming:
            return [to_dict(message) for message in answer]
        return to_dict(answer)


def to_dict(message):
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
