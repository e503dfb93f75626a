//! Requests, through the wire, to a server in this process.

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use futures::{StreamExt, future, stream};
use plumb_proto::v1;
use plumb_server::{Config, Server};
use prost::Message;
use prost::bytes::{Buf, BufMut};
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::{Target, folder};

/// A byte for the rpc, then its request. The server decodes, checks, renders and computes it.
pub const PROTO: Target = Target { name: "proto", take, fixed: 64 << 20, per_byte: 4096 };

/// An rpc that anybody may call.
struct Rpc {
    path: &'static str,
    /// Decodes a request and checks that it comes back when it is written.
    decode: fn(&[u8]) -> bool,
    /// Whether it is sent. The others change what is served: they are for an administrator.
    send: bool,
}

const RPCS: [Rpc; 12] = [
    rpc::<v1::ScoreRequest>("/plumb.v1.Preference/Score", true),
    rpc::<v1::ScoreRequest>("/plumb.v1.Preference/ScoreStream", true),
    rpc::<v1::RankRequest>("/plumb.v1.Preference/Rank", true),
    rpc::<v1::GenerateRequest>("/plumb.v1.Generation/Generate", true),
    rpc::<v1::TokenizeRequest>("/plumb.v1.Tokens/Tokenize", true),
    rpc::<v1::RenderRequest>("/plumb.v1.Tokens/Render", true),
    rpc::<v1::GetModelRequest>("/plumb.v1.Models/GetModel", true),
    rpc::<v1::ListModelsRequest>("/plumb.v1.Models/ListModels", true),
    rpc::<v1::WatchModelsRequest>("/plumb.v1.Models/WatchModels", true),
    rpc::<v1::LoadVersionRequest>("/plumb.v1.Models/LoadVersion", false),
    rpc::<v1::UnloadVersionRequest>("/plumb.v1.Models/UnloadVersion", false),
    rpc::<v1::SetLabelRequest>("/plumb.v1.Models/SetLabel", false),
];

/// Small limits, so that what they allow is soon done.
const FLAGS: [&str; 21] = [
    "--port=0",
    "--http-port=0",
    "--prometheus-port=0",
    "--log=off",
    "--threads=1",
    "--tokenization-workers=1",
    "--kv-cache-mib=16",
    "--max-batch-tokens=256",
    "--max-batch-sequences=16",
    "--max-client-batch-size=8",
    "--max-input-tokens=128",
    "--max-message-bytes=1048576",
    "--max-new-tokens-limit=8",
    "--default-max-new-tokens=4",
    "--max-stream-in-flight=4",
    "--max-queue-tokens=65536",
    "--default-preference-model=pm",
    "--default-language-model=lm",
    "--admin-api-key=admin",
    "--keepalive-interval-secs=3600",
    "--drain-timeout-secs=0",
];

/// For how long states of models are awaited: they have no end, and none may come.
const WATCH: Duration = Duration::from_millis(10);

const fn rpc<M: Message + Default + PartialEq>(path: &'static str, send: bool) -> Rpc {
    Rpc { path, decode: decode::<M>, send }
}

fn decode<M: Message + Default + PartialEq>(data: &[u8]) -> bool {
    let Ok(message) = M::decode(data) else { return false };
    let written = message.encode_to_vec();
    assert_eq!(written.len(), message.encoded_len());
    // Not compared as messages: a NaN is not equal to itself.
    let again = M::decode(written.as_slice()).expect("what was written can be read");
    assert_eq!(again.encode_to_vec(), written);
    true
}

/// A server of this process, and the ways to it.
pub(crate) struct Wire {
    runtime: Runtime,
    channel: Channel,
    pub(crate) http: SocketAddr,
}

pub(crate) static WIRE: LazyLock<Wire> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
    let (channel, http) = runtime.block_on(async {
        let models = ["pm", "lm"].map(|name| format!("--model={name}={}", folder::fixture(&format!("llama-{name}"))));
        let files = folder::with(&[("hhh.txt", b"Human: a\n\nAssistant: b\n")]);
        let ports = files.path().join("ports.json");
        let paths = [
            format!("--hhh-prompt-file={}", files.path().join("hhh.txt").display()),
            format!("--port-file={}", ports.display()),
        ];
        let flags = models.iter().chain(&paths).map(String::as_str).chain(FLAGS);
        let flags = std::iter::once("plumb-server").chain(flags);
        let config = Config::parse(flags).expect("a configuration");
        let server = Server::start(config).await.expect("a server");
        let address = format!("http://{}", server.grpc_address());
        tokio::spawn(server.run(stream::pending()));
        let channel = Endpoint::from_shared(address).expect("an address").connect().await.expect("a connection");
        let text = || v1::Input { input: Some(v1::input::Input::Text("a".to_owned())) };
        let generate = v1::GenerateRequest { prompt: Some(text()), ..Default::default() }.encode_to_vec();
        let score = v1::ScoreRequest { items: vec![text()], ..Default::default() }.encode_to_vec();
        for (path, request) in [("/plumb.v1.Generation/Generate", generate), ("/plumb.v1.Preference/Score", score)] {
            while call(&channel, path, request.clone()).await == Some(Code::Unavailable) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        let ports: Value = serde_json::from_slice(&std::fs::read(ports).expect("ports")).expect("JSON");
        let http = ports["http"].as_str().and_then(|address| address.parse().ok());
        (channel, http.expect("an address"))
    });
    Wire { runtime, channel, http }
});

fn take(data: &[u8]) {
    let Some((first, request)) = data.split_first() else { return };
    let rpc = &RPCS[usize::from(*first) % RPCS.len()];
    if !(rpc.decode)(request) || !rpc.send {
        return;
    }
    let code = WIRE.runtime.block_on(call(&WIRE.channel, rpc.path, request.to_vec()));
    // A request can be wrong, and there may be too many: none of that is an error of the server's.
    let fault = [Code::Unknown, Code::Internal, Code::DataLoss, Code::Unavailable, Code::Unimplemented];
    assert!(code.is_none_or(|code| !fault.contains(&code)), "{}: {code:?}", rpc.path);
}

/// Sends a request, reads the answer, and says how it failed, if it did. Every rpc looks like a stream on the wire.
async fn call(channel: &Channel, path: &'static str, request: Vec<u8>) -> Option<Code> {
    let mut client = Grpc::new(channel.clone());
    if client.ready().await.is_err() {
        return Some(Code::Unavailable);
    }
    let request = Request::new(stream::iter([request]));
    let answer = client.streaming(request, path.parse().expect("a path"), Raw).await;
    let messages = match answer {
        Err(status) => return Some(status.code()),
        Ok(answer) => answer.into_inner(),
    };
    let mut failures = messages.filter_map(|message| future::ready(message.err()));
    let failed = match path.ends_with("/WatchModels") {
        true => tokio::time::timeout(WATCH, failures.next()).await.unwrap_or_default(),
        false => failures.next().await,
    };
    failed.map(|status| status.code())
}

/// Messages as they are on the wire.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut message = vec![0; from.remaining()];
        from.copy_to_slice(&mut message);
        Ok(Some(message))
    }
}
