//! Compiles the `.proto` files with protox, so that no protoc has to be installed.

use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 4] =
    ["plumb/v1/preference.proto", "plumb/v1/generation.proto", "plumb/v1/models.proto", "plumb/v1/tokens.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=plumb");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // Reflection serves these bytes.
    std::fs::write(out.join("plumb.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
