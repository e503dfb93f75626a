//! Data sets become lines, whatever the order of their files.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use plumb_trainer::Error;
use plumb_trainer::prepare::{Counts, Dataset, Options, prepare};
use serde_json::{Value, json};
use tempfile::TempDir;

const OPTIONS: Options = Options { dev_share: 0.0, seed: 1, binarise: false, max_bad_lines: 10, sandbox: None };

struct Prepared {
    counts: Counts,
    train: Vec<Value>,
    dev: Vec<Value>,
    warnings: Vec<String>,
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn run(dataset: Dataset, files: &[PathBuf], options: &Options) -> Result<Prepared, Error> {
    let output = tempfile::tempdir().unwrap();
    let mut warnings = Vec::new();
    let counts = prepare(dataset, files, output.path(), options, &mut |line| warnings.push(line.to_owned()))?;
    // Nothing else is left behind.
    let names: Vec<_> = fs::read_dir(output.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    let [train, dev] = ["train.jsonl", "dev.jsonl"].map(|name| lines(&output.path().join(name)));
    Ok(Prepared { counts, train, dev, warnings })
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

#[track_caller]
fn check(dataset: Dataset, name: &str, content: &str, expected: &[Value], dropped: &[(&str, u64)]) {
    let prepared = run(dataset, &[Files::new().write_kept(name, content)], &OPTIONS).unwrap();
    let mut train = prepared.train;
    let mut expected = expected.to_vec();
    [&mut train, &mut expected].into_iter().for_each(|lines| lines.sort_by_key(Value::to_string));
    assert_eq!(train, expected, "{:?}", prepared.warnings);
    let dropped = dropped.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect();
    assert_eq!(prepared.counts.dropped, dropped);
}

impl Files {
    /// As `write`, in a folder that outlives this.
    fn write_kept(self, name: &str, content: &str) -> PathBuf {
        let path = self.write(name, content);
        let _ = self.0.keep();
        path
    }
}

#[test]
fn dialogues_are_taken_apart_where_they_differ() {
    let transcript =
        |answer: &str| format!("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A joke?\n\nAssistant: {answer}");
    let line = |a: &str, b: &str| json!({"chosen": transcript(a), "rejected": transcript(b)}).to_string();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let pair = json!({
        "prompt": [turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "A joke?")],
        "chosen": [turn("assistant", "Knock knock.")],
        "rejected": [turn("assistant", "No.")],
    });
    let unanswered = json!({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}).to_string();
    let content = [line("Knock knock.", "No."), line("Knock knock.", "No."), line("A", "A"), line("A", ""), unanswered]
        .join("\n");
    let dropped = [("exact duplicate", 1), ("equal sides", 1), ("empty response", 1), ("no answer at the end", 1)];
    check(Dataset::HhRlhf, "a.jsonl", &content, std::slice::from_ref(&pair), &dropped);
    let text =
        |answer: &str| format!("## Human:\nHi\n\n## Assistant:\nHello.\n\n## Human: A joke?\n\n## Assistant: {answer}");
    let list = json!([
        {"text": [text("No."), text("Knock knock.")], "score": [0.5, 1.5]},
        {"text": [text("No."), text("Yes.")], "score": [1.0, 1.0]},
    ]);
    check(Dataset::Webgpt, "a.json", &list.to_string(), &[pair], &[("tie", 1)]);
}

#[test]
fn binary_sets_become_label_pairs() {
    let pair =
        |prompt: &str, chosen: &str, rejected: &str| json!({"prompt": prompt, "chosen": chosen, "rejected": rejected});
    let csv = "label,scenario\n1,\"I deserve it,\nsince I paid.\"\n0,I deserve a castle.\n7,Neither.\n";
    let expected =
        [pair("I deserve it,\nsince I paid.\n", "Good", "Bad"), pair("I deserve a castle.\n", "Bad", "Good")];
    check(Dataset::EthicsJustice, "a.csv", csv, &expected, &[("bad line", 1)]);
    let csv = "label,scenario,excuse\n0,Can you cook?,No because it is blue.\n";
    let expected = [pair("Can you cook? No because it is blue.\n", "Bad", "Good")];
    check(Dataset::EthicsDeontology, "a.csv", csv, &expected, &[]);
    let csv = "label,input,is_short,edited\n1,I stole it.,True,False\n";
    check(Dataset::EthicsCommonsense, "a.csv", csv, &[pair("I stole it.\n", "Bad", "Good")], &[]);
    let csv = "label,scenario\n1,She shared her bread. [SEP] generous\n";
    check(Dataset::EthicsVirtue, "a.csv", csv, &[pair("She shared her bread.\ngenerous\n", "True", "False")], &[]);
    let csv = "I ate cake.,I ate sand.\n";
    let expected = [json!({"chosen": "I ate cake.", "rejected": "I ate sand."})];
    check(Dataset::EthicsUtilitarianism, "a.csv", csv, &expected, &[]);
}

#[test]
fn ranked_sets_become_pairs_of_the_right_and_a_wrong_one() {
    let line = json!({"ind": 1, "ctx": "A man", "endings": ["sings.", "flies."], "label": 0, "source": "x"});
    let expected = [json!({"prompt": "A man ", "chosen": "sings.", "rejected": "flies."})];
    check(Dataset::Hellaswag, "a.jsonl", &line.to_string(), &expected, &[]);
    let solution = |text: &str, right: bool| json!({"solution": text, "is_correct": right});
    let line = json!({"question": "1 + 1?", "ground_truth": "2", "a": solution("2", true), "b": solution("3", false)});
    let one = json!({"question": "2 + 1?", "ground_truth": "3", "a": solution("3", true)});
    let expected = [json!({"prompt": "Question: 1 + 1?\nAnswer: ", "chosen": "2", "rejected": "3"})];
    let dropped = [("not both a right and a wrong solution", 1)];
    check(Dataset::Gsm8kSolutions, "a.jsonl", &format!("{line}\n{one}"), &expected, &dropped);
}

/// The same questions as a dump and as lines.
#[test]
fn stack_exchange_pairs_have_different_scores() {
    let xml = r#"<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="3" PostTypeId="2" ParentId="1" Score="2" Body="&lt;p&gt;In a jar &amp;amp; dark.&lt;/p&gt;" />
  <row Id="1" PostTypeId="1" AcceptedAnswerId="3" Score="9" Title="Coffee?" Body="&lt;p&gt;How to keep it?&lt;/p&gt;" />
  <row Id="4" PostTypeId="2" ParentId="1" Score="-3" Body="Outside." />
  <row Id="5" PostTypeId="1" Score="1" Title="Tea?" Body="Which?" />
  <row Id="6" PostTypeId="2" ParentId="5" Score="4" Body="Green." />
  <row Id="7" PostTypeId="2" ParentId="5" Score="5" Body="Green, too." />
  <row Id="8" PostTypeId="2" ParentId="5" Score="3" Body="Black." />
  <row Id="9" PostTypeId="2" Score="3" Body="To nothing." />
  <row Id="10" PostTypeId="5" Score="3" Body="A tag." />
  <row Id="11" PostTypeId="2" ParentId="77" Score="3" Body="To a question of another file." />
</posts>"#;
    let coffee = json!({
        "prompt": "Question: Coffee?\n\nHow to keep it?\nAnswer: ",
        "chosen": "In a jar & dark.",
        "rejected": "Outside.",
    });
    // round(log2(5)) = round(log2(4)) = 2, and round(log2(6)) = 3.
    let prompt = "Question: Tea?\n\nWhich?\nAnswer: ";
    let tea = |rejected: &str| json!({"prompt": prompt, "chosen": "Green, too.", "rejected": rejected});
    let files = Files::new();
    let prepared = run(Dataset::StackExchange, &[files.write("Posts.xml", xml)], &OPTIONS).unwrap();
    assert_eq!(prepared.train.len(), 2, "{:?}", prepared.train);
    assert!(prepared.train.contains(&coffee), "{:?}", prepared.train);
    assert!(prepared.train.contains(&tea("Green.")) || prepared.train.contains(&tea("Black.")), "{:?}", prepared.train);
    let dropped = json!(prepared.counts.dropped);
    assert_eq!(dropped, json!({"answers without their question": 1, "bad line": 1}));

    let answer = |id: &str, score: i64, accepted: bool, body: &str| json!({"id": id, "score": score, "accepted": accepted, "body_html": body});
    let answers = [answer("3", 2, true, "<p>In a jar &amp; dark.</p>"), answer("4", -3, false, "Outside.")];
    let question = |answers: &[Value]| json!({"id": "1", "title": "Coffee?", "body_html": "<p>How to keep it?</p>", "answers": answers});
    let alone = question(&answers[..1]);
    let content = format!("{}\n{alone}", question(&answers));
    check(Dataset::StackExchange, "a.jsonl", &content, &[coffee], &[("no two answers of different score", 1)]);
}

#[test]
fn reddit_pairs_are_chains_that_differ_in_their_last_comment() {
    let post = |id: &str, subreddit: &str, title: &str| json!({"id": id, "author": "ann", "subreddit": subreddit, "score": 5, "title": title, "selftext": "[removed]"});
    let comment = |id: &str, parent: &str, author: &str, score: i64, body: &str| json!({"id": id, "author": author, "subreddit": "AskScience", "score": score, "body": body, "parent_id": parent, "link_id": "t3_p"});
    let comments = [
        comment("a", "t3_p", "bob", 3, "Light scatters."),
        comment("b", "t1_a", "ann", 7, "Thanks!"),
        comment("c", "t1_a", "eve", 2, "No."),
        comment("d", "t1_a", "AutoModerator", 9, "Read the rules."),
        comment("e", "t1_gone", "eve", 1, "To nobody."),
        comment("f", "t3_p", "[deleted]", 1, "[deleted]"),
    ];
    let posts =
        [post("p", "askscience", "Why is the sky blue?"), post("q", "aww", "A cat"), post("r", "science", "Alone")];
    let lines = |values: &[Value]| values.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    let files = Files::new();
    let comments = files.write("RC.jsonl", &lines(&comments));
    let posts = files.write("RS.jsonl", &lines(&posts));
    for files in [[comments.clone(), posts.clone()], [posts, comments]] {
        let prepared = run(Dataset::Reddit, &files, &OPTIONS).unwrap();
        let expected = json!({
            "prompt": "SUBMISSION by ann: Why is the sky blue?\nCOMMENT by bob: Light scatters.\n",
            "chosen": "COMMENT by ann: Thanks!",
            "rejected": "COMMENT by eve: No.",
        });
        assert_eq!(prepared.train, [expected]);
        let dropped = json!({
            "another subreddit": 1, "deleted": 1, "written by a bot": 1, "no two comments of different score": 1,
        });
        assert_eq!(json!(prepared.counts.dropped), dropped);
    }
}

#[test]
fn summaries_are_chosen_between() {
    let line = json!({
        "info": {"id": "t3_x", "post": "It rained.", "title": "Rain", "subreddit": "tifu"},
        "summaries": [{"text": " Sun.", "policy": "a"}, {"text": " Rain.", "policy": "b"}],
        "choice": 1,
        "worker": "w",
    });
    let expected = json!({"prompt": "Rain\n\nIt rained.\n\nTL;DR: ", "chosen": "Rain.", "rejected": "Sun."});
    check(Dataset::SummarizeFromFeedback, "a.jsonl", &line.to_string(), &[expected], &[]);
}

#[test]
fn reverts_of_vandalism_become_pairs_of_sections() {
    let revision = |id: u32, comment: &str, text: &str| {
        let parent = if id > 1 { format!("<parentid>{}</parentid>", id - 1) } else { String::new() };
        let comment = if comment.is_empty() { String::new() } else { format!("<comment>{comment}</comment>") };
        format!(
            "<revision><id>{id}</id>{parent}<contributor><id>7</id></contributor>{comment}<text bytes=\"9\" \
             xml:space=\"preserve\">{text}</text></revision>"
        )
    };
    let page = |title: &str, space: u32, revisions: &[String]| {
        format!("<page><title>{title}</title><ns>{space}</ns><id>3</id>{}</page>", revisions.concat())
    };
    let good = "'''Tea''' is a [[drink]] &amp; &lt;b&gt;hot&lt;/b&gt;.\n== History ==\nOld.\n== Use ==\nIn cups.\n\
                == References ==\n* A book.";
    let bad = good.replace("Old.", "Tea is for losers.").replace("is a", "is not a").replace("A book.", "lol");
    let revert = "Reverting suspected vandalism";
    let deleted = "<revision><id>3</id><parentid>2</parentid><text deleted=\"deleted\" /></revision>".to_owned();
    let pages = [
        page("Tea &amp; co", 0, &[revision(1, "", good), revision(2, "lol", &bad), revision(3, revert, good)]),
        page("Talk:Tea", 1, &[revision(1, "", "Bad."), revision(2, revert, "Good.")]),
        page("Jam", 0, &[revision(1, revert, "First.")]),
        page("Ham", 0, &[revision(1, "", "A."), revision(2, "", "B."), deleted, revision(4, revert, "A.")]),
        page("Bun", 0, &[revision(1, "", "[[A]]."), revision(2, revert, "A.")]),
        page("Rye", 0, &[revision(1, "", "A.\n== B =="), revision(2, revert, "A.\n== C ==\nD.")]),
        page("Ale", 0, &[revision(1, "", "Good."), revision(2, "a typo", "Better.")]),
    ];
    let xml = format!("<mediawiki><siteinfo><sitename>W</sitename></siteinfo>{}</mediawiki>", pages.concat());
    let expected = [
        ("Introduction", "Tea is a drink & hot.", "Tea is not a drink & hot."),
        ("History", "Old.", "Tea is for losers."),
    ]
    .map(|(section, chosen, rejected)| {
        let prompt = format!("PAGE TITLE: Tea & co\nSECTION TITLE: {section}\nSECTION BODY: ");
        json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    });
    let dropped = [
        ("not an article", 1),
        ("the revision before is not there", 2),
        ("only markup differs", 1),
        ("no section is in both and differs", 1),
    ];
    check(Dataset::Wikipedia, "history.xml", &xml, &expected, &dropped);
    let files = Files::new();
    for broken in [&xml[..xml.len() / 2], "<page><title>&nothing;</title></page>", "<page></revision>"] {
        let error = run(Dataset::Wikipedia, &[files.write("broken.xml", broken)], &OPTIONS).err().unwrap();
        assert!(error.to_string().contains("broken.xml: byte"), "{error}");
    }
}

#[test]
fn edits_become_pairs() {
    let edit = |comment: &str, is_revert: bool, before: &str, after: &str| {
        json!({"ind": 1, "comment": comment, "is_revert": is_revert, "before": before, "after": after}).to_string()
    };
    let lines = [
        edit("/* Use */ Undid revision 1", true, "In [[cup]]s lol.", "In [[cup]]s."),
        edit("spelling", false, "Ina cup.", "In a cup."),
        json!({"title": "Tea", "comment": "rvv", "before": "Cold.", "after": "Hot."}).to_string(),
    ];
    let pair =
        |prompt: &str, chosen: &str, rejected: &str| json!({"prompt": prompt, "chosen": chosen, "rejected": rejected});
    let expected = [
        pair("SECTION TITLE: Use\nSECTION BODY: ", "In cups.", "In cups lol."),
        pair("PAGE TITLE: Tea\nSECTION BODY: ", "Hot.", "Cold."),
    ];
    check(Dataset::WikiEdits, "a.jsonl", &lines.join("\n"), &expected, &[("no revert", 1)]);
    let tsv = "It is hot , and it is wet .\tIt is hot . <::::> It is wet .\nno tab\n";
    let expected = [json!({"chosen": "It is hot . It is wet .", "rejected": "It is hot , and it is wet ."})];
    check(Dataset::WikiEdits, "a.tsv", tsv, &expected, &[("bad line", 1)]);
}

#[test]
fn the_order_of_the_files_does_not_matter_and_questions_stay_together() {
    let files = Files::new();
    let line = |i: usize| {
        json!({"prompt": format!("Question {}", i / 4), "chosen": format!("yes {i}"), "rejected": "no"}).to_string()
    };
    let all: Vec<String> = (0..400).map(line).collect();
    let reversed: Vec<String> = all.iter().rev().cloned().collect();
    let one = files.write("one.jsonl", &all.join("\n"));
    let two = [
        files.write("two.jsonl", &reversed[..150].join("\n")),
        files.write("three.jsonl", &reversed[150..].join("\n")),
    ];
    let options = Options { dev_share: 0.2, ..OPTIONS };
    let first = run(Dataset::Pairs, std::slice::from_ref(&one), &options).unwrap();
    let second = run(Dataset::Pairs, &two, &options).unwrap();
    assert_eq!((&first.train, &first.dev), (&second.train, &second.dev));
    assert_eq!((first.train.len() + first.dev.len(), first.counts.read), (400, 400));
    assert!((40..120).contains(&first.dev.len()), "{}", first.dev.len());
    let questions = |lines: &[Value]| {
        lines.iter().map(|line| line["prompt"].to_string()).collect::<std::collections::BTreeSet<_>>()
    };
    assert!(questions(&first.train).is_disjoint(&questions(&first.dev)));
    let in_order =
        first.train.windows(2).filter(|pair| pair[0]["chosen"].as_str() < pair[1]["chosen"].as_str()).count();
    assert!((100..260).contains(&in_order), "{in_order} of {} stand in order", first.train.len());
    let other = run(Dataset::Pairs, &[one], &Options { seed: 2, ..options }).unwrap();
    assert_ne!(other.train, first.train);
}

#[test]
fn binarised_pairs_are_two() {
    let files = Files::new();
    let file = files.write("a.jsonl", &json!({"prompt": "Q ", "chosen": "A", "rejected": "B"}).to_string());
    let prepared = run(Dataset::Pairs, &[file], &Options { binarise: true, ..OPTIONS }).unwrap();
    let pair = |chosen: &str, rejected: &str| json!({"chosen": chosen, "rejected": rejected});
    let expected = [pair("GOOD:Q A", "BAD:Q A"), pair("BAD:Q B", "GOOD:Q B")];
    assert!(
        prepared.train.len() == 2 && expected.iter().all(|pair| prepared.train.contains(pair)),
        "{:?}",
        prepared.train
    );
}

#[test]
fn packed_files_and_plain_texts_are_read() {
    let files = Files::new();
    let line = json!({"text": "One."}).to_string();
    let gz = files.0.path().join("a.jsonl.gz");
    let mut encoder = flate2::write::GzEncoder::new(fs::File::create(&gz).unwrap(), flate2::Compression::fast());
    encoder.write_all(line.as_bytes()).unwrap();
    encoder.finish().unwrap();
    let zst = files.0.path().join("b.jsonl.zst");
    fs::write(&zst, zstd::encode_all(line.replace("One", "Two").as_bytes(), 1).unwrap()).unwrap();
    let bz2 = files.0.path().join("c.jsonl.bz2");
    let mut encoder = bzip2::write::BzEncoder::new(fs::File::create(&bz2).unwrap(), bzip2::Compression::fast());
    encoder.write_all(line.replace("One", "Three").as_bytes()).unwrap();
    encoder.finish().unwrap();
    let plain = files.write("d.txt", "Four.");
    let prepared = run(Dataset::Text, &[gz, zst, bz2, plain], &OPTIONS).unwrap();
    let mut texts: Vec<&str> = prepared.train.iter().map(|line| line["text"].as_str().unwrap()).collect();
    texts.sort();
    assert_eq!(texts, ["Four.", "One.", "Three.", "Two."]);
}

/// Files that pyarrow wrote: `tests/fixtures/make_parquet.py`.
#[test]
fn rows_of_parquet_are_lines() {
    let read = |dataset: Dataset, name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parquet").join(name);
        let prepared = run(dataset, &[path], &OPTIONS).unwrap();
        assert_eq!((prepared.counts.read, prepared.warnings.len()), (2, 0), "{:?}", prepared.warnings);
        let mut train = prepared.train;
        train.sort_by_key(Value::to_string);
        train
    };
    let texts = [
        json!({"chosen": "Yes.", "rejected": "No."}),
        json!({"prompt": "Tea or coffee?", "chosen": "Tea.", "rejected": "N\u{f6}."}),
    ];
    for codec in ["snappy", "zstd", "gzip", "none", "binary"] {
        assert_eq!(read(Dataset::Pairs, &format!("pairs-{codec}.parquet")), texts, "{codec}");
    }
    let turn = |role: &str, content: &str| json!([{"role": role, "content": content}]);
    let dialogue = |prompt: &str, chosen: &str, rejected: &str| json!({"prompt": turn("user", prompt), "chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)});
    let dialogues = [dialogue("Tea or coffee?", "Tea.", "N\u{f6}."), dialogue("Well?", "Yes.", "No.")];
    assert_eq!(read(Dataset::Pairs, "dialogues.parquet"), dialogues);
    assert_eq!(read(Dataset::HhRlhf, "hh-rlhf.parquet"), dialogues);
    assert_eq!(read(Dataset::Text, "text.parquet"), [json!({"text": "One."}), json!({"text": "Two."})]);
}

#[test]
fn what_cannot_be_done_is_said() {
    let files = Files::new();
    let bad = files.write("a.jsonl", "{}\nnot json\n{\"chosen\": 1, \"rejected\": \"\"}");
    let prepared = run(Dataset::Pairs, std::slice::from_ref(&bad), &OPTIONS).unwrap();
    assert_eq!((prepared.counts.read, prepared.warnings.len()), (3, 3));
    assert!(prepared.warnings[1].contains("a.jsonl: line 2: expected"), "{:?}", prepared.warnings);
    let error = |files: &[PathBuf], options: &Options| run(Dataset::Pairs, files, options).err().unwrap().to_string();
    let strict = error(&[bad], &Options { max_bad_lines: 1, ..OPTIONS });
    assert!(strict.contains("line 2") && strict.contains("more than 1 lines are bad"), "{strict}");
    assert!(error(&[PathBuf::from("/nowhere.jsonl")], &OPTIONS).contains("/nowhere.jsonl"));
    assert!(error(&[], &Options { dev_share: 1.5, ..OPTIONS }).contains("dev-share"));
    let output = tempfile::tempdir().unwrap();
    fs::write(output.path().join("train.jsonl"), "kept").unwrap();
    let error = prepare(Dataset::Pairs, &[], output.path(), &OPTIONS, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("exists") && fs::read_to_string(output.path().join("train.jsonl")).unwrap() == "kept");
}

/// A limit of every file's size stands in for a disk that is full.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let files = Files::new();
    let line = |i: usize| json!({"chosen": format!("{i} {}", "x".repeat(200)), "rejected": "y"}).to_string();
    let input = files.write("a.jsonl", &(0..400).map(line).collect::<Vec<_>>().join("\n"));
    // Blocks of 512 or 1024 bytes, as the shell has it: no room for a drawer; for drawers, but not for all lines.
    for (blocks, named) in [("0", "/.drawers-"), ("20", "/train.jsonl")] {
        let output = tempfile::tempdir().unwrap();
        let limited = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$@\"", "sh", blocks])
            .args([env!("CARGO_BIN_EXE_plumb-train"), "prepare", "pairs"])
            .arg(&input)
            .arg("--output")
            .arg(output.path())
            .output()
            .unwrap();
        let said = String::from_utf8(limited.stderr).unwrap();
        assert!(limited.status.code() == Some(1) && said.contains(named), "{said}");
        assert_eq!(fs::read_dir(output.path()).unwrap().count(), 0);
    }
}
