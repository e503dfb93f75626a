//! Reddit: two comment chains under a post that differ in their last comment (Askell et al. 2021, section 4.1 and appendix
//! C.1), from Pushshift's dumps of submissions and comments.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::parts::Parts;
use super::sets::pick;
use super::{Body, Record, Sink};
use crate::Result;
use crate::input::Lines;

/// The paper's list, in lower case. AmITheAsshole is not on it: the paper's evaluations overlap with it.
const SUBREDDITS: [&str; 50] = [
    "tifu",
    "explainlikeimfive",
    "writingprompts",
    "changemyview",
    "lifeprotips",
    "todayilearned",
    "science",
    "askscience",
    "ifyoulikeblank",
    "upliftingnews",
    "foodforthought",
    "iwanttolearn",
    "bestof",
    "iama",
    "socialskills",
    "relationship_advice",
    "philosophy",
    "youshouldknow",
    "history",
    "books",
    "showerthoughts",
    "personalfinance",
    "buildapc",
    "eatcheapandhealthy",
    "boardgames",
    "malefashionadvice",
    "femalefashionadvice",
    "scifi",
    "fantasy",
    "games",
    "bodyweightfitness",
    "skincareaddiction",
    "podcasts",
    "suggestmeabook",
    "askhistorians",
    "gaming",
    "diy",
    "mildlyinteresting",
    "sports",
    "space",
    "gadgets",
    "documentaries",
    "getmotivated",
    "technology",
    "fitness",
    "travel",
    "lifehacks",
    "damnthatsinteresting",
    "gardening",
    "programming",
];
/// What stands where a text was taken away.
const GONE: [&str; 2] = ["[deleted]", "[removed]"];

/// A line of a dump: a submission has a title, a comment a parent.
#[derive(Deserialize)]
struct Line {
    id: String,
    author: String,
    subreddit: String,
    #[serde(default)]
    score: i64,
    title: Option<String>,
    selftext: Option<String>,
    body: Option<String>,
    /// `t3_` and the submission's id, `t1_` and a comment's.
    parent_id: Option<String>,
    link_id: Option<String>,
}

/// A submission or a comment.
#[derive(Serialize, Deserialize)]
struct Post {
    id: String,
    /// Of the submission.
    link: String,
    /// Of the comment that it answers, if that is one.
    parent: Option<String>,
    submission: bool,
    author: String,
    score: i64,
    text: String,
}

/// Reads submissions and comments, which may lie in any number of files.
pub(super) fn read(files: &[PathBuf], sink: &mut Sink<'_>) -> Result<()> {
    let mut parts = Parts::new(sink.scratch()?)?;
    for path in files {
        let mut lines = Lines::open(path)?;
        while let Some((number, line)) = lines.next()? {
            match serde_json::from_slice::<Line>(&line) {
                Ok(line) => match post(line) {
                    Ok(post) => parts.put(sink.number(&post.link), &post)?,
                    Err(reason) => sink.drop(reason),
                },
                Err(error) => sink.bad(path, number, &error.to_string())?,
            }
        }
    }
    parts.for_each(|posts: Vec<Post>| {
        // In the order of their ids, so that the order of a file does not matter.
        let mut threads: BTreeMap<String, Vec<Post>> = BTreeMap::new();
        posts.into_iter().for_each(|post| threads.entry(post.link.clone()).or_default().push(post));
        for (link, posts) in threads {
            sink.read();
            match pair(&link, &posts, sink) {
                Ok(record) => sink.record(record)?,
                Err(reason) => sink.drop(reason),
            }
        }
        Ok(())
    })
}

fn post(line: Line) -> std::result::Result<Post, &'static str> {
    if !SUBREDDITS.contains(&&line.subreddit.to_lowercase()[..]) {
        return Err("another subreddit");
    }
    let Line { id, author, score, title, selftext, body, parent_id, link_id, .. } = line;
    let (text, link, parent, submission) = match (title, body, link_id) {
        (Some(title), None, _) => {
            let selftext = selftext.filter(|text| !text.is_empty() && !GONE.contains(&&text[..]));
            (selftext.map_or(title.clone(), |text| format!("{title}\n{text}")), id.clone(), None, true)
        }
        (None, Some(body), Some(link)) => {
            let parent = parent_id.and_then(|parent| Some(parent.strip_prefix("t1_")?.to_owned()));
            (body, link.strip_prefix("t3_").unwrap_or(&link).to_owned(), parent, false)
        }
        _ => return Err("neither a submission nor a comment"),
    };
    if GONE.contains(&&text[..]) || GONE.contains(&&author[..]) {
        return Err("deleted");
    }
    let name = author.to_lowercase();
    if name == "automoderator" || name.ends_with("bot") || text.contains("I am a bot") {
        return Err("written by a bot");
    }
    Ok(Post { id, link, parent, submission, author, score, text: text.trim().to_owned() })
}

/// Two comments on the same one, of different score, drawn from all of the post's.
fn pair(link: &str, posts: &[Post], sink: &Sink<'_>) -> std::result::Result<Record, &'static str> {
    let Some(submission) = posts.iter().find(|post| post.submission) else { return Err("comments without their post") };
    let comments: HashMap<&str, &Post> =
        posts.iter().filter(|post| !post.submission).map(|post| (&post.id[..], post)).collect();
    let mut answers: BTreeMap<Option<&str>, Vec<&Post>> = BTreeMap::new();
    for comment in comments.values() {
        // What it answers may have been taken away.
        if comment.parent.as_ref().is_none_or(|parent| comments.contains_key(&parent[..])) {
            answers.entry(comment.parent.as_deref()).or_default().push(comment);
        }
    }
    let mut pairs = Vec::new();
    for answers in answers.values() {
        for better in answers {
            pairs.extend(answers.iter().filter(|worse| worse.score < better.score).map(|worse| (*better, *worse)));
        }
    }
    pairs.sort_by_key(|(better, worse)| (&better.id, &worse.id));
    let Some((better, worse)) = pick(&pairs, sink.draw("comments", link)) else {
        return Err("no two comments of different score");
    };
    let mut chain = Vec::new();
    let mut parent = better.parent.as_deref();
    while let Some(comment) = parent.and_then(|id| comments.get(id)) {
        chain.push(*comment);
        // A chain that closes upon itself is none of Reddit's.
        if chain.len() > comments.len() {
            return Err("a circle of comments");
        }
        parent = comment.parent.as_deref();
    }
    if parent.is_some() {
        return Err("a chain with a comment missing");
    }
    let mut prompt = format!("SUBMISSION by {}: {}", submission.author, submission.text);
    for comment in chain.iter().rev() {
        prompt += &format!("\nCOMMENT by {}: {}", comment.author, comment.text);
    }
    let last = |comment: &Post| format!("COMMENT by {}: {}", comment.author, comment.text);
    let body = Body::Pair { prompt: prompt + "\n", chosen: last(better), rejected: last(worse) };
    Ok(Record { group: link.to_owned(), body })
}
