//! TLS, keys, roles and what stands in logs: the promises of SECURITY.md, each against the real server.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use plumb_client::{
    ApiKey, Client, ClientIdentity, ClientOptions, Code, Error, RetryPolicy, conversation, reward, text, v1,
};
use plumb_tests::call::{self, candidate, items, named, refused};
use plumb_tests::fixture::Copied;
use plumb_tests::{Exposition, Launch, Server};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// Somebody who signs certificates.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(super) pem: String,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for a name or address, and its key.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn client(&self, name: &str) -> ClientIdentity {
        let (certificate, key) = self.sign(name);
        ClientIdentity::from_pem(certificate, key)
    }
}

/// Files that a server reads.
pub(super) struct Files(TempDir);

impl Files {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    /// The certificate of a server, as flags.
    pub(super) fn server(&self, authority: &Authority) -> String {
        let (certificate, key) = authority.sign("127.0.0.1");
        format!("--tls-cert {} --tls-key {}", self.write("tls.crt", &certificate), self.write("tls.key", &key))
    }
}

async fn connect(
    server: &Server,
    authority: &Authority,
    identity: Option<ClientIdentity>,
    key: Option<&str>,
) -> Result<Client, Error> {
    Client::connect(ClientOptions {
        ca_certificate_pem: Some(authority.pem.clone().into()),
        identity,
        api_key: key.map(ApiKey::new),
        retry: RetryPolicy::none(),
        ..ClientOptions::new(format!("https://{}", server.address()))
    })
    .await
}

async fn score(client: &Client) -> Result<(), Error> {
    client.score(items(None, vec![text("a")])).await.map(drop)
}

async fn label(client: &Client) -> Result<(), Error> {
    client.set_label("llama-pm", "stable", Some(1)).await.map(drop)
}

#[track_caller]
fn code<T: Debug>(result: Result<T, Error>, expected: Code) {
    let error = refused(result);
    assert_eq!(error.code, expected, "{error}");
}

fn loads(metrics: &Exposition, what: &str, code: &str) -> f64 {
    metrics.value(&format!("plumb_{what}_loads_total"), &[("code", code)])
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_to_those_who_speak_it() {
    let (authority, files) = (Authority::new(), Files::new());
    let server = Launch::of(["llama-pm"]).flags(&files.server(&authority)).listen().await;
    server.until_ready().await;
    score(&connect(&server, &authority, None, None).await.unwrap()).await.unwrap();
    let stranger = connect(&server, &Authority::new(), None, None).await;
    assert!(matches!(stranger, Err(Error::Connect { .. })), "{stranger:?}");
    let plain = ClientOptions { retry: RetryPolicy::none(), ..ClientOptions::new(server.url()) };
    // The bytes of an alert are no HTTP/2: where that is noticed is up to the client.
    if let Ok(client) = Client::connect(plain).await {
        score(&client).await.unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_certificate_is_its_credential() {
    let (authority, clients, files) = (Authority::new(), Authority::new(), Files::new());
    let tokens = files.write("tokens", "[[certificate]]\nname = \"operator\"\nroles = [\"admin\"]\n");
    let flags = format!(
        "{} --tls-client-ca {} --auth-tokens-file {tokens}",
        files.server(&authority),
        files.write("ca.crt", &clients.pem)
    );
    let server = Launch::of(["llama-pm"]).flags(&flags).listen().await;
    server.until_ready().await;
    let trainer = connect(&server, &authority, Some(clients.client("trainer")), None).await.unwrap();
    score(&trainer).await.unwrap();
    code(label(&trainer).await, Code::PermissionDenied);
    label(&connect(&server, &authority, Some(clients.client("operator")), None).await.unwrap()).await.unwrap();
    for nobody in [None, Some(Authority::new().client("operator"))] {
        // With TLS 1.3 a client learns only with its first call that its certificate does not do.
        match connect(&server, &authority, nobody, None).await {
            Ok(client) => code(score(&client).await, Code::Unavailable),
            Err(error) => assert!(matches!(error, Error::Connect { .. }), "{error}"),
        }
    }
    server
        .until("the handshakes failed", |m| {
            m.value("plumb_connections_refused_total", &[("reason", "handshake")]) >= 2.0
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_certificates_are_optional_a_key_does_too() {
    let (authority, clients, files) = (Authority::new(), Authority::new(), Files::new());
    let flags = format!(
        "{} --tls-client-ca {} --tls-client-auth optional --api-key secret",
        files.server(&authority),
        files.write("ca.crt", &clients.pem)
    );
    let server = Launch::of(["llama-pm"]).flags(&flags).listen().await;
    server.until_ready().await;
    code(score(&connect(&server, &authority, None, None).await.unwrap()).await, Code::Unauthenticated);
    score(&connect(&server, &authority, None, Some("secret")).await.unwrap()).await.unwrap();
    let identity = || Some(clients.client("trainer"));
    score(&connect(&server, &authority, identity(), None).await.unwrap()).await.unwrap();
    code(score(&connect(&server, &authority, identity(), Some("wrong")).await.unwrap()).await, Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_used_without_a_restart_and_a_broken_one_is_not() {
    let (old, new, files) = (Authority::new(), Authority::new(), Files::new());
    let server = Launch::of(["llama-pm"]).flags(&files.server(&old)).listen().await;
    server.until_ready().await;
    let connected = connect(&server, &old, None, None).await.unwrap();
    score(&connected).await.unwrap();
    files.server(&new);
    let metrics = server.until("the certificate was read again", |m| loads(m, "tls_certificate", "OK") >= 2.0).await;
    score(&connected).await.unwrap();
    score(&connect(&server, &new, None, None).await.unwrap()).await.unwrap();
    assert!(connect(&server, &old, None, None).await.is_err(), "the old certificate is still shown");
    let expires = metrics.value("plumb_tls_certificate_expiry_timestamp_seconds", &[]);
    assert!(expires > SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64());

    let refused = loads(&metrics, "tls_certificate", "INVALID_ARGUMENT");
    files.write("tls.crt", "not a certificate");
    server.until("it is refused", |m| loads(m, "tls_certificate", "INVALID_ARGUMENT") > refused).await;
    score(&connect(&server, &new, None, None).await.unwrap()).await.unwrap();
    assert!(server.log().contains("tls.crt: no certificate in PEM form"), "the log does not say why");
}

fn tokens(entries: &[(&str, &str, &str)]) -> String {
    let token = |(name, token, roles): &(&str, &str, &str)| {
        format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nroles = [{roles}]\n")
    };
    entries.iter().map(token).collect()
}

async fn with_key(server: &Server, key: &str) -> Client {
    let key = Some(ApiKey::new(key));
    server.client_with(|options| (options.api_key, options.retry) = (key, RetryPolicy::none())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_rotated_without_a_restart() {
    let files = Files::new();
    let flags = format!("--auth-tokens-file {}", files.write("tokens", &tokens(&[("rl", "first", "\"score\"")])));
    let server = Launch::of(["llama-pm"]).flags(&flags).start().await;
    let (first, second) = (with_key(&server, "first").await, with_key(&server, "second").await);
    score(&first).await.unwrap();
    code(score(&second).await, Code::Unauthenticated);
    // As Kubernetes does it: a file beside it, and one rename.
    let both = tokens(&[("rl", "first", "\"score\""), ("rl", "second", "\"score\"")]);
    files.write("next", &both);
    std::fs::rename(files.path("next"), files.path("tokens")).unwrap();
    server.until("both are known", |m| loads(m, "key", "OK") >= 2.0).await;
    score(&first).await.unwrap();
    score(&second).await.unwrap();
    files.write("tokens", &tokens(&[("rl", "second", "\"score\"")]));
    server.until("the first is forgotten", |m| loads(m, "key", "OK") >= 3.0).await;
    code(score(&first).await, Code::Unauthenticated);
    score(&second).await.unwrap();
    files.write("tokens", "");
    server.until("an empty file is refused", |m| loads(m, "key", "INVALID_ARGUMENT") >= 1.0).await;
    code(score(&first).await, Code::Unauthenticated);
    score(&second).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_open_what_they_are_for() {
    let files = Files::new();
    let entries = [
        ("a", "scores", "\"score\""),
        ("b", "writes", "\"generate\""),
        ("c", "does-both", "\"score\", \"generate\""),
        ("d", "operates", "\"admin\""),
    ];
    let flags = format!("--auth-tokens-file {}", files.write("tokens", &tokens(&entries)));
    let server = Launch::of(["llama-pm", "llama-lm"]).flags(&flags).start().await;
    for (key, may_score, may_generate, may_change) in [
        ("scores", true, false, false),
        ("writes", false, true, false),
        ("does-both", true, true, false),
        ("operates", true, true, true),
    ] {
        let client = with_key(&server, key).await;
        let check = |result: Result<(), Error>, may: bool| match may {
            true => result.unwrap(),
            false => code(result, Code::PermissionDenied),
        };
        check(score(&client).await, may_score);
        let rank = v1::RankRequest { prompt: Some(text("q")), candidates: vec![candidate("a")], ..Default::default() };
        check(client.rank(rank).await.map(drop), may_score);
        let tokenize = v1::TokenizeRequest { texts: vec!["a".into()], ..Default::default() };
        check(client.tokenize(tokenize).await.map(drop), may_score);
        let stopping = Some(v1::Stopping { max_new_tokens: Some(1), ..Default::default() });
        // Ranking its own samples is part of generating.
        let best_of = Some(v1::BestOf { samples: 2, ranker: None });
        let generate = v1::GenerateRequest { prompt: Some(text("q")), stopping, best_of, ..Default::default() };
        check(call::generate(&client, generate).await.map(drop), may_generate);
        check(label(&client).await, may_change);
        client.list_models().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_admin_port_models_are_changed_there_only() {
    let server = Launch::of(["llama-pm"]).flags("--api-key client --admin-api-key admin --admin-port 0").start().await;
    let url = format!("http://{}", server.admin_address().unwrap());
    let at = async |url: String, key: &str| {
        let key = Some(ApiKey::new(key));
        let options = ClientOptions { api_key: key, retry: RetryPolicy::none(), ..ClientOptions::new(url) };
        Client::connect(options).await.unwrap()
    };
    code(label(&at(server.url(), "admin").await).await, Code::PermissionDenied);
    code(label(&at(url.clone(), "client").await).await, Code::PermissionDenied);
    label(&at(url, "admin").await).await.unwrap();
    score(&at(server.url(), "client").await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_open_to_the_network_says_so() {
    let open = Launch::of(["llama-pm"]).flags("--hostname 0.0.0.0").start().await;
    assert!(open.log().contains("everybody who reaches the port may call"), "it says nothing");
    // The test is on this machine.
    label(&open.client().await).await.unwrap();
    let closed = Launch::of(["llama-pm"]).flags("--hostname 0.0.0.0 --api-key secret").start().await;
    assert!(!closed.log().contains("everybody who reaches the port"), "it says what is not true");
}

#[tokio::test(flavor = "multi_thread")]
async fn half_of_a_pair_is_a_wrong_configuration() {
    let files = Files::new();
    let key = files.write("tls.key", "");
    for (flags, words) in [
        (format!("--tls-key {key}"), "--tls-key needs --tls-cert"),
        (format!("--tls-cert {key} --tls-key {key}"), "no certificate in PEM form"),
        (format!("--auth-tokens-file {key}"), "neither a [[token]] nor a [[certificate]]"),
    ] {
        let (exit, log) = Launch::of(["llama-pm"]).flags(&flags).fail().await;
        assert_eq!(exit, 64, "{flags}: {log}");
        assert!(log.contains(words), "`{words}` is not in: {log}");
    }
}

const MARKER: &str = "xyzzy-no-log-may-have-this";

/// Calls every rpc that takes a text with the marker in every place where a text can be, well and badly formed.
async fn say_the_marker(client: &Client) {
    let marked = || text(MARKER);
    let pm = || named("llama-pm");
    let turns = |role: &str| conversation([(role, MARKER), ("assistant", MARKER)]);
    for input in
        [marked(), turns("user"), turns("tool"), turns(MARKER), conversation([("user", MARKER), ("user", MARKER)])]
    {
        let _ = client.score(items(pm(), vec![input.clone()])).await;
        let _ = client.score(items(named(MARKER), vec![input.clone()])).await;
        let mutual = v1::Objective::MutualInformation.into();
        let lm =
            v1::ScoreRequest { objective: mutual, per_token: true, ..items(named("llama-lm"), vec![input.clone()]) };
        let _ = client.score(lm).await;
        let options = v1::TextOptions { max_tokens: Some(1), ..Default::default() };
        let _ = client.score(v1::ScoreRequest { text: Some(options), ..items(pm(), vec![input.clone()]) }).await;
        let candidates = vec![candidate(MARKER), call::candidate_ids(&[5])];
        let _ = client.rank(v1::RankRequest { prompt: Some(input.clone()), candidates, ..Default::default() }).await;
        let _ = client.render(v1::RenderRequest { input: Some(input.clone()), ..Default::default() }).await;
        for strings in [vec![MARKER.to_owned()], vec![MARKER.to_owned(); 65], vec![MARKER.repeat(100)]] {
            let sampling = v1::Sampling { banned_strings: strings.clone(), ..Default::default() };
            let stopping = v1::Stopping { stop_strings: strings, max_new_tokens: Some(2), ..Default::default() };
            let generate = v1::GenerateRequest {
                prompt: Some(input.clone()),
                sampling: Some(sampling),
                stopping: Some(stopping),
                ..Default::default()
            };
            let _ = call::generate(client, generate).await;
        }
    }
    let _ = client.tokenize(v1::TokenizeRequest { texts: vec![MARKER.into()], ..Default::default() }).await;
    let _ = client.get_model(call::labelled("llama-pm", MARKER).unwrap()).await;
    let request = items(pm(), vec![marked(), turns("tool")]);
    let stream = client.score_stream(tokio_stream::once(request)).await.unwrap();
    futures::StreamExt::collect::<Vec<_>>(stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_text_of_a_caller_is_logged() {
    for log in ["info", "plumb=debug", "plumb=trace,plumb_server=trace,plumb_model=trace", "trace"] {
        let server = Launch::of(["llama-pm", "llama-lm"]).flags(&format!("--log {log}")).start().await;
        say_the_marker(&server.client().await).await;
        let text = server.log();
        let line = text.lines().find(|line| line.contains(MARKER));
        assert!(line.is_none(), "at {log}: {line:?}");
        assert!(log == "info" || text.contains("item failed"), "nothing is logged at {log}");
    }
}

/// Few steps and a number without end: only a process with limits ends it.
#[tokio::test]
#[cfg(target_os = "linux")]
async fn a_template_that_means_harm_costs_its_own_item_only() {
    let pm = Copied::of("llama-pm");
    let harm = "{% if messages[0].content == 'harm' %}{{ ([0] * 99999999) ~ bos_token }}{% endif %}";
    let template = format!("{harm}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}");
    std::fs::write(pm.path().join("chat_template.jinja"), template).unwrap();
    let server = Launch::new().model("pm", pm.path()).start().await;
    let client = server.client().await;
    let said = ["good", "harm", "good"].map(|said| conversation([("user", said)]));
    let results = client.score(items(named("pm"), said.into())).await.unwrap().results;
    let [first, harm, second] = results.try_into().unwrap();
    assert_eq!(reward(&first).unwrap(), reward(&second).unwrap());
    let error = reward(&harm).unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument);
    assert!(error.message.contains("the chat template takes more"), "{}", error.message);
}
