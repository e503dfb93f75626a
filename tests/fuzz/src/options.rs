//! The server's configuration file.

use plumb_server::Config;

use crate::{Target, folder};

/// A TOML file, up to a configuration; the files that it names are read.
pub const OPTIONS: Target = Target { name: "options", take, fixed: 64 << 20, per_byte: 256 };

fn take(data: &[u8]) {
    let folder = folder::with(&[("plumb.toml", data)]);
    let path = folder.path().join("plumb.toml");
    let _ = Config::parse(["plumb-server".as_ref(), "--config".as_ref(), path.as_os_str()]);
}
