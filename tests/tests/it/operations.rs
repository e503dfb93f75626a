//! What an operator sees: the status page, and the dashboard and the rules of `deploy/` over a real Prometheus.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use plumb_client::{Client, text, v1};
use plumb_tests::call::{self, candidate, ids, items, named};
use plumb_tests::fixture::fixture;
use plumb_tests::{Launch, Server};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// For Prometheus and Chromium to start on a busy machine, and for each query to have an answer.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a server that is well has nothing of, and what others export.
const MAY_BE_EMPTY: &[&str] = &[
    "rate(plumb_admission_refusals_total",
    "plumb_connections_refused_total",
    "plumb_batch_failures_total",
    "plumb_isolated_inputs_total",
    "plumb_model_rollbacks_total",
    "plumb_non_finite_total",
    "plumb:reward_drift:yesterday",
    "changes(",
    "DCGM_",
];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Whether a program is to be had; if not, a line says what is skipped.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let found = found.is_ok_and(|status| status.success());
    if !found {
        println!("skipped: there is no {program}");
    }
    found
}

/// Runs a program that has to succeed; answers what it printed.
fn succeed(command: &mut Command) -> [String; 2] {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{command:?}: {said:?}");
    said
}

#[test]
fn the_rules_do_what_they_should() {
    if !has("promtool") {
        return;
    }
    let promtool = |arguments: &[&str]| succeed(Command::new("promtool").args(arguments).current_dir(deploy()));
    promtool(&["check", "config", "prometheus.yml"]);
    promtool(&["check", "rules", "prometheus/rules.yml"]);
    promtool(&["test", "rules", "prometheus/rules.test.yml"]);
}

#[test]
fn the_dashboard_is_what_its_source_says() {
    if has("python3") {
        succeed(Command::new("python3").arg("-B").arg(deploy().join("grafana/dashboard.py")).arg("--check"));
    }
}

/// A Prometheus that scrapes a server and evaluates the rules every second. It ends when dropped.
struct Prometheus {
    child: Child,
    folder: tempfile::TempDir,
    address: String,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of Prometheus:\n{}---", self.log());
        }
    }
}

impl Prometheus {
    fn start(server: &Server) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rules = std::fs::read_to_string(deploy().join("prometheus/rules.yml")).unwrap();
        let faster = rules.lines().map(|line| match line.split_once("interval: ") {
            Some((indent, _)) => format!("{indent}interval: 1s\n"),
            None => format!("{line}\n"),
        });
        std::fs::write(folder.path().join("rules.yml"), faster.collect::<String>()).unwrap();
        let target = server.metrics_address();
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [rules.yml]\nscrape_configs:\n  \
             - job_name: plumb\n    static_configs: [{{ targets: [\"{target}\"] }}]\n"
        );
        std::fs::write(folder.path().join("prometheus.yml"), config).unwrap();
        // It takes no port 0 that it would tell.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new("prometheus")
            .arg("--config.file=prometheus.yml")
            .arg("--storage.tsdb.path=data")
            .arg(format!("--web.listen-address={address}"))
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { child, folder, address }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The `data` of an answer of its API; `None` while it is not there yet.
    async fn get(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(&self.address).await.ok()?;
        stream.write_all(format!("GET /api/v1/{path} HTTP/1.0\r\n\r\n").as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        assert_eq!(answer["status"], "success", "{path}: {answer}");
        Some(answer["data"].clone())
    }

    /// What a query answers now.
    async fn query(&self, expression: &str) -> Vec<Value> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.get(&format!("query?query={encoded}")).await.unwrap_or_default();
        match &answer["result"] {
            Value::Array(samples) => samples.clone(),
            _ => Vec::new(),
        }
    }

    async fn until_some(&self, expression: &str) {
        let began = Instant::now();
        while self.query(expression).await.is_empty() {
            assert!(began.elapsed() < PATIENCE, "nothing is answered to {expression}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Every expression of the dashboard, as Grafana would fill in its variables.
fn expressions() -> Vec<String> {
    let dashboard: Value =
        serde_json::from_slice(&std::fs::read(deploy().join("grafana/plumb.json")).unwrap()).unwrap();
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let panels = array(&dashboard["panels"]);
    let panels = panels.iter().flat_map(|panel| [vec![panel.clone()], array(&panel["panels"])].concat());
    let targets = panels.flat_map(|panel| array(&panel["targets"])).map(|target| target["expr"].clone());
    let swaps = array(&dashboard["annotations"]["list"]).into_iter().map(|annotation| annotation["expr"].clone());
    let variables = array(&dashboard["templating"]["list"]).into_iter().filter_map(|variable| {
        // label_values(metric, label)
        let query = variable["query"]["query"].as_str()?.strip_prefix("label_values(")?;
        Some(query.rsplit_once(',')?.0.into())
    });
    let fill = |expression: Value| {
        let expression = expression.as_str().unwrap().replace("$__rate_interval", "10s").replace("$__interval", "10s");
        let variables = ["$namespace", "$job", "$instance", "$model", "$version"];
        variables.iter().fold(expression, |filled, name| filled.replace(name, ".*"))
    };
    targets.chain(swaps).chain(variables).map(fill).collect()
}

/// A moment of a server's life, with everything that a dashboard shows of one that is well.
async fn work(client: &Client) {
    let tokens: Vec<_> = (0..8).map(|n| ids(&[5 + n; 40])).collect();
    client.score(v1::ScoreRequest { model: named("pm"), ..items(None, tokens.clone()) }).await.unwrap();
    client.score(v1::ScoreRequest { model: call::version("pm", 1), ..items(None, tokens) }).await.unwrap();
    // The second is no token of the model.
    client
        .score(v1::ScoreRequest { model: named("pm"), ..items(None, vec![ids(&[5; 10]), ids(&[280])]) })
        .await
        .unwrap();
    let candidates = vec![candidate("one answer"), candidate("another")];
    let ranked =
        v1::RankRequest { model: named("pm"), prompt: Some(text("A question?")), candidates, ..Default::default() };
    client.rank(ranked).await.unwrap();
    let generate = v1::GenerateRequest {
        prompt: Some(text("a")),
        stopping: Some(v1::Stopping { max_new_tokens: Some(4), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    call::generate(client, generate).await.unwrap();
}

/// Two versions of a preference model and a language model.
async fn two_versions() -> (Server, Client) {
    let server = Launch::new().model("pm", fixture("llama-pm")).model("lm", fixture("llama-lm")).start().await;
    let client = server.client().await;
    let source = fixture("qwen2-pm").display().to_string();
    client.load_version(v1::LoadVersionRequest { name: "pm".into(), source, ..Default::default() }).await.unwrap();
    (server, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_panel_and_every_rule_finds_its_metrics() {
    if !has("prometheus") || !has("promtool") {
        return;
    }
    let (server, client) = two_versions().await;
    let prometheus = Prometheus::start(&server);
    let load = tokio::spawn(async move {
        loop {
            work(&client).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });

    prometheus.until_some("up{job=\"plumb\"} == 1").await;
    for expression in expressions() {
        match MAY_BE_EMPTY.iter().any(|part| expression.contains(part)) {
            // It is valid, which `query` checks.
            true => drop(prometheus.query(&expression).await),
            false => prometheus.until_some(&expression).await,
        }
    }

    let rules = prometheus.get("rules").await.unwrap();
    let rules = rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap());
    let mut count = 0;
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        let is_alert = rule["type"] == "alerting";
        // The two versions were made from different seeds.
        assert!(!is_alert || rule["state"] != "firing" || rule["name"] == "PlumbRewardsDiffer", "{rule}");
        assert!(!is_alert || rule["annotations"]["runbook"].as_str().is_some_and(|text| text.ends_with('.')), "{rule}");
        count += 1;
    }
    assert!(count > 30, "{count} rules");

    let (_, exposition) = server.page("/metrics").await;
    let file = prometheus.folder.path().join("metrics");
    std::fs::write(&file, exposition).unwrap();
    let input = std::fs::File::open(&file).unwrap();
    let [_, complaints] = succeed(Command::new("promtool").args(["check", "metrics"]).stdin(input));
    assert_eq!(complaints, "");
    load.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_tells_what_is_served() {
    let (server, client) = two_versions().await;
    work(&client).await;
    client.set_label("pm", "stable", Some(1)).await.unwrap();
    let (status, page) = server.page("/").await;
    assert_eq!(status, 200, "{page}");
    for words in [
        "<p class=\"badge good\">SERVING</p>",
        "<th data-label=\"Call\">Preference&#x2f;Score</th>",
        "<th data-label=\"Model\">lm</th>",
        "<td data-label=\"Version\">2</td>",
        "<span class=\"tag\">stable</span>",
        "<span class=\"badge available\">available</span>",
        "Rewards of pm version 1",
        "Rewards of pm version 2",
        "swapped from version 1 to 2",
        "label stable points at version 1",
        concat!("version ", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(page.contains(words), "{words} is not in\n{page}");
    }
    let (status, style) = server.page("/status.css").await;
    assert!(status == 200 && style.contains("prefers-color-scheme: dark"));

    // A version that fails is told with its reason.
    let failed = v1::LoadVersionRequest { name: "pm".into(), source: "/nowhere".into(), ..Default::default() };
    client.load_version(failed).await.unwrap_err();
    let began = Instant::now();
    loop {
        let (_, page) = server.page("/").await;
        if page.contains("<span class=\"badge failed\">failed</span>") && page.contains("version 3 failed after") {
            break;
        }
        // A page is kept for a second.
        assert!(began.elapsed() < PATIENCE, "{page}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_the_status_page() {
    if !has("chromium") {
        return;
    }
    let (server, client) = two_versions().await;
    work(&client).await;
    let home = tempfile::tempdir().unwrap();
    let mut chromium = Command::new("chromium");
    chromium.env("HOME", home.path()).arg(format!("--user-data-dir={}", home.path().display()));
    for flag in
        ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync"]
    {
        chromium.arg(format!("--{flag}"));
    }
    chromium.args(["--disable-component-update", "--enable-logging=stderr", "--dump-dom"]);
    chromium.arg(format!("http://{}/", server.metrics_address()));
    let [dom, log] = tokio::task::spawn_blocking(move || succeed(&mut chromium)).await.unwrap();
    assert!(dom.contains("SERVING") && dom.contains("pm version 2") && dom.contains("<rect"), "{dom}");
    // The page keeps its own promise.
    assert!(!log.contains("Content Security Policy"), "{log}");
}
