//! Who may call what.
//!
//! [`table`] is the keys, tokens and certificates of one moment, as read from options and files; here are the rules by
//! which a call is let in, and the table is read again whenever a file changes.

pub(crate) mod table;
mod tokens;

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use self::table::{Grant, Table};
use crate::config;
use crate::connections::{Kind, Peer};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::layers::rpc::Class;
use crate::telemetry::events::KeysLoaded;

/// What a caller may be allowed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Score, rank, tokenize.
    Score,
    /// Generate.
    Generate,
    /// Everything, changes to the models included.
    Admin,
}

impl Role {
    /// What every key is good for that is no admin's.
    const CLIENT: [Self; 2] = [Self::Score, Self::Generate];

    /// What a class of rpcs needs. Reading what is served takes any role.
    fn needed(class: Class) -> Option<Self> {
        match class {
            Class::Score => Some(Self::Score),
            Class::Generate => Some(Self::Generate),
            Class::Admin => Some(Self::Admin),
            Class::Read | Class::Infrastructure => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Score => "score",
            Self::Generate => "generate",
            Self::Admin => "admin",
        }
    }
}

/// The rules of a server.
pub(crate) struct Access {
    config: config::Access,
    /// Models are changed at a listener of their own.
    has_admin_listener: bool,
    /// As they were before they were read.
    files: Files,
    table: RwLock<Arc<Table>>,
}

impl Access {
    /// Reads the files.
    ///
    /// # Errors
    /// Which file is wrong, and why.
    pub(crate) fn load(config: &config::Access, has_admin_listener: bool) -> Result<Self, String> {
        let files = Files::look(config.files().cloned());
        let table = Table::read(config)?;
        KeysLoaded::Read { keys: table.len() }.emit();
        Ok(Self { config: config.clone(), has_admin_listener, files, table: RwLock::new(Arc::new(table)) })
    }

    /// Reads the files again whenever they change. What is broken changes nothing.
    pub(crate) async fn follow(&self) {
        let mut files = self.files.clone();
        loop {
            files.changed().await;
            let config = self.config.clone();
            let Ok(read) = tokio::task::spawn_blocking(move || Table::read(&config)).await else { continue };
            match read {
                Ok(table) => {
                    KeysLoaded::Read { keys: table.len() }.emit();
                    *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
                }
                Err(error) => KeysLoaded::Refused { error: &error }.emit(),
            }
        }
    }

    /// The caller's name, if a call with this key and from this peer may pass.
    ///
    /// # Errors
    /// UNAUTHENTICATED without a credential that is known, PERMISSION_DENIED for one that does not allow it.
    pub(crate) fn check(&self, class: Class, key: Option<&str>, peer: Option<&Peer>) -> Result<Option<Arc<str>>> {
        if class == Class::Infrastructure {
            return Ok(None);
        }
        let at_admin_listener = peer.is_some_and(|peer| peer.listener == Kind::Admin);
        if class == Class::Admin && self.has_admin_listener && !at_admin_listener {
            return Err(denied("models are changed at the server's admin listener only".to_owned()));
        }
        let table = Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner));
        let grant = grant(&table, key, peer.and_then(|peer| peer.certificate.as_ref()));
        if class == Class::Admin && self.config.is_open_to_admins() {
            let local = peer.is_some_and(|peer| is_this_machine(peer.address.ip()));
            return match local || at_admin_listener {
                true => Ok(grant.ok().map(|grant| grant.name)),
                false => Err(denied(
                    "without keys, models are changed from this machine only: start the server with --admin-api-key, \
                     --auth-tokens-file or --admin-port"
                        .to_owned(),
                )),
            };
        }
        if class != Class::Admin && self.config.is_open_to_clients() {
            return Ok(grant.ok().map(|grant| grant.name));
        }
        let grant = grant?;
        match Role::needed(class) {
            Some(role) if !grant.roles.contains(&role) && !grant.roles.contains(&Role::Admin) => {
                Err(denied(format!("this rpc needs a key with the role `{}`", role.name())))
            }
            _ => Ok(Some(grant.name)),
        }
    }
}

/// What a caller has shown. A key counts before a certificate: what is shown has to be right.
fn grant(table: &Table, key: Option<&str>, certificate: Option<&Arc<str>>) -> Result<Grant> {
    let unauthenticated = |message: &str| Err(Error::Unauthenticated { message: message.to_owned() });
    match (key, certificate) {
        (Some(key), _) => match table.grant_of_key(key) {
            Some(grant) if grant.expires.is_some_and(|end| end <= SystemTime::now()) => {
                unauthenticated("the token has expired")
            }
            Some(grant) => Ok(grant.clone()),
            None => unauthenticated("the key is not known to this server"),
        },
        (None, Some(name)) => Ok(table.grant_of_certificate(name)),
        (None, None) => unauthenticated("this server needs a key: send `authorization: Bearer KEY`"),
    }
}

fn denied(message: String) -> Error {
    Error::PermissionDenied { message }
}

/// Whether an address is of this machine and cannot be another's.
pub(crate) fn is_this_machine(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Duration;

    use tonic::Code;

    use super::*;

    const OUTSIDE: &str = "192.0.2.1:4000";
    const INSIDE: &str = "127.0.0.1:4000";

    fn peer(address: &str, listener: Kind, certificate: Option<&str>) -> Peer {
        let address = address.parse().unwrap();
        Peer { address, local: address, listener, certificate: certificate.map(Arc::from) }
    }

    fn keys(client: &[&str], admin: &[&str]) -> config::Access {
        let secrets = |keys: &[&str]| keys.iter().map(|key| key.parse().unwrap()).collect();
        config::Access { api_keys: secrets(client), admin_api_keys: secrets(admin), ..config::Access::default() }
    }

    fn with_tokens(config: config::Access, text: &str) -> (config::Access, tempfile::NamedTempFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        (config::Access { tokens_file: Some(file.path().to_owned()), ..config }, file)
    }

    /// What every class gets, in the order Read, Score, Generate, Admin.
    #[track_caller]
    fn check(config: &config::Access, key: Option<&str>, peer: &Peer, expected: [Code; 4]) {
        check_with(config, false, key, peer, expected);
    }

    #[track_caller]
    fn check_with(config: &config::Access, listener: bool, key: Option<&str>, peer: &Peer, expected: [Code; 4]) {
        let access = Access::load(config, listener).unwrap();
        let code = |class| access.check(class, key, Some(peer)).map_or_else(|error| error.code(), |_| Code::Ok);
        assert_eq!([Class::Read, Class::Score, Class::Generate, Class::Admin].map(code), expected, "{key:?}");
        assert_eq!(code(Class::Infrastructure), Code::Ok);
    }

    const ALL: [Code; 4] = [Code::Ok; 4];
    const NONE: [Code; 4] = [Code::Unauthenticated; 4];
    const CLIENT: [Code; 4] = [Code::Ok, Code::Ok, Code::Ok, Code::PermissionDenied];

    #[test]
    fn keys_open_what_they_are_for() {
        let outside = peer(OUTSIDE, Kind::Public, None);
        let both = keys(&["c1", "c2"], &["a"]);
        for (key, expected) in
            [(None, NONE), (Some("wrong"), NONE), (Some("c1"), CLIENT), (Some("c2"), CLIENT), (Some("a"), ALL)]
        {
            check(&both, key, &outside, expected);
        }
        let client_only = keys(&["c"], &[]);
        check(&client_only, None, &outside, NONE);
        check(&client_only, Some("c"), &outside, ALL);
        let admin_only = keys(&[], &["a"]);
        let [ok, unknown] = [Code::Ok, Code::Unauthenticated];
        check(&admin_only, None, &outside, [ok, ok, ok, unknown]);
        check(&admin_only, Some("a"), &outside, ALL);
    }

    #[test]
    fn without_keys_models_are_changed_from_this_machine_only() {
        let open = config::Access::default();
        for inside in [INSIDE, "[::1]:4000", "[::ffff:127.0.0.1]:4000"] {
            check(&open, Some("whatever"), &peer(inside, Kind::Public, None), ALL);
        }
        check(&open, None, &peer(OUTSIDE, Kind::Public, None), CLIENT);
    }

    #[test]
    fn with_an_admin_listener_models_are_changed_there_only() {
        let (inside, outside) = (peer(INSIDE, Kind::Public, None), peer(OUTSIDE, Kind::Admin, None));
        let open = config::Access::default();
        check_with(&open, true, None, &inside, CLIENT);
        check_with(&open, true, None, &outside, ALL);
        let both = keys(&["c"], &["a"]);
        check_with(&both, true, Some("a"), &inside, CLIENT);
        check_with(&both, true, Some("a"), &outside, ALL);
        check_with(&both, true, Some("c"), &outside, CLIENT);
        check_with(&both, true, None, &outside, NONE);
    }

    #[test]
    fn tokens_have_roles_and_an_end() {
        // printf %s hashed | sha256sum
        let (config, _file) = with_tokens(
            keys(&["c"], &[]),
            r#"
            [[token]]
            name = "scorer"
            token = "s"
            roles = ["score"]
            [[token]]
            name = "scorer"
            token = "s2"
            roles = ["score"]
            expires = 2999-01-01T00:00:00Z
            [[token]]
            name = "writer"
            sha256 = "1a06df824ed741b53c785079a6347f00eec5af82f9850775409ca69dff4068a6"
            roles = ["generate"]
            [[token]]
            name = "operator"
            token = "o"
            roles = ["admin"]
            [[token]]
            name = "late"
            token = "l"
            roles = ["admin"]
            expires = 2020-01-01T00:00:00Z
            "#,
        );
        let outside = peer(OUTSIDE, Kind::Public, None);
        let [ok, denied] = [Code::Ok, Code::PermissionDenied];
        for key in ["s", "s2"] {
            check(&config, Some(key), &outside, [ok, ok, denied, denied]);
        }
        check(&config, Some("hashed"), &outside, [ok, denied, ok, denied]);
        check(&config, Some("o"), &outside, ALL);
        check(&config, Some("l"), &outside, NONE);
        // A file says who is an admin: the plain keys are not any more.
        check(&config, Some("c"), &outside, CLIENT);
        let access = Access::load(&config, false).unwrap();
        let name = |key| access.check(Class::Score, Some(key), Some(&outside)).unwrap().unwrap();
        assert_eq!(
            [name("s"), name("s2"), name("c")].each_ref().map(|name| &**name),
            ["scorer", "scorer", "api-key-1"]
        );
    }

    #[tokio::test]
    async fn a_change_between_reading_and_following_is_seen() {
        let token = |token: &str| format!("[[token]]\nname = \"scorer\"\ntoken = \"{token}\"\nroles = [\"score\"]\n");
        let (config, file) = with_tokens(keys(&[], &[]), &token("old"));
        let access = Access::load(&config, false).unwrap();
        let access = Access { files: access.files.clone().every(Duration::from_millis(5)), ..access };
        std::fs::write(file.path(), token("new")).unwrap();
        let outside = peer(OUTSIDE, Kind::Public, None);
        let passes = |key| access.check(Class::Score, Some(key), Some(&outside)).is_ok();
        assert!(passes("old"));
        let seen = async {
            while !passes("new") {
                tokio::task::yield_now().await;
            }
        };
        let seen = tokio::time::timeout(Duration::from_secs(60), seen);
        tokio::select! {
            () = access.follow() => {}
            seen = seen => seen.unwrap(),
        }
        assert!(!passes("old"));
    }

    #[test]
    fn a_certificate_counts_where_no_key_is_shown() {
        let verified = config::Access { client_certificates: true, ..keys(&[], &[]) };
        let (trainer, nobody) = (peer(OUTSIDE, Kind::Public, Some("trainer")), peer(INSIDE, Kind::Public, None));
        check(&verified, None, &trainer, CLIENT);
        check(&verified, None, &nobody, NONE);
        check(&verified, Some("wrong"), &trainer, NONE);
        let file = "[[certificate]]\nname = \"trainer\"\nroles = [\"admin\"]\n";
        let (named, _file) = with_tokens(verified, file);
        check(&named, None, &trainer, ALL);
        check(&named, None, &peer(OUTSIDE, Kind::Public, Some("other")), CLIENT);
        let access = Access::load(&named, false).unwrap();
        assert_eq!(&*access.check(Class::Score, None, Some(&trainer)).unwrap().unwrap(), "trainer");
    }
}
