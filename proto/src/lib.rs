//! The wire contract of Plumb, generated from `plumb/v1/*.proto`. Nothing here has logic.

/// Messages, clients and servers of package `plumb.v1`.
#[expect(missing_docs, clippy::doc_markdown, clippy::doc_lazy_continuation, reason = "generated code; the comments are the proto's")]
pub mod v1 {
    tonic::include_proto!("plumb.v1");
}

/// Encoded `FileDescriptorSet` of the package, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/plumb.v1.bin"));
