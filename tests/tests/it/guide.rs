//! The guide in `docs`: its commands do what it says, the references are those of the programs, what it quotes and links
//! to is there. And what the programs write for shells and for `man` is taken there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs};

use plumb_tests::binary;
use tempfile::TempDir;

/// How long something that has to happen may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);
const PROGRAMS: [&str; 3] = ["plumb-server", "plumb", "plumb-train"];

const COMMANDS: &str = "\
# Commands

<!-- Written by tests/tests/it/guide.rs from the programs' --help: change that. -->

Each program also takes `--generate man FOLDER`, and `--generate bash`, `elvish`, `fish`, `powershell` or `zsh`, for completions on standard output.

";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join("docs/src").join(name)).unwrap()
}

#[test]
fn the_commands_of_its_first_page_work() {
    let mut reader = Reader::new();
    let said = reader.follow(&page("start.md"));
    // The last table of rewards is that of the file with two pairs.
    assert!(said.contains("pm version 1") && said.contains("pairs: 2"), "{said}");
    let rewards = fs::read_to_string(reader.folder.path().join("rewards.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = rewards.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() == 4 && lines.iter().all(|line| line["reward"].is_f64()), "{rewards}");
}

#[test]
fn its_way_from_preferences_to_a_served_model_works() {
    let mut reader = Reader::new();
    let said = reader.follow(&page("train.md"));
    assert!(said.contains("published root/mine/1") && said.contains("mine version 1"), "{said}");
    // Of the two responses that are scored last, the first is like those that were chosen.
    let reward = |number| {
        let rows = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|row| row.first() == Some(&number)).filter_map(|row| row.get(1)?.parse::<f64>().ok()).next_back()
    };
    assert!(reward("1") > reward("2") && reward("2").is_some(), "{said}");
}

/// Somebody in a clone of the repository, who types what a page says.
struct Reader {
    folder: TempDir,
    server: Option<Child>,
}

impl Reader {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(root().join("server"), folder.path().join("server")).unwrap();
        Self { folder, server: None }
    }

    /// Runs all blocks of shell in a page and answers what they print. One that is a server is left running for the
    /// next ones.
    fn follow(&mut self, page: &str) -> String {
        let mut said = String::new();
        for block in blocks(page, "sh") {
            if block.contains("cargo build") {
                continue;
            }
            if block.starts_with("plumb-server") {
                self.serve(&block);
                continue;
            }
            let output = self.bash(&block).output().unwrap();
            let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
            assert!(output.status.success(), "{block}{out}{err}");
            said += &out;
        }
        said
    }

    fn bash(&self, block: &str) -> Command {
        let mut bash = Command::new("bash");
        let programs = binary("plumb").parent().unwrap().to_owned();
        let path = format!("{}:{}", programs.display(), env::var("PATH").unwrap());
        // What the developer's shell has set is not the reader's.
        for (name, _) in env::vars().filter(|(name, _)| name.starts_with("PLUMB_")) {
            bash.env_remove(name);
        }
        bash.args(["-euo", "pipefail", "-c", block]).current_dir(self.folder.path());
        bash.env("PATH", path).env("HOME", self.folder.path());
        if let Ok(ports) = fs::read(self.ports()) {
            let ports: serde_json::Value = serde_json::from_slice(&ports).unwrap();
            bash.env("PLUMB_SERVER", format!("http://{}", ports["grpc"].as_str().unwrap()));
        }
        bash
    }

    fn ports(&self) -> PathBuf {
        self.folder.path().join("ports.json")
    }

    /// Starts a server in place of the one before, and waits until it serves.
    fn serve(&mut self, block: &str) {
        self.stop();
        let mut bash = self.bash(&format!("exec {block}"));
        bash.env("PLUMB_PORT", "0").env("PLUMB_PROMETHEUS_PORT", "0").env("PLUMB_PORT_FILE", self.ports());
        bash.stdout(Stdio::null()).stderr(Stdio::null());
        self.server = Some(bash.spawn().unwrap());
        let began = Instant::now();
        while !self.ports().exists() || !self.bash("plumb health").output().unwrap().status.success() {
            assert!(began.elapsed() < PATIENCE, "{block} does not serve");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
            fs::remove_file(self.ports()).unwrap();
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The fenced blocks of this language.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let fenced = page.split("\n```").skip(1).step_by(2);
    fenced
        .filter_map(|block| block.split_once('\n').filter(|(tag, _)| *tag == language))
        .map(|(_, body)| body.into())
        .collect()
}

#[test]
fn the_reference_is_that_of_the_programs() {
    let mut reference = COMMANDS.to_owned();
    for program in PROGRAMS {
        reference += &generated(program, &["markdown"]);
    }
    let reference = reference.trim_end().to_owned() + "\n";
    let file = root().join("docs/src/reference/commands.md");
    if env::var_os("PLUMB_WRITE_REFERENCE").is_some() {
        fs::write(&file, &reference).unwrap();
    }
    let stale = "PLUMB_WRITE_REFERENCE=1 cargo test -p plumb-tests the_reference_is_that_of_the_programs";
    assert!(fs::read_to_string(&file).unwrap() == reference, "{} is stale: {stale}", file.display());
}

fn generated(program: &str, form: &[&str]) -> String {
    let output = Command::new(binary(program)).arg("--generate").args(form).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{program}: {err}");
    out
}

#[test]
fn bash_completes_commands_and_options() {
    let check = |program: &str, line: &[&str], expected: &[&str]| {
        let script = generated(program, &["bash"]);
        // As bash calls it: the command, the word at the cursor and the one before; it is registered by `complete`.
        let ask = "COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1))\n\
                   function=$(complete -p \"$1\" | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n\
                   $function \"$1\" \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"\n\
                   printf '%s\\n' \"${COMPREPLY[@]}\"";
        let output =
            Command::new("bash").args(["-c", &format!("{script}\n{ask}"), "bash", program]).args(line).output();
        let output = output.unwrap();
        let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert_eq!(out.split_whitespace().collect::<Vec<_>>(), expected, "{program} {line:?}: {err}");
    };
    check("plumb", &["sc"], &["score"]);
    check("plumb", &["models", "la"], &["label"]);
    check("plumb", &["score", "--trunc"], &["--truncate"]);
    check("plumb", &["score", "--truncate", ""], &["refuse", "left", "right"]);
    check("plumb-train", &["ev"], &["evaluate"]);
    check("plumb-server", &["--model-r"], &["--model-root"]);
}

#[test]
fn there_is_a_man_page_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for program in PROGRAMS {
        generated(program, &["man", folder.path().to_str().unwrap()]);
    }
    let pages: BTreeSet<String> =
        folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    for page in ["plumb.1", "plumb-score.1", "plumb-models-label.1", "plumb-server.1", "plumb-train-run.1"] {
        assert!(pages.contains(page), "{page} is not among {pages:?}");
    }
    assert!(!pages.contains("plumb-train-confined.1"), "a command that is hidden");
    if Command::new("groff").arg("--version").output().is_err() {
        println!("skipped: there is no groff to read the pages");
        return;
    }
    for page in pages {
        let output = Command::new("groff").args(["-man", "-ww", "-z"]).arg(folder.path().join(&page)).output().unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{page}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn a_form_that_is_none_is_a_wrong_command_line() {
    for program in PROGRAMS {
        let output = Command::new(binary(program)).args(["--generate", "poem"]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(64) && said.contains("bash") && output.stdout.is_empty(), "{said}");
    }
}

#[test]
fn what_troubleshooting_quotes_is_what_the_programs_say() {
    let mut sources = String::new();
    for folder in ["server/src", "client/src", "trainer/src", "model/src"] {
        every(&root().join(folder), "rs", &mut |path| sources += &fs::read_to_string(path).unwrap());
    }
    // A string that goes on in the next line.
    let sources: String = sources.split("\\\n").map(str::trim_start).collect();
    let page = page("troubleshooting.md");
    let quotes = page.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'));
    for quote in quotes {
        for words in quote.split("...").map(|words| words.trim_matches([' ', ':'])) {
            assert!(sources.contains(words), "nothing says `{words}` of `{quote}`");
        }
    }
}

#[test]
fn no_link_is_dead() {
    let mut dead = Vec::new();
    let mut check = |file: &Path| {
        let text = fs::read_to_string(file).unwrap();
        for link in links(&text).filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { file.to_owned() } else { file.parent().unwrap().join(path) };
            let found = target.exists() && (anchor.is_empty() || anchors(&target).contains(anchor));
            if !found {
                dead.push(format!("{}: {link}", file.display()));
            }
        }
    };
    for entry in root().read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            check(&path);
        }
    }
    for folder in ["docs/src", "deploy", "client/python", "server", "trainer", "model", "tests/fixtures"] {
        every(&root().join(folder), "md", &mut check);
    }
    assert!(dead.is_empty(), "{dead:#?}");
}

/// Targets of links and images, outside of fenced blocks.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let plain = text.split("```").step_by(2);
    plain.flat_map(|text| text.split("](").skip(1)).filter_map(|rest| Some(rest.split_once(')')?.0))
}

/// Names of headings, as mdBook and GitHub make them.
fn anchors(file: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(file).unwrap();
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let name = |heading: &str| {
        let kept = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
    };
    headings.map(name).collect()
}

/// Every file with this extension, below a folder.
fn every(folder: &Path, extension: &str, visit: &mut impl FnMut(&Path)) {
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            every(&path, extension, visit);
        } else if path.extension().is_some_and(|found| found == extension) {
            visit(&path);
        }
    }
}
