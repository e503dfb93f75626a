//! The tokens file: who holds which token or certificate, and with which roles.
//!
//! ```toml
//! [[token]]
//! name = "rl-run-7"
//! sha256 = "..."                      # of the token, or `token = "..."` itself
//! roles = ["score", "generate"]
//! expires = 2027-01-01T00:00:00Z      # if it ends
//!
//! [[certificate]]
//! name = "operator.example"           # whom the client's certificate names
//! roles = ["admin"]
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Role;
use super::table::{Grant, hash};

/// Names are shown in logs and metrics.
const MAX_NAME_LENGTH: usize = 128;

/// What a file says.
#[derive(Debug)]
pub(super) struct Tokens {
    pub(super) keys: Vec<([u8; 32], Grant)>,
    pub(super) certificates: BTreeMap<Arc<str>, Grant>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    token: Vec<Token>,
    #[serde(default)]
    certificate: Vec<Certificate>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    name: String,
    token: Option<String>,
    sha256: Option<String>,
    roles: Vec<Role>,
    expires: Option<toml::value::Datetime>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Certificate {
    name: String,
    roles: Vec<Role>,
}

/// Reads a file. An error quotes no line of it: there are secrets in it.
pub(super) fn parse(text: &str) -> Result<Tokens, String> {
    let File { token, certificate } = toml::from_str(text).map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        format!("line {line}: {}", error.message())
    })?;
    if token.is_empty() && certificate.is_empty() {
        return Err("there is neither a [[token]] nor a [[certificate]] in it".to_owned());
    }
    let mut keys = Vec::with_capacity(token.len());
    for (i, token) in (1..).zip(token) {
        keys.push(key(token).map_err(|error| format!("token {i}: {error}"))?);
    }
    let mut certificates = BTreeMap::new();
    for (i, Certificate { name, roles }) in (1..).zip(certificate) {
        let grant = grant(name, roles, None).map_err(|error| format!("certificate {i}: {error}"))?;
        if certificates.insert(Arc::clone(&grant.name), grant).is_some() {
            return Err(format!("certificate {i}: its name is there twice"));
        }
    }
    Ok(Tokens { keys, certificates })
}

fn key(Token { name, token, sha256, roles, expires }: Token) -> Result<([u8; 32], Grant), String> {
    let hash = match (token, sha256) {
        (Some(token), None) if token.trim().is_empty() => return Err("its token is empty".to_owned()),
        (Some(token), None) => hash(token.trim()),
        (None, Some(sha256)) => digest(&sha256).ok_or("its sha256 is not 64 hexadecimal digits")?,
        _ => return Err("exactly one of `token` and `sha256` is needed".to_owned()),
    };
    let expires = expires.map(|expires| instant(&expires)).transpose()?;
    Ok((hash, grant(name, roles, expires)?))
}

fn grant(name: String, roles: Vec<Role>, expires: Option<SystemTime>) -> Result<Grant, String> {
    if name.is_empty() || name.len() > MAX_NAME_LENGTH || name.chars().any(char::is_control) {
        return Err(format!("its name needs 1 to {MAX_NAME_LENGTH} bytes without control characters"));
    }
    if roles.is_empty() {
        return Err("it has no roles: give it some of `score`, `generate` and `admin`".to_owned());
    }
    Ok(Grant { name: name.into(), roles: roles.into(), expires })
}

fn digest(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, i) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[i..i + 2], 16).ok()?;
    }
    Some(digest)
}

fn instant(datetime: &toml::value::Datetime) -> Result<SystemTime, String> {
    let parsed = OffsetDateTime::parse(&datetime.to_string(), &Rfc3339);
    parsed
        .map(SystemTime::from)
        .map_err(|_| "`expires` needs a date, a time and a zone: 2027-01-01T00:00:00Z".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn wrong(text: &str, expected: &str) {
        let error = parse(text).unwrap_err();
        assert!(error.contains(expected), "{text} gives {error}");
        assert!(!error.contains("hush"), "the secret is in: {error}");
    }

    #[test]
    fn a_wrong_file_is_refused_without_quoting_it() {
        let token = |line: &str| format!("[[token]]\nname = \"a\"\nroles = [\"score\"]\n{line}\n");
        wrong("", "neither a [[token]] nor a [[certificate]]");
        wrong("[[token]]\ntoken = \"hush", "line 2");
        wrong(&token("tokken = \"hush\""), "unknown field `tokken`");
        wrong(&token(""), "token 1: exactly one of");
        wrong(&token("token = \"hush\"\nsha256 = \"00\""), "exactly one of");
        wrong(&token("sha256 = \"hush\""), "64 hexadecimal digits");
        wrong(&token("token = \" \""), "is empty");
        wrong(&token("token = \"hush\"\nexpires = 2027-01-01"), "needs a date, a time and a zone");
        wrong("[[token]]\nname = \"a\"\ntoken = \"hush\"\nroles = []", "no roles");
        wrong("[[token]]\nname = \"a\"\ntoken = \"hush\"\nroles = [\"root\"]", "unknown variant `root`");
        wrong("[[token]]\nname = \"\"\ntoken = \"hush\"\nroles = [\"score\"]", "its name needs");
        let certificate = "[[certificate]]\nname = \"a\"\nroles = [\"score\"]\n";
        wrong(&certificate.repeat(2), "certificate 2: its name is there twice");
    }

    #[test]
    fn a_digest_stands_for_its_token() {
        let text = |sha256: &str| format!("[[token]]\nname = \"a\"\nsha256 = \"{sha256}\"\nroles = [\"score\"]\n");
        // printf %s hashed | sha256sum
        let sha256 = "1a06df824ed741b53c785079a6347f00eec5af82f9850775409ca69dff4068a6";
        let Tokens { keys, .. } = parse(&text(sha256)).unwrap();
        assert_eq!(keys[0].0, hash("hashed"));
        assert!(parse(&text(&sha256.to_uppercase())).is_ok());
    }
}
