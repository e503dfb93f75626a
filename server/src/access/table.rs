//! Keys, tokens and certificates, and what each is good for.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};

use super::{Role, tokens};
use crate::config::{Access, Secret};
use crate::files;

/// Most keys and tokens: each is compared at every call.
const MAX_KEYS: usize = 10_000;

/// Whom a credential belongs to, and what it is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    /// A name of the tokens file, of a certificate, or `api-key-1`.
    pub(crate) name: Arc<str>,
    pub(crate) roles: Arc<[Role]>,
    pub(crate) expires: Option<SystemTime>,
}

/// All credentials of a server. Keys are there as hashes, so that comparing tells nothing about their lengths either.
pub(crate) struct Table {
    keys: Vec<([u8; 32], Grant)>,
    certificates: BTreeMap<Arc<str>, Grant>,
}

impl Table {
    /// Reads options and files.
    ///
    /// # Errors
    /// Which file is wrong, and why.
    pub(crate) fn read(access: &Access) -> Result<Self, String> {
        let admins: &[Role] = &[Role::Score, Role::Generate, Role::Admin];
        // Where nobody is named as an admin, whoever has a key may also change models.
        let clients = if access.has_admins() { &Role::CLIENT[..] } else { admins };
        let mut keys = plain(&access.api_keys, access.api_key_file.as_deref(), "api-key", clients)?;
        keys.extend(plain(&access.admin_api_keys, access.admin_api_key_file.as_deref(), "admin-key", admins)?);
        let mut table = Self { keys, certificates: BTreeMap::new() };
        if let Some(path) = &access.tokens_file {
            let named = |error: String| format!("{}: {error}", path.display());
            let text = String::from_utf8(files::read(path)?).map_err(|error| named(error.to_string()))?;
            let tokens::Tokens { keys, certificates } = tokens::parse(&text).map_err(named)?;
            table.keys.extend(keys);
            table.certificates = certificates;
        }
        match table.keys.len() {
            count if count > MAX_KEYS => Err(format!("{count} keys are given, {MAX_KEYS} are allowed")),
            _ => Ok(table),
        }
    }

    /// Keys and named certificates.
    pub(crate) fn len(&self) -> usize {
        self.keys.len() + self.certificates.len()
    }

    /// What a key is good for. Looks at all of them, whichever it is.
    pub(crate) fn grant_of_key(&self, key: &str) -> Option<&Grant> {
        let hash = hash(key);
        let mut found = u64::MAX;
        for (i, (other, _)) in (0..).zip(&self.keys) {
            found.conditional_assign(&i, hash.ct_eq(other));
        }
        let (_, grant) = self.keys.get(usize::try_from(found).ok()?)?;
        Some(grant)
    }

    /// What a verified certificate is good for: what the file says, or what a client's key is.
    pub(crate) fn grant_of_certificate(&self, name: &Arc<str>) -> Grant {
        let client = || Grant { name: Arc::clone(name), roles: Role::CLIENT.into(), expires: None };
        self.certificates.get(name).cloned().unwrap_or_else(client)
    }
}

/// Keys from an option and from the lines of a file, named by their place. An empty key would let everybody in who
/// sends none, and an empty file is a mistake that must not open the server.
fn plain(given: &[Secret], file: Option<&Path>, name: &str, roles: &[Role]) -> Result<Vec<([u8; 32], Grant)>, String> {
    let mut keys: Vec<String> = given.iter().map(|key| key.reveal().to_owned()).collect();
    if let Some(path) = file {
        let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = String::from_utf8(files::read(path)?).map_err(|error| named(&error))?;
        let before = keys.len();
        keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        if keys.len() == before {
            return Err(named(&"there is no key in it"));
        }
    }
    if keys.iter().any(String::is_empty) {
        return Err("a key is empty".to_owned());
    }
    let roles: Arc<[Role]> = roles.into();
    let grant = |i| Grant { name: format!("{name}-{i}").into(), roles: Arc::clone(&roles), expires: None };
    Ok((1..).zip(&keys).map(|(i, key)| (hash(key), grant(i))).collect())
}

pub(super) fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_options_and_files_are_named_by_their_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "second\n\n  third \n").unwrap();
        let access = Access {
            api_keys: vec!["first".parse().unwrap()],
            api_key_file: Some(file.path().to_owned()),
            ..Access::default()
        };
        let table = Table::read(&access).unwrap();
        let name = |key| table.grant_of_key(key).map(|grant| grant.name.to_string());
        assert_eq!(name("first").as_deref(), Some("api-key-1"));
        assert_eq!(name("second").as_deref(), Some("api-key-2"));
        assert_eq!(name("third").as_deref(), Some("api-key-3"));
        assert_eq!(name("fourth"), None);
        std::fs::write(file.path(), "\n \n").unwrap();
        assert!(Table::read(&access).err().unwrap().contains("there is no key in it"));
    }
}
